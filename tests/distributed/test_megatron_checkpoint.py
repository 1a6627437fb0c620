"""Checkpoints of Megatron-Core's own GPTModel load here, and ours there, saved at one tensor parallel size,
read at another."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.methods import Unscaled
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
    from megatron_ultralong.train import weights_source

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


# ---- models ------------------------------------------------------------------------------------


class _Layout:
    """`with _Layout(tp)`: Megatron's groups; the other ranks are data parallel."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def __enter__(self) -> Any:
        from megatron_ultralong.runtime import launch

        return launch.start(Runtime(device="cpu"), Parallel(tp=self.tp))

    def __exit__(self, *_: object) -> None:
        leave_groups()


def _ours(model: Model, ranks: Any) -> Any:
    from megatron_ultralong.model import llama

    return llama.build(model, ROPE, ranks, Parallel(tp=ranks.tp), Memory(offload="off"), "fp32")[0]


def _gpt(model: Model, ranks: Any, vocabulary: int) -> Any:
    """Megatron-Core's GPTModel of the same shape, from its local spec; its norms know no sequence
    parallelism."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_ultralong.model import llama

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
