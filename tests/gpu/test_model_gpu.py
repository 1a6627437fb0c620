"""The model and tools/train.py on one GPU over NCCL in bf16, against transformers in float32;
TransformerEngine's parts against ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ultralong.checkpoint import run_directory, saving, sharded
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import reader as hf_reader
from megatron_ultralong.config import Memory, Model, Parallel, Runtime
from tests.text import write_rows
from tests.tiny import LLAMA3, hf_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROOT = Path(__file__).parents[2]
MODEL = Model(hidden_size=256, ffn_size=512, layers=4, heads=4, kv_heads=2, head_dim=64, vocab_size=512)
S = 512


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hf_model(MODEL, LLAMA3).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_training_in_bf16_over_nccl(base: Path, tmp_path: Path) -> None:
    """First loss as transformers has it in float32; the loss falls; a resume goes on as if it had not
    stopped."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, MODEL.vocab_size, (8, S + 1), generator=generator)
    data = write_rows(tmp_path / "rows", rows.tolist())
    whole = _train(base, data, tmp_path / "whole", 12)
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        want = float(reference(rows, labels=rows).loss)
    first = _train(base, data, tmp_path / "parts", 12, "train.save_every=6", stop=6)
    second = _train(base, data, tmp_path / "parts", 12, "train.save_every=6")
    assert len(first + second) == len(whole) == 12
    check_losses(whole, first + second, want)


def check_losses(whole: list[float], resumed: list[float], first: float) -> None:
    assert abs(whole[0] - first) < 1e-2 * first
    assert whole[-1] < whole[0] - 0.2
    assert resumed == whole


def near_in_norm(x: torch.Tensor, y: torch.Tensor, tolerance: float, what: object) -> None:
    assert (x - y).norm() < tolerance * y.norm(), what


def _train(
    base: Path, data: str, save: Path, iterations: int, *settings: str, stop: int | None = None
) -> list[float]:
    """Losses of the iterations that ran; `stop` removes what was saved after that iteration, as if the run
    had ended there."""
    command = [
        sys.executable,
        "tools/train.py",
        "--recipe",
        "smollm2_135m",
        "--set",
        "runtime.device=cuda",
        f"train.seq_length={S}",
        "train.global_batch=8",
        f"train.iterations={iterations}",
        "train.warmup=2",
        "train.lr=1e-3",
        "train.deterministic=true",
        "rope.factor=16",
        "rope.original_length=32",
        "rope.theta=10000",
        "train.keep=0",
        *settings,
        "--load-hf",
        str(base),
        "--data",
        data,
        "--save",
        str(save),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(value) for value in re.findall(r"iteration +\d+/\d+ .*? lm loss: (\S+)", done.stdout)]
    if stop is None:
        return losses
    import shutil

    for path in run_directory.complete_checkpoints(save):
        if int(path.name[5:]) > stop:
            shutil.rmtree(path)
    return losses[:stop]


def test_transformer_engine_equals_ours(base: Path, tmp_path: Path) -> None:
    """Logits with TransformerEngine's linears and norms equal those with Megatron's; a checkpoint of one
    loads in the other."""
    pytest.importorskip("transformer_engine")
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cuda"), Parallel())
    try:
        found = hf_config.read_config(base)
        built = {
            te: llama.build(
                found.model,
                found.rope,
                ranks,
                Parallel(),
                Memory(recompute="none", offload="off"),
                "bf16",
                transformer_engine=te,
            )
            for te in (True, False)
        }
        for chunks in built.values():
            hf_reader.load_parameters(base, found.model, llama.named_parameters(chunks[0]), 0, 1)
        tokens = torch.randint(0, MODEL.vocab_size, (2, S), device="cuda")
        with torch.no_grad():
            ours, theirs = (built[te][0](tokens).float() for te in (False, True))
        assert (ours - theirs).abs().max() < 2e-2 * ours.abs().max()
        from megatron_ultralong.checkpoint.training_state import TrainingState

        for te in (True, False):
            optimizer = None
            saved = saving.save(
                tmp_path / str(te),
                TrainingState(model=found.model, rope=found.rope),
                built[te],
                optimizer,
            )
            sharded.load(saved, built[not te])
    finally:
        launch.stop()


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_memory_settings_give_the_same_gradients(base: Path, transformer_engine: bool) -> None:
    """The layer checkpoint in chunks, and what it keeps on its way to host memory and back, over several
    steps and micro-batches."""
    if transformer_engine:
        pytest.importorskip("transformer_engine")
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cuda"), Parallel())
    try:
        found = hf_config.read_config(base)
        tokens = torch.randint(
            0,
            MODEL.vocab_size,
            (2, 4 * S + 1),
            device="cuda",
            generator=torch.Generator("cuda").manual_seed(0),
        )
        grads: dict[str, dict[str, torch.Tensor]] = {}
        settings = {
            "none": Memory(recompute="none", offload="off"),
            "kept": Memory(offload="off", layer_chunk=300),
            "offloaded": Memory(offload="all", layer_chunk=300),
            "inputs offloaded": Memory(offload="layer_inputs"),
            "query chunks": Memory(offload="all", query_chunks=True, layer_chunk=300),
        }
        for name, memory in settings.items():
            (chunk,) = llama.build(
                found.model,
                found.rope,
                ranks,
                Parallel(),
                memory,
                "bf16",
                transformer_engine=transformer_engine,
            )
            hf_reader.load_parameters(base, found.model, llama.named_parameters(chunk), 0, 1)
            for _ in range(3):
                losses = [
                    chunk(tokens[i : i + 1, :-1], tokens[i : i + 1, 1:], torch.ones(1, 4 * S, device="cuda"))
                    for i in range(2)
                ]
                for loss in losses:
                    loss.backward()
            grads[name] = {n: p.grad.clone().float() for n, p in llama.named_parameters(chunk).items()}
        for name, found_grads in grads.items():
            for parameter, grad in found_grads.items():
                near_in_norm(grad, grads["none"][parameter], 2e-2, (name, parameter))
    finally:
        launch.stop()
