"""run.json: both format versions are read, and what is written is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong import config
from megatron_ultralong.checkpoint import training_state
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Data, Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import Unscaled, YaRN

# As releases with format 1 wrote it.
FORMAT_1: dict[str, Any] = {
    "format": 1,
    "model": {
        "hidden_size": 32,
        "ffn_size": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "norm_eps": 1e-05,
        "tied_embeddings": False,
        "init_std": 0.02,
    },
    "rope": {
        "type": "yarn",
        "theta": 10000.0,
        "factor": 4.0,
        "original_length": 16,
        "alpha": 1.0,
        "beta": 4.0,
        "ramp": "rotation",
        "temperature": False,
        "attention_factor": None,
        "truncate": True,
    },
    "iteration": 7,
    "consumed": 56,
    "tokens": 3584,
    "run": {
        "name": "tiny",
        "notes": "",
        "base": "",
        "model": None,
        "rope": None,
        "parallel": {
            "tp": 1,
            "pp": 1,
            "vpp": 1,
            "cp": 2,
            "ulysses": 1,
            "cp_way": "gather",
            "dp": None,
        },
        "memory": {
            "checkpoint": "attention",
            "offload": "checkpoints",
            "query_chunks": False,
            "layer_chunk": 16384,
            "loss_chunk": 8192,
        },
        "data": {"shuffle": True, "workers": 0, "documents": "joined", "positions": "row"},
        "optim": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-08, "weight_decay": 0.1, "clip": 1.0},
        "train": {
            "seq_length": 64,
            "micro_batch": 1,
            "global_batch": 8,
            "iterations": 7,
            "lr": 0.001,
            "min_lr": 0.0,
            "schedule": "cosine",
            "warmup": 0,
            "precision": "bf16",
            "save_every": 100,
            "keep": 2,
            "eval_every": 0,
            "eval_rows": 64,
            "log_every": 1,
            "z_loss": 0.0,
            "seed": 1234,
            "deterministic": False,
        },
        "runtime": {"device": "auto", "timeout_minutes": 60, "wandb": None},
    },
    "max_length": 64,
    "data": {"seed": 1234, "shuffle": True, "sets": [["abc", "1"]]},
    "base": "someone/base",
}
RUN = Run(
    name="tiny",
    parallel=Parallel(cp=2, cp_comm_type="all_gather"),
    memory=Memory(recompute="all_but_attention", offload="layer_inputs"),
    data=Data(),
    optim=Optim(),
    train=Train(seq_length=64, iterations=7, lr=1e-3),
    runtime=Runtime(),
)


def write(folder: Path, values: Any) -> Path:
    (folder / "run.json").write_text(json.dumps(values))
    return folder


def test_format_1_is_read(tmp_path: Path) -> None:
    state = training_state.read(write(tmp_path, FORMAT_1))
    assert state.model == Model(
        hidden_size=32, ffn_size=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab_size=61
    )
    assert state.rope == YaRN(theta=10000.0, factor=4.0, original_length=16)
    assert (state.iteration, state.consumed, state.tokens, state.max_length) == (7, 56, 3584, 64)
    assert state.base == "someone/base" and state.data == FORMAT_1["data"]
    assert state.stored_run() == RUN


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    model = Model(**FORMAT_1["model"])
    state = TrainingState(model=model, rope=Unscaled(), iteration=3, run=config.to_dict(RUN), base="é")
    training_state.write(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["format"] == 2
    assert training_state.read(tmp_path) == state and state.stored_run() == RUN
    assert TrainingState(model=model, rope=Unscaled()).stored_run() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**FORMAT_1, "format": 3}, r"unsupported format version 3 \(expected 1 or 2\); use the release"),
        ({"model": {}}, r"unsupported format version None"),
        ([1], "run.json cannot be read: it is not a JSON object"),
    ],
)
def test_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_state.read(write(tmp_path, values))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run.json is missing: not a checkpoint of this program"):
        training_state.read(tmp_path)
