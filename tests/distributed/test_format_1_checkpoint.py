"""Packed rows and a checkpoint in the first format, written by an earlier release, against what it made of
them: tests/golden/README.md."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "golden" / "checkpoint_format_1"
SETTINGS = ["model.hidden_size=8", "model.ffn_size=16", "model.layers=2", "model.heads=2", "model.kv_heads=1"]
SETTINGS += [
    "model.head_dim=4",
    "train.warmup=1",
    "train.global_batch=2",
    "train.seq_length=32",
    "train.log_every=1",
]
SETTINGS += ["train.iterations=4", "runtime.device=cpu", "memory.recompute=all_but_attention"]
LOSSES = {3: (6.984586, 0.543), 4: (6.974432, 0.527)}
"""Iteration -> (loss, gradient norm), as logged by the release that wrote the checkpoint when it resumed."""
VALIDATION = 6.954511
EXPORT_SHA256 = "8152a364eb25cb161b588649819a468eb36a61963852ee331896153e3e783925"
"""Of its export of the checkpoint, model.safetensors."""


def tool(name: str, *arguments: object) -> str:
    done = processes.run([sys.executable, ROOT / "tools" / name, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkpoint_of_format_1_resumes_and_exports_as_it_did(tmp_path):
    shutil.copytree(STORED / "run", tmp_path / "run")
    tool("convert_hf.py", "export", "--load", tmp_path / "run", "--output", tmp_path / "hf")
    assert hashlib.sha256((tmp_path / "hf" / "model.safetensors").read_bytes()).hexdigest() == EXPORT_SHA256

    rows = STORED / "rows" / "rows"
    arguments = [
        "--recipe",
        "tiny",
        "--set",
        *SETTINGS,
        "--data",
        rows,
        "--valid",
        rows,
        "--save",
        tmp_path / "run",
    ]
    log = tool("train.py", *arguments)
    logged = re.findall(r"iteration (\d)/4 .*? lm loss: (\S+) \| grad norm: (\S+)", log)
    assert [int(number) for number, _, _ in logged] == list(LOSSES), log
    for number, loss, norm in logged:
        assert (float(loss), float(norm)) == pytest.approx(LOSSES[int(number)], abs=2e-6), log
    [validation] = re.findall(r"validation loss at iteration 4 \| lm loss value: (\S+)", log)
    assert float(validation) == pytest.approx(VALIDATION, abs=2e-6)
