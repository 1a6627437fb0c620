"""A rank that is stopped for good, in the middle of a step, is named by the others; all end, and the run
resumes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

from tests.train_tool import Tool, write_inputs

LIMIT = 15.0
SETTINGS = (
    "parallel.cp=2",
    "train.iterations=400",
    "train.save_every=5",
    f"runtime.hang_minutes={LIMIT / 60}",
)


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    inputs, save = write_inputs(tmp_path), tmp_path / "run"
    with Tool(inputs, save, *SETTINGS, ranks=2, timeout=120) as tool:
        tool.wait_for("] iteration   7/400")
        everything = psutil.Process(tool.process.pid).children(recursive=True)
        (stopped,) = (
            p for p in everything if p.environ().get("RANK") == "1" and p.ppid() == tool.process.pid
        )
        os.kill(stopped.pid, signal.SIGSTOP)
        began = time.monotonic()
        code = tool.finish()
        took = time.monotonic() - began
        print(tool.errors(), tool.lines[-3:], took)
        assert code == 1
        _, left = psutil.wait_procs(everything, timeout=5)
        assert not left
