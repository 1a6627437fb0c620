"""The script that evaluates a model by the paper's protocol, on the demo's model and small official files:
all but the standard benchmarks and perplexity."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests import benchmark_files as made
from tests import processes
from tests.unit.test_infinitebench import data as infinitebench_files

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "demo" / "base"


def evaluate(path: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "examples" / "evaluate.sh", *arguments],
        env=os.environ | settings | {"PATH": path, "RANKS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_benchmark_is_compared(tmp_path: Path) -> None:
    settings = {
        "OUT": str(tmp_path / "out"),
        "NIAH": "--lengths 256 --trials 1",
        "RULER": "--lengths 512 --samples 1 --own-words --tasks niah_single_1",
        "LVEVAL": f"--data {made.lveval(tmp_path / 'lveval')}",
        "INFINITEBENCH": f"--data {infinitebench_files(tmp_path / 'infinitebench', ('passkey',))}",
        "STANDARD": "",
    }
    with processes.on_path(tmp_path) as path:
        wrong = evaluate(path, str(BASE), "UltraLong-9M", **settings)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: --published UltraLong-9M: unknown;")
        assert not (tmp_path / "out").exists() and wrong.stderr.count("\n") == 1
        run = evaluate(path, str(BASE), "UltraLong-1M", **settings)
    assert run.returncode == 0, run.stderr[-3000:]
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    for heading in ("Passkey", "RULER", "LV-Eval", "InfiniteBench"):
        assert heading in report, report
    assert report.count("| base") >= 3
    lines = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in (tmp_path / "out" / "base" / "published.md").read_text(encoding="utf-8").splitlines()
    }
    assert lines["passkey"].startswith(
        "| passkey | - | 100.00 | published at every length up to 1M, measured at 256; own wording; own grid; "
    )
    assert lines["RULER <1M"] == (
        "| RULER <1M | - | 79.10 | published over lengths up to 1M, measured over 512; 1 of 13 tasks; "
        "1 of 500 samples per task and length; own wording; own word lists |"
    )
    assert "measured over 16K, 128K, 256K; 1 of 11 sets; own wording" in lines["LV-Eval <256K"]
    assert lines["InfiniteBench"].endswith(" | 32.14 | 1 of 12 tasks; own wording |")
    assert lines["average of the five"] == "| average of the five | - | 62.47 | not run |"
    assert "beside the published figures of UltraLong-1M" in run.stdout
