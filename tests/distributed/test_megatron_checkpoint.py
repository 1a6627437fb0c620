"""Checkpoints of Megatron-Core's own GPTModel load here, and ours there, saved at one tensor parallel size,
read at another. Those written for Megatron-LM load with what they contain alone."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.checkpoint.rope_sources.read import read_source
from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import llama, weight_mapping
from megatron_ultralong.rope.methods import Unscaled, same_maths
from megatron_ultralong.train import weights_source
from tests import megatron_bridge
from tests.answering import byte_tokenizer
from tests.spawn import leave_groups, run_ranks
from tests.tiny import hf_model

UNTIED = Model(hidden_size=48, ffn_size=80, layers=2, heads=6, kv_heads=2, head_dim=10, vocab_size=97)
TIED = replace(UNTIED, tied_embeddings=True)
ROPE = Unscaled(theta=10000.0)
S, ROWS = 32, 2
MEGATRON_LM_VOCABULARY = 128
"""Megatron-LM's own padding of 97: to a multiple of 128."""


def test_gpt_model(tmp_path: Path) -> None:
    run_ranks(_both_ways, 2, tmp_path)


def _both_ways(rank: int, world: int, folder: Path) -> None:
    from megatron_ultralong.checkpoint import saving
    from megatron_ultralong.checkpoint.training_state import TrainingState

    for model in (UNTIED, TIED):
        reference = hf_model(model)
        whole = {name: parameter.data for name, parameter in reference.named_parameters()}
        tokens = torch.randint(0, model.vocab_size, (ROWS, S), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            logits = reference(tokens).logits
        place = folder / ("tied" if model.tied_embeddings else "untied")

        for tp in (1, 2):
            with _Layout(tp) as ranks:
                gpt = _gpt(model, ranks, MEGATRON_LM_VOCABULARY)
                _fill(gpt, whole, model, ranks)
                assert (_gpt_logits(gpt, tokens, ranks) - logits).abs().max() < 1e-4
                _save_like_megatron_lm(gpt, place / f"theirs_tp{tp}", rank)
                ours = _ours(model, ranks)
                _fill(ours, whole, model, ranks)
                state = TrainingState(model=model, rope=ROPE, iteration=3)
                saving.save(place / f"ours_tp{tp}", state, [ours], None)

        for saved, tp in itertools.product((1, 2), repeat=2):
            with _Layout(tp) as ranks:
                _into_ours(place / f"theirs_tp{saved}", model, ranks, whole, tokens, logits)
                _into_gpt(place / f"ours_tp{saved}" / "iter_0000003", model, ranks, whole, tokens, logits)


def _into_ours(
    run_directory: Path,
    model: Model,
    ranks: Any,
    whole: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """What `--load RUN_DIRECTORY` does: the recipe gives the shape, as Megatron-LM's checkpoint has no
    run.json."""
    run = Run(
        name="test",
        model=model,
        rope=ROPE,
        train=Train(seq_length=S, iterations=1, lr=1e-3, precision="fp32"),
    )
    run, source = weights_source.find(run, run_directory / "none", run_directory, None)
    assert source.checkpoint == run_directory / "iter_0000100" and source.state.iteration == 0
    ours = _ours(model, ranks)
    weights_source.load_weights([ours], run, source, ranks)
    for name, parameter in ours.named_parameters():
        want = weight_mapping.split(name, whole, model, ranks.tp_rank, ranks.tp)
        rows = _real_rows(name, model, ranks.tp_rank, len(want))
        assert torch.equal(parameter[:rows], want[:rows]), (name, ranks.tp)
    with torch.no_grad():
        assert (_gathered(ours(tokens), ranks)[..., : model.vocab_size] - logits).abs().max() < 1e-4

    with pytest.raises(UserError, match="not a checkpoint of this program"):
        weights_source.find(replace(run, model=None), run_directory / "none", run_directory, None)
    deeper = replace(model, layers=4)
    with pytest.raises(
        UserError, match=r"decoder\.layers\..* has shape \[2, .*\], but the model needs \[4, "
    ):
        weights_source.load_weights([_ours(deeper, ranks)], run, source, ranks)


def _into_gpt(
    checkpoint: Path,
    model: Model,
    ranks: Any,
    whole: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """No tensor may be missing or left over, on either side."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    gpt = _gpt(model, ranks, weight_mapping.padded_vocab_size(model.vocab_size, ranks.tp))
    state = dist_checkpointing.load(
        {"model": gpt.sharded_state_dict(metadata=_metadata())},
        str(checkpoint),
        strict=StrictHandling.RAISE_ALL,
    )
    gpt.load_state_dict(state["model"], strict=True)
    for name, parameter in gpt.named_parameters():
        want = weight_mapping.split(name, whole, model, ranks.tp_rank, ranks.tp)
        rows = _real_rows(name, model, ranks.tp_rank, len(want))
        assert torch.equal(parameter[:rows], want[:rows]), (name, ranks.tp)
    assert (_gpt_logits(gpt, tokens, ranks) - logits).abs().max() < 1e-4


def _real_rows(name: str, model: Model, tp_rank: int, rows: int) -> int:
    """Rows of a shard that are no padding of the vocabulary."""
    vocabulary = name in (weight_mapping.EMBEDDING, weight_mapping.OUTPUT)
    return min(rows, model.vocab_size - tp_rank * rows) if vocabulary else rows


# ---- written for Megatron-LM -------------------------------------------------------------------


S_LONG, ROWS_LONG = 512, 1
"""So long that the lowest frequency that Llama-3.1's scaling divides shows in the logits."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
EXPORTED: dict[str, tuple[Model, dict[str, Any] | None]] = {
    "llama": (UNTIED, LLAMA3),
    "qwen2": (
        replace(TIED, family="qwen2", qkv_bias=True, norm_eps=1e-2),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "qwen3": (replace(UNTIED, family="qwen3", qk_norm=True), YARN),
    "biases": (replace(UNTIED, qkv_bias=True, attention_output_bias=True, mlp_bias=True), None),
}
"""Every family's options, and every RoPE that can be expressed."""


def test_written_for_megatron_lm(tmp_path: Path) -> None:
    run_ranks(_written, 2, tmp_path)
    out = tmp_path / "qwen3_pp"
    text, stored = read_source(out / "megatron_arguments.txt"), read_source(out)
    for [source] in (text, stored):
        assert same_maths(source.rope, read_source(tmp_path / "qwen3")[0].rope, source.head_dim)
    assert _arguments_in_the_tensors(out / "release") in (
        None,
        vars(_arguments(out / "release" / "common.pt")),
    )


def _arguments(file: Path) -> argparse.Namespace:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)["args"]


def _arguments_in_the_tensors(checkpoint: Path) -> dict[str, Any] | None:
    """What newer releases of Megatron-Core store there; None with older ones."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import common

    if hasattr(common, "TorchCommonSaveStrategy"):
        return None
    hidden = (checkpoint / "common.pt").rename(checkpoint / "hidden")
    found = dist_checkpointing.load_common_state_dict(str(checkpoint))
    hidden.rename(checkpoint / "common.pt")
    return vars(found["args"])


def _written(rank: int, world: int, folder: Path) -> None:
    from megatron_ultralong.checkpoint.megatron_lm.export import export_megatron

    tokens = torch.randint(0, 97, (ROWS_LONG, S_LONG), generator=torch.Generator().manual_seed(7))
    references = {}
    for name, (model, rope) in EXPORTED.items():
        reference = hf_model(model, rope)
        if rank == 0:
            reference.save_pretrained(folder / name)
            (folder / name / "tokenizer_config.json").write_text("{}")
        with torch.no_grad():
            references[name] = reference(tokens).logits
    with _Layout(1, pp=2) as ranks:
        parallel = Parallel(pp=2)
        for name in EXPORTED:
            out = folder / f"{name}_pp"
            _, notes = export_megatron(folder / name, out, ranks, parallel, target_tp=2)
            assert len(notes) == (name != "biases")
            # Rank 0 has the hidden folder of the next export before other ranks have looked.
            assert rank > 0 or not list(folder.glob(".*"))
        _failures(folder, rank, ranks, parallel)
    with _Layout(2) as ranks:
        for name, logits in references.items():
            export_megatron(folder / name, folder / f"{name}_tp", ranks, Parallel(tp=2), target_tp=2)
            for written in ("pp", "tp"):
                _with_megatron_core_alone(folder / f"{name}_{written}", ranks, tokens, logits)
            _as_of_megatron_bridge(folder, name, ranks, tokens, logits)
    with _Layout(1) as ranks:
        for name, logits in references.items():
            _with_megatron_core_alone(folder / f"{name}_tp", ranks, tokens, logits)


def _failures(folder: Path, rank: int, ranks: Any, parallel: Parallel) -> None:
    """A failure of any rank ends all of them, and leaves nothing."""
    from megatron_ultralong.checkpoint.hf.reader import HFReader
    from megatron_ultralong.checkpoint.megatron_lm.export import export_megatron

    def fail(*arguments: Any) -> torch.Tensor:
        raise UserError("model.safetensors cannot be read")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(HFReader, "shard", fail)
        with pytest.raises(UserError, match=r"^model\.safetensors cannot be read$"):
            export_megatron(folder / "llama", folder / "failed", ranks, parallel)
    with pytest.raises(UserError, match="already exists and is not an empty directory"):
        export_megatron(folder / "llama", folder / "llama", ranks, parallel)
    with pytest.raises(UserError, match="--target-tp 4 must be at least 1 and divide the model's 6 heads"):
        export_megatron(folder / "llama", folder / "failed", ranks, parallel, target_tp=4)
    torch.distributed.barrier()
    assert not [path.name for path in folder.iterdir() if "failed" in path.name]


def _with_megatron_core_alone(out: Path, ranks: Any, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """What Megatron-LM does with --load OUT: its arguments, its model, and the tensors."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (out / "hf" / "tokenizer_config.json").is_file()
    checkpoint = str(out / "release")
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    args = common["args"]
    assert args.padded_vocab_size == 256 and args.tensor_model_parallel_size == 2
    gpt = _gpt_of_arguments(args, ranks)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) | _metadata()
    state, unused, missing = dist_checkpointing.load(
        {"model": gpt.sharded_state_dict(metadata=metadata)},
        checkpoint,
        strict=StrictHandling.RETURN_ALL,
    )
    # Those that modules have with TransformerEngine only.
    assert not missing and all("_extra_state" in name for name in unused), (missing, unused)
    gpt.load_state_dict(state["model"], strict=True)
    weights = [gpt.embedding.word_embeddings.weight]
    if args.untie_embeddings_and_output_weights:
        weights.append(gpt.output_layer.weight)
    for weight in weights:
        rows = torch.arange(len(weight)) + ranks.tp_rank * len(weight)
        assert weight[rows < 97].abs().sum(1).all() and not weight[rows >= 97].any()
    positions = torch.arange(S_LONG).expand(ROWS_LONG, S_LONG)
    with torch.no_grad():
        found = _gathered(gpt(tokens, positions, None), ranks)[..., :97]
    assert (found - logits).abs().max() < 1e-4, (out.name, ranks.tp)


BRIDGE_ROPE: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": True, "rope_scaling_factor": 32.0},
    "qwen2": {"seq_len_interpolation_factor": 4.0},
    "qwen3": {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 128,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_correction_range_round_to_int": True,
    },
    "biases": {},
}
"""The RoPE of `EXPORTED` in Megatron-Bridge's words."""


def _as_of_megatron_bridge(
    folder: Path, name: str, ranks: Any, tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    """The same tensors with Megatron-Bridge's run_config.yaml are read in place: exported, and a run starts
    from them; they are not resumed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_ultralong.checkpoint.convert import export_hf, verify
    from megatron_ultralong.runtime import agreement

    model, place, out = EXPORTED[name][0], folder / f"{name}_bridge", folder / f"{name}_from_bridge"
    checkpoint = place / "iter_0000007"

    def prepare() -> None:
        shutil.copytree(folder / f"{name}_tp" / "release", checkpoint)
        stated = megatron_bridge.fields(model, S_LONG, **BRIDGE_ROPE[name])
        megatron_bridge.write(checkpoint, stated if name == "llama" else megatron_bridge.with_builder(stated))
        byte_tokenizer().save_pretrained(checkpoint / "tokenizer")

    agreement.on_main_rank(prepare)
    export_hf(place, out, ranks, Parallel(tp=2))
    assert verify(folder / name, place, ranks, Parallel(tp=2)) == []
    if ranks.is_main:
        assert AutoTokenizer.from_pretrained(out).eos_token == "<|end|>"
        exported = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
        assert exported.config.eos_token_id == 1
        assert exported.config.max_position_embeddings == (262144 if name == "llama" else S_LONG)
        with torch.no_grad():
            assert (exported(tokens).logits - logits).abs().max() < 1e-5
    run = Run(name="test", train=Train(seq_length=S, iterations=1, lr=1e-3, precision="fp32"))
    run, source = weights_source.find(run, folder / "none", place, None)
    assert source.checkpoint == checkpoint and (source.state.iteration, source.state.base) == (
        0,
        "example/model",
    )
    with pytest.raises(UserError, match=r"run\.json is missing: not a checkpoint of this program"):
        weights_source.find(run, place, None, None)
    [chunk] = llama.build(run.model, run.rope, ranks, Parallel(tp=2), Memory(offload="off"), "fp32")
    weights_source.load_weights([chunk], run, source, ranks)
    with torch.no_grad():
        assert (_gathered(chunk(tokens), ranks)[..., :97] - logits).abs().max() < 1e-4


def _gpt_of_arguments(args: argparse.Namespace, ranks: Any) -> Any:
    """GPTModel as Megatron-LM builds it from its arguments, with linears that need no TransformerEngine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert args.swiglu and args.group_query_attention and not args.use_rotary_position_embeddings
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        rotary_interleaved=args.rotary_interleaved,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=ranks.tp,
    )
    if args.position_embedding_type == "yarn":
        for prefixed, name in {
            "yarn_rotary_scaling_factor": "rotary_scaling_factor",
            "yarn_mscale": "mscale",
            "yarn_mscale_all_dim": "mscale_all_dim",
        }.items():
            setattr(config, prefixed, getattr(args, name))
        for name in (name for name in vars(args) if name.startswith("yarn_")):
            setattr(config, name, getattr(args, name))
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        args.padded_vocab_size,
        args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=True,
    ).float()


