"""SmolLM2-135M-Instruct, a real Llama (9 heads over 3 KV heads, tied embeddings), from its files to an answer
after training.

One spawn of two ranks reads it in place, converts it and trains it; the tests look at what it left.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.smollm2 import ask
from megatron_ultralong import recipes, shapes
from megatron_ultralong.checkpoint import convert, run_directory, training_state
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import weight_files
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Parallel, Run
from megatron_ultralong.model import weight_mapping
from tests.parity.conftest import BASE
from tests.spawn import run_ranks
from tests.text import write_rows

pytestmark = pytest.mark.slow

LAYOUTS = {"dp2": Parallel(), "pp2": Parallel(pp=2), "cp2": Parallel(cp=2)}
COMPARED = (("dp2", "base"), ("dp2", "yarn"), ("pp2", "base"), ("cp2", "yarn"))
S = 192
"""Tokens of the logits that are compared."""
WRITTEN = 12
"""Tokens that are written after them."""
# The recipe's YaRN by factor 8, in transformers' words.
YARN = {
    "rope_type": "llama3",
    "rope_theta": 100000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tokens_of_text(tokens: int) -> list[int]:
    """The first so many tokens of a long English text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)(topics["specialnames"][: tokens * 8])["input_ids"][:tokens]


def settled(*settings: str) -> Run:
    """The recipe as it runs here."""
    return override(
        recipes.smollm2_135m(),
        ["rope.factor=8", "train.precision=fp32", "memory.offload=off", "runtime.device=cpu", *settings],
    )


@pytest.fixture(scope="module")
def left(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the ranks left."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = tmp_path_factory.mktemp("smollm2")
    tokens = torch.tensor([tokens_of_text(S)])
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = {}
    with torch.no_grad():
        reference["base"] = model(tokens).logits
        reference["written"] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=WRITTEN, do_sample=False
        )[0, S:]
        model.config.rope_parameters = YARN
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        reference["yarn"] = model(tokens).logits
    # Or the comparison would not notice which of the two RoPEs is in use.
    assert (reference["base"] - reference["yarn"]).abs().max() > 1
    torch.save((tokens, reference), folder / "reference.pt")
    write_rows(folder / "rows", [tokens_of_text(513)])
    run_ranks(_ranks, 2, folder)
    return folder


# ---- on two ranks ------------------------------------------------------------------------------


def _ranks(rank: int, world: int, folder: Path) -> None:
    from megatron.core import parallel_state

    from megatron_ultralong.runtime import launch

    tokens, reference = torch.load(folder / "reference.pt")
    errors: dict[str, list[float]] = {}
    for name, rope in COMPARED:
        errors[f"{name} {rope}"] = _logit_errors(
            folder, LAYOUTS[name], tokens, reference[rope], yarn=rope == "yarn"
        )
    (folder / f"errors{rank}.json").write_text(json.dumps(errors))

    for name in ("cp2", "pp2"):
        written = _written(tokens[0].tolist(), LAYOUTS[name])
        if written is not None:
            (folder / f"written_{name}.json").write_text(json.dumps(written))

    ranks = launch.start(settled().runtime, LAYOUTS["pp2"])
    convert.import_hf(BASE, folder / "imported", ranks, LAYOUTS["pp2"])
    convert.export_hf(folder / "imported", folder / "exported", ranks, LAYOUTS["pp2"])
    different = convert.verify(BASE, folder / "imported", ranks, LAYOUTS["pp2"])
    (folder / f"verify{rank}.json").write_text(json.dumps(different))
    parallel_state.destroy_model_parallel()

    _train(folder)
    ranks = launch.start(settled().runtime, LAYOUTS["pp2"])
    convert.export_hf(folder / "trained", folder / "trained_hf", ranks, LAYOUTS["pp2"])
    parallel_state.destroy_model_parallel()


def _logit_errors(
    folder: Path, parallel: Parallel, tokens: torch.Tensor, logits: torch.Tensor, *, yarn: bool
) -> list[float]:
    """Largest absolute and overall relative difference of this rank's logits; empty where it has none.

    The weights are found and read as `train.py --load-hf` does.
    """
    from megatron.core import parallel_state

    from megatron_ultralong.context_parallel import zigzag
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train import weights_source

    run = replace(settled(f"train.seq_length={S}"), parallel=parallel)
    run, source = weights_source.find(run if yarn else replace(run, rope=None), folder / "none", None, BASE)
    ranks = launch.start(run.runtime, parallel)
    [chunk] = llama.build(
        source.state.model, source.state.rope, ranks, parallel, run.memory, run.train.precision
    )
    weights_source.load_weights([chunk], run, source, ranks)
    mine = zigzag.shard(tokens, ranks.cp_rank, ranks.cp, 1)
    errors = []
    with torch.no_grad():
        if ranks.pp_rank > 0:
            hidden = torch.empty(mine.shape[1], 1, source.state.model.hidden_size)  # [s, b, H]
            torch.distributed.recv(hidden, group=ranks.groups.pp, group_src=ranks.pp_rank - 1)
            chunk.set_input_tensor(hidden)
        out = chunk(mine)
        if ranks.pp_rank < ranks.pp - 1:
            torch.distributed.send(out.contiguous(), group=ranks.groups.pp, group_dst=ranks.pp_rank + 1)
        else:
            want = zigzag.shard(logits, ranks.cp_rank, ranks.cp, 1)
            errors = [float((out - want).abs().max()), float((out - want).norm() / want.norm())]
    parallel_state.destroy_model_parallel()
    return errors


