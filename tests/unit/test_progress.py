"""Progress of long work: lines in log files, a bar on a terminal, and only of the first rank."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from megatron_ultralong.io import progress
from megatron_ultralong.io.progress import LineProgress, counted, progress_bar

CODE = """
import sys
from megatron_ultralong.io.progress import progress_bar
with progress_bar("reading", 4, "tensor") as bar:
    for _ in range(4):
        bar.update(1)
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_has_a_line_a_minute(clock, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with progress_bar("reading", 1000, "tensor", initial=200) as bar:
        assert isinstance(bar, LineProgress)
        for step in range(800):
            clock[0] += 0.2  # 160 s
            bar.update(1)
            if step == 400:
                bar.set_postfix(rejected=3, refresh=False)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 500 of 1,000 tensors (50%), 0:01:00 elapsed, 0:01:40 left",
        "reading: 800 of 1,000 tensors (80%), 0:02:00 elapsed, 0:00:40 left, rejected 3",
        "reading: 1,000 of 1,000 tensors (100%), 0:02:40 elapsed, rejected 3",
    ]
    with progress_bar("searching", 5_000_000, "B") as bar:
        clock[0] += 61
        bar.update(2_500_000)
        bar.write("a line")
    out = capsys.readouterr()
    assert (
        out.err == "searching: 2.5 of 5.0 MB (50%), 0:01:01 elapsed, 0:01:01 left\n" and out.out == "a line\n"
    )
    # Short work, and work of other ranks, has no lines; neither has hidden work.
    assert list(counted([1, 2], "packing", "row")) == [1, 2]
    for hidden, rank in ((True, "0"), (False, "1")):
        monkeypatch.setenv("RANK", rank)
        with progress_bar("reading", 2, hidden=hidden) as bar:
            clock[0] += 100
            bar.update(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")

    def slow():
        for item in "ab":
            clock[0] += 100
            yield item

    assert list(counted(slow(), "reading", "it")) == ["a", "b"]  # the number of items is not known
    assert capsys.readouterr().err.splitlines()[-1] == "reading: 2 iterations, 0:03:20 elapsed"


def test_only_the_first_rank_draws_on_a_terminal():
    """Two ranks of torchrun with one terminal, as RankLines of runtime/cli.py leaves it to them."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    ranks = [
        subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs, env={**os.environ, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    os.close(theirs)
    shown, end = b"", time.monotonic() + 10
    while time.monotonic() < end:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal that nobody has open
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert shown.count(b"4/4") == 1 and b"reading: 100%" in shown
