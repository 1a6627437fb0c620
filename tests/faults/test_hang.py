"""Ranks of one host that hang: one that is stopped, and one that lives but does not go on. The rank is named,
all end, and the run resumes."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_ultralong.runtime import launch
from megatron_ultralong.runtime.heartbeat import Heartbeat
from tests import processes
from tests.train_tool import Tool, saved, write_inputs

LIMIT = 15.0
SETTINGS = ("parallel.cp=2", "train.save_every=3", f"runtime.hang_minutes={LIMIT / 60}")


def read_from_a_disk_that_hangs() -> None:
    threading.Event().wait()


def rank(phase: str, folder: str) -> None:
    """A rank whose iterations are reductions; rank 1 does not come to the one of iteration 20."""
    heartbeat = Heartbeat()
    # In an iteration after 9 s; elsewhere after nine tenths of the timeout, which are 13.5 s.
    heartbeat.start(hang_minutes=0.15, timeout_minutes=0.25)
    heartbeat.prepare_report(Path(folder), lambda: "no checkpoint has been saved")
    launch.join(torch.device("cpu"), 60)
    for iteration in range(1, 100):
        heartbeat.iteration(iteration)
        if iteration == 20:
            if phase:
                heartbeat.phase(phase)
            if torch.distributed.get_rank() == 1:
                if phase == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                read_from_a_disk_that_hangs()
        torch.distributed.all_reduce(torch.zeros(1))
        time.sleep(0.05)


@pytest.mark.parametrize(("phase", "limit"), [("", 9), ("saving iteration 20", 13.5)])
def test_a_rank_that_lives_but_does_not_go_on(tmp_path: Path, phase: str, limit: float) -> None:
    source = f"from tests.faults import test_hang; test_hang.rank({phase!r}, {str(tmp_path)!r})"
    began = time.monotonic()
    told = processes.torchrun([sys.executable, "-c", source], 2, timeout=240)
    assert told.returncode == 1 and time.monotonic() - began > 0.7 * limit
    assert re.search(
        rf"error: rank 1 \(host \S+, process \d+\) is alive, but the others have waited for it for \d+ s: "
        rf"{phase or 'iteration 20'}, \S*threading.py:\d+ \(wait\)",
        told.stderr,
    ), told.stderr
    assert re.search(rf"rank 0: {phase or 'iteration 20'}, torch/distributed/.* \(all_reduce\)", told.stderr)
    assert f"stacks of rank 0-1 are in {tmp_path}/rank_N.txt" in told.stderr
    assert "in read_from_a_disk_that_hangs" in (tmp_path / "rank_1.txt").read_text()


def test_a_stopped_rank(tmp_path: Path) -> None:
    source = f"from tests.faults import test_hang; test_hang.rank('stopped', {str(tmp_path)!r})"
    told = processes.torchrun([sys.executable, "-c", source], 2, timeout=240)
    assert told.returncode == 1
    assert re.search(
        r"error: no sign of life for \d+ s of rank 1 \(host \S+, process \d+\): .*; last seen in "
        r"(iteration \d+|stopped), ",
        told.stderr,
    ), told.stderr
    assert f"stacks of rank 0 are in {tmp_path}/rank_N.txt" in told.stderr
    assert not (tmp_path / "rank_1.txt").exists()


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_resumes(tmp_path: Path) -> None:
    inputs, save = write_inputs(tmp_path), tmp_path / "run"
    with Tool(inputs, save, *SETTINGS, "train.iterations=400", ranks=2, timeout=200) as tool:
        tool.wait_for("saved checkpoint of iteration 3 ")
        everything = psutil.Process(tool.process.pid).children(recursive=True)
        stopped = next(p for p in everything if p.ppid() == tool.process.pid and p.environ()["RANK"] == "1")
        os.kill(stopped.pid, signal.SIGSTOP)
        began = time.monotonic()
        while "error: " not in tool.errors():
            assert time.monotonic() - began < LIMIT + 4, tool.errors()
            time.sleep(0.1)
        assert tool.finish() == 1
        _, left = psutil.wait_procs(everything, timeout=10)
        assert not left
    said = [line for line in tool.errors().splitlines() if line.startswith("[rank 0 on ")]
    said = [line.partition("] ")[2] for line in said]
    start = next(i for i, line in enumerate(said) if line.startswith("error: "))
    error, other, stacks, checkpoint, command = said[start : start + 5]
    assert re.match(
        rf"error: no sign of life for \d+ s of rank 1 \(host \S+, process {stopped.pid}\): ", error
    )
    # It may be stopped where the next save is made whole.
    doing = r"(saving )?iteration \d+, "
    assert re.search(rf"; last seen in {doing}", error) and re.match(rf"rank 0: {doing}", other)
    assert stacks == f"stacks of rank 0 are in {save / 'hang'}/rank_N.txt"
    assert str(saved(save)[-1]) in checkpoint and "checkpoint is" in checkpoint
    assert command.startswith("to resume, run the same command again: ") and f"--save {save}" in command
    # It waits in a forward, a backward, or a reduction.
    assert "megatron_ultralong/train/loop.py" in (save / "hang" / "rank_0.txt").read_text()
    # torchrun's report, which names the first rank that fails, repeats the line.
    assert tool.errors().count("error: no sign of life") == 2

    before = {n: line["loss"] for n, line in tool.iterations().items()}
    with Tool(inputs, save, *SETTINGS, f"train.iterations={max(before) + 2}", ranks=2, timeout=200) as again:
        assert again.finish() == 0, again.errors()
    after = {n: line["loss"] for n, line in again.iterations().items()}
    assert min(after) == saved(save)[0] + 1 or min(after) <= max(before) + 1
    assert all(after[n] == before[n] for n in set(after) & set(before))