def _written(prompt: list[int], parallel: Parallel) -> list[list[int]] | None:
    """What our own model writes, read in chunks that leave a rest; on rank 0."""
    from megatron.core import parallel_state

    from megatron_ultralong.evaluate.backends.parallel_model import ParallelModel
    from megatron_ultralong.evaluate.backends.protocol import GenerationRequest
    from megatron_ultralong.runtime import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "stop", parallel_state.destroy_model_parallel)  # the ranks stay
        backend = ParallelModel(path=BASE, parallel=replace(parallel, dp=1), device="cpu", chunk=50)
        if not backend.ranks.is_main:
            return backend.follow()
        written = backend._together("generate", [prompt], [WRITTEN], [()])
        [(score, greedy)] = backend.loglikelihood([(prompt, written[0])])
        assert greedy and score < 0
        whole, stop = (backend.tokenizer.decode(tokens) for tokens in (written[0], written[0][4:6]))
        [(_, one)] = backend.generate(
            [GenerationRequest(id="x", ids=prompt, max_tokens=WRITTEN, stop=(stop,))]
        )
        assert (
            one.finish == "stop"
            and one.text == whole[: whole.index(stop)]
            and one.tokens_in == S
            and one.tokens_out <= 6
        )
        backend.close()
        return written


def _train(folder: Path) -> None:
    """Two steps and a held-out loss, all on one row of 512 tokens: three losses of the same tokens."""
    from megatron.core import parallel_state

    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train.run import RunFiles, train_run

    run = settled(
        "parallel.cp=2",
        "memory.recompute=none",
        "memory.loss_chunk=256",
        "train.seq_length=512",
        "train.global_batch=1",
        "train.iterations=2",
        "train.warmup=0",
    )
    rows = [str(folder / "rows")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "stop", parallel_state.destroy_model_parallel)  # the ranks stay
        train_run(run, RunFiles(data=rows, valid=rows, save=folder / "trained", load_hf=BASE))


# ---- what it must have left --------------------------------------------------------------------


def test_tokenizer_of_the_wheel(base: Path) -> None:
    """GGUF does not say how text is cut: as published, each digit is cut off alone, before white space is put
    to words."""
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(base).tokenize("x\n  12 345") == [
        "x",
        "ĊĠĠ",
        "1",
        "2",
        "Ġ",
        "3",
        "4",
        "5",
    ]


def test_logits_equal_transformers(left: Path) -> None:
    """Logits reach 41; transformers' own in float32 are 6e-5 from those in float64."""
    found = [json.loads((left / f"errors{rank}.json").read_text()) for rank in range(2)]
    for name, rope in COMPARED:
        errors = [ranks[f"{name} {rope}"] for ranks in found]
        assert [bool(error) for error in errors] == [name != "pp2", True]
        for largest, relative in filter(None, errors):
            assert largest < 1e-4 and relative < 3e-6, (name, rope, errors)


def test_own_generation_equals_transformers(left: Path) -> None:
    _, reference = torch.load(left / "reference.pt")
    want = reference["written"].tolist()
    assert len(set(want)) > 3, "no repetition of one token, which any model writes"
    for name in ("cp2", "pp2"):
        assert json.loads((left / f"written_{name}.json").read_text()) == [want], name


def test_conversion_is_exact(base: Path, left: Path) -> None:
    before, after = load_file(base / weight_files.SINGLE), load_file(left / "exported" / weight_files.SINGLE)
    assert (
        before.keys() == after.keys() == weight_mapping.hf_shapes(shapes.SMOLLM2_135M).keys()
        and len(before) == 272
    )
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.float32 and torch.equal(tensor, after[name]), name
    assert (
        json.loads((left / "verify0.json").read_text())
        == json.loads((left / "verify1.json").read_text())
        == []
    )
    assert (
        hf_config.read_config(left / "exported").model
        == hf_config.read_config(base).model
        == shapes.SMOLLM2_135M
    )


def test_loss_falls(left: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board: Any = EventAccumulator(str(left / "trained" / "tensorboard")).Reload()
    losses = [event.value for name in ("train/loss", "valid/loss") for event in board.Scalars(name)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] > 1, losses
    progress = training_state.read(run_directory.resolve(left / "trained"))
    assert progress.iteration == 2 and progress.tokens == 1024


def test_export_answers_in_transformers(base: Path, left: Path) -> None:
    trained = left / "trained_hf"
    found = hf_config.read_config(trained)
    assert found.max_position == 65536 and found.raw["rope_scaling"]["factor"] == 8.0
    assert not torch.equal(
        load_file(trained / weight_files.SINGLE)["model.norm.weight"],
        load_file(base / weight_files.SINGLE)["model.norm.weight"],
    )
    for name in ("LICENSE", "chat_template.jinja"):
        assert (trained / name).read_bytes() == (base / name).read_bytes(), name
    assert "license: apache-2.0" in (trained / "README.md").read_text(encoding="utf-8")
    assert "Paris" in ask.answer(trained, "What is the capital of France?", tokens=12)
