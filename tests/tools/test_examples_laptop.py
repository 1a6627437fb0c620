"""The stages that the laptop's and the cluster's scripts share, at a very small size and on one rank: every
stage runs, and nothing is repeated when the script is started again."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests import processes

ROOT = Path(__file__).parents[2]
TORCHRUN = '#!/bin/bash\nexec python "${@:4}"\n'
"""Starts one rank instead of --standalone --nproc-per-node 2."""


def run(path: str, runs: Path) -> str:
    settings = {
        "PATH": path,
        "RUNS": str(runs),
        "DOCUMENTS": "2",
        "CONVERSATIONS": "4",
        "LENGTHS": "512",
        "SETTINGS": "train.seq_length=1K train.iterations=1 train.warmup=0 train.global_batch=2 parallel.cp=1",
    }
    done = subprocess.run(
        ["bash", ROOT / "examples" / "laptop.sh"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pipeline(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    with processes.on_path(tmp_path) as path:
        first = run(path, tmp_path / "runs")
        again = run(path, tmp_path / "runs")
    assert [line[3] for line in first.splitlines() if line.startswith("== ")] == list("12345")
    assert first.count("lm loss:") == 2 and "lm loss:" not in again
    for name in ("pretrain", "sft"):
        assert (tmp_path / "runs" / name / "iter_0000001").is_dir()
    assert (tmp_path / "runs" / "hf" / "chat_template.jinja").is_file()
    tables = r"## Passkey .*\n\n.*\n.*\n\| before \| .*\n\| after \| [\s\S]*## Perplexity .*\n\n.*\n.*\n\| before \| .*\n\| after \| "
    for output in (first, again):
        assert re.search(tables, output), output
    assert again.count("written") == 1  # the report
