"""tools/search_rope.py on the demo's base model, and training with what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Run, Train
from megatron_ultralong.rope.methods import LongRoPE
from tests import processes

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_search(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text((ROOT / "README.md").read_text() * 4)
    command = [
        sys.executable,
        ROOT / "tools" / "search_rope.py",
        "--model",
        ROOT / "examples" / "demo" / "base",
    ]
    command += ["--data", tmp_path / "book.txt", "--seq-length", "1K", "--samples", "1", "--population", "4"]
    command += ["--parents", "2", "--mutations", "2", "--crossovers", "1", "--rounds", "2", "--device", "cpu"]
    command += ["--output", tmp_path / "factors.json"]
    done = processes.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = [float(line.split()[-1]) for line in lines if line.startswith("perplexity with the factors of ")]
    rounds = [float(line.split()[-1]) for line in lines if line.startswith("round ")]
    assert len(start) == len(rounds) == 3 and rounds == sorted(rounds, reverse=True)
    assert rounds[0] <= min(start) and len(set(start)) == 3, "factors act on the model"
    factors = json.loads((tmp_path / "factors.json").read_text())
    run = Run(name="x", train=Train(seq_length=1024, iterations=1, lr=1.0))
    rope = override(run, ["rope.type=longrope", f"rope.factors={tmp_path}/factors.json"]).rope
    assert isinstance(rope, LongRoPE) and list(rope.factors) == factors
    measured = len((tmp_path / "factors.losses.jsonl").read_text().splitlines()) - 1
    again = processes.run(command, capture_output=True)
    assert again.stdout.splitlines() == [f"resumes with {measured} measured candidates", *lines]

    short = processes.run([*command[:-1], tmp_path / "other.json", "--samples", "2"], capture_output=True)
    assert short.returncode == 2 and short.stderr.startswith(
        "error: --data: only 1 documents have more than 1024"
    )
