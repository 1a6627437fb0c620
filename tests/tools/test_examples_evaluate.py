"""The script that refills the paper's tables, on the demo's model and small files: all but the standard
benchmarks, and the report."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests import benchmark_files as made
from tests import processes
from tests.text import write_jsonl
from tests.unit.test_infinitebench import data as infinitebench_files

ROOT = Path(__file__).parents[2]


def test_every_table_is_filled(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "books.jsonl", ["The grass is green. The pass key of Ada is 12345. " * 60])
    settings = {
        "MODELS": ROOT / "examples" / "demo" / "base",
        "OUT": tmp_path / "out",
        "RANKS": 1,
        "NIAH": "256",
        "TRIALS": 1,
        "RULER": "512",
        "SAMPLES": 1,
        "LVEVAL": made.lveval(tmp_path / "lveval"),
        "INFINITEBENCH": infinitebench_files(tmp_path / "infinitebench", ("passkey",)),
        "STANDARD": "",
        "BOOKS": tmp_path / "books.jsonl",
        "PERPLEXITY": "300",
        "RULER_FILES": "--own-words --tasks niah_single_1",
    }
    env = os.environ | {name: str(value) for name, value in settings.items()}
    with processes.on_path(tmp_path) as path:
        run = subprocess.run(
            ["bash", ROOT / "examples" / "evaluate.sh"],
            env=env | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    for heading in ("Passkey", "RULER", "LV-Eval", "InfiniteBench", "erplexity"):
        assert heading in report, report
    assert report.count("| base") >= 3