# ---- models ------------------------------------------------------------------------------------


class _Layout:
    """`with _Layout(tp)`: Megatron's groups; the other ranks are data parallel."""

    def __init__(self, tp: int, pp: int = 1) -> None:
        self.parallel = Parallel(tp=tp, pp=pp)

    def __enter__(self) -> Any:
        from megatron_ultralong.runtime import launch

        return launch.start(Runtime(device="cpu"), self.parallel)

    def __exit__(self, *_: object) -> None:
        leave_groups()


def _ours(model: Model, ranks: Any) -> Any:
    return llama.build(model, ROPE, ranks, Parallel(tp=ranks.tp), Memory(offload="off"), "fp32")[0]


def _gpt(model: Model, ranks: Any, vocabulary: int) -> Any:
    """Megatron-Core's GPTModel of the same shape, from its local spec; its norms know no sequence
    parallelism."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = llama.transformer_config(model, Parallel(tp=ranks.tp), Memory(recompute="none"), "fp32")
    config.sequence_parallel = False
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocabulary,
        S,
        position_embedding_type="rope",
        rotary_base=int(ROPE.theta),
        share_embeddings_and_output_weights=model.tied_embeddings,
        parallel_output=True,
    )


def _fill(chunk: Any, whole: dict[str, torch.Tensor], model: Model, ranks: Any) -> None:
    """Weights of the Hugging Face model; a vocabulary padded further has zeros there."""
    for name, parameter in chunk.named_parameters():
        if name in (weight_mapping.EMBEDDING, weight_mapping.OUTPUT):
            rows = whole[weight_mapping.hf_names(name, model)[0]]
            padded = torch.zeros(len(parameter) * ranks.tp, model.hidden_size)
            padded[: model.vocab_size] = rows
            parameter.data.copy_(padded.chunk(ranks.tp)[ranks.tp_rank])
        else:
            parameter.data.copy_(weight_mapping.split(name, whole, model, ranks.tp_rank, ranks.tp))


def _gpt_logits(gpt: Any, tokens: torch.Tensor, ranks: Any) -> torch.Tensor:
    positions = torch.arange(S).expand(ROWS, S)
    with torch.no_grad():
        return _gathered(gpt(tokens, positions, None), ranks)[..., :97]


def _gathered(logits: torch.Tensor, ranks: Any) -> torch.Tensor:
    parts = [torch.empty_like(logits).contiguous() for _ in range(ranks.tp)]
    torch.distributed.all_gather(parts, logits.contiguous(), group=ranks.groups.tp)
    return torch.cat(parts, dim=-1)


# ---- files -------------------------------------------------------------------------------------


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _save_like_megatron_lm(gpt: Any, run_directory: Path, rank: int) -> None:
    """The folders and the rest of the state that Megatron-LM's training writes, optimizer left out."""
    from megatron.core import dist_checkpointing

    checkpoint = run_directory / "iter_0000100"
    if rank == 0:
        checkpoint.mkdir(parents=True)
        (run_directory / "latest_checkpointed_iteration.txt").write_text("100")
    torch.distributed.barrier()
    state = {
        "args": argparse.Namespace(num_layers=2),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": gpt.sharded_state_dict(metadata=_metadata()),
    }
    dist_checkpointing.save(state, str(checkpoint))
    torch.distributed.barrier()
    assert json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
