"""A stage that starts with the optimizer of the one before (train.load_optimizer)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from tests import processes
from tests.text import write_rows

ROOT = Path(__file__).parents[2]
MODEL = ("hidden_size=32", "ffn_size=48", "layers=1", "heads=2", "kv_heads=1", "head_dim=16", "vocab_size=61")
SETTINGS = (
    *(f"model.{setting}" for setting in MODEL),
    "train.seq_length=32",
    "train.global_batch=2",
    "train.warmup=0",
    "train.schedule=constant",
    "train.lr=1e-2",
    "train.log_every=1",
)


def train(folder: Path, save: str, *arguments: object, settings: tuple[str, ...] = ()) -> Any:
    command = [sys.executable, ROOT / "tools" / "train.py", "--recipe", "tiny", "--data", folder / "rows"]
    command += ["--save", folder / save, *arguments, "--set", *SETTINGS, *settings]
    return processes.run(command, capture_output=True)


def losses(done: Any) -> list[float]:
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"lm loss: (\S+)", done.stdout)]


def stored(folder: Path, save: str, iterations: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the optimizer's parameter groups of a checkpoint."""
    place = folder / save / f"iter_{iterations:07d}"
    common = dist_checkpointing.load_common_state_dict(str(place))
    return json.loads((place / "run.json").read_text()), common["optimizer"]["optimizer"]["param_groups"]


@pytest.mark.slow
def test_stage_with_the_optimizer_of_the_one_before(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    write_rows(tmp_path / "rows", torch.randint(0, 61, (64, 33), generator=generator).tolist())
    losses(train(tmp_path, "first", settings=("train.iterations=3",)))
    new = ("train.iterations=2", "optim.beta2=0.99", "optim.weight_decay=0.3", "train.seed=5")
    load = ("--load", tmp_path / "first")
    with_state = losses(train(tmp_path, "with", *load, settings=(*new, "train.load_optimizer=true")))
    without = losses(train(tmp_path, "without", *load, settings=new))
    # The same weights, so the first loss is the same; moments change the first step.
    assert len(with_state) == 2 and with_state[0] == without[0] and with_state[1] != without[1]
    for save, steps in (("with", 5), ("without", 2)):
        state, groups = stored(tmp_path, save, 2)
        assert state["iteration"] == 2 and state["consumed"] == 4
        # Step counts go on; everything else is this run's.
        assert {int(group["step"]) for group in groups} == {steps}
        assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.99)}
        assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    # A changed optimizer setting holds when resuming as well.
    more = ("train.iterations=3", "optim.beta2=0.9", "train.load_optimizer=true", "train.seed=5")
    assert len(losses(train(tmp_path, "with", *load, settings=more))) == 1
    assert {tuple(group["betas"]) for group in stored(tmp_path, "with", 3)[1]} == {(0.9, 0.9)}

    refused = train(tmp_path, "refused", settings=("train.iterations=2", "train.load_optimizer=true"))
    assert refused.returncode == 2 and refused.stderr == (
        "error: train.load_optimizer=true takes the optimizer from a checkpoint: give --load CKPT, or set "
        "train.load_optimizer=false to start with a new one\n"
    )
    assert not (tmp_path / "refused").exists()
