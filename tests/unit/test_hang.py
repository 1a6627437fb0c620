"""Which rank is hung: beats as literal data, a clock of the test."""

from __future__ import annotations

import dataclasses
import io
import os
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from megatron_ultralong.config import Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli, hang_report, heartbeat
from megatron_ultralong.runtime.hang_detection import Beat, Hang, Monitor, behind, period_of, step_limit
from megatron_ultralong.runtime.heartbeat import Heartbeat

LIMIT, TIMEOUT, PERIOD = 300.0, 3600.0, 5.0


class Ranks:
    """Ranks that beat every period, and a monitor that reads them at every period of its own clock."""

    def __init__(self, world: int = 4) -> None:
        self.monitor = Monitor(world, LIMIT, TIMEOUT, PERIOD)
        self.beats = {r: Beat(number=0, host=f"h{r // 2}", pid=100 + r) for r in range(world)}
        self.now = 1000.0

    def set(self, *ranks: int, **values: object) -> None:
        for rank in ranks or self.beats:
            self.beats[rank] = dataclasses.replace(self.beats[rank], **values)

    def run(
        self, seconds: float, stopped: tuple[int, ...] = (), *, moving: bool = False, gap: float = PERIOD
    ) -> Hang | None:
        """Let time go by, in which all ranks beat but those; return the first hang that is seen. gap: seconds
        between two reads."""
        for _ in range(round(seconds / gap)):
            self.now += gap
            for rank, beat in self.beats.items():
                if rank not in stopped:
                    self.set(rank, number=beat.number + 1, moves=beat.moves + moving)
            hang = self.monitor.see(self.beats, self.now)
            if hang is not None:
                return hang
        return None


def test_a_silent_rank_is_named_within_the_limit() -> None:
    ranks = Ranks()
    assert ranks.run(600, moving=True) is None
    began = ranks.now
    hang = ranks.run(LIMIT, stopped=(3,))
    assert hang is not None and (hang.kind, hang.ranks, hang.silent) == ("silent", (3,), (3,))
    # In time to write the report, and not much before.
    assert LIMIT - 4 * PERIOD <= ranks.now - began <= LIMIT - 2 * PERIOD
    assert Hang.decode(hang.encode()) == hang


def test_the_first_to_fall_silent_is_named_first_and_later_ones_not_yet() -> None:
    ranks = Ranks()
    ranks.run(10)
    assert ranks.run(100, stopped=(2,)) is None
    hang = ranks.run(LIMIT, stopped=(1, 2))
    assert hang is not None and hang.ranks == (2,) and hang.silent == (1, 2)


def test_what_recovers_is_no_hang() -> None:
    ranks = Ranks()
    ranks.run(10)
    for _ in range(5):
        assert ranks.run(LIMIT - 30, stopped=(2, 3)) is None
        assert ranks.run(10) is None


def test_a_pause_of_the_store_or_of_this_rank_is_not_the_silence_of_others() -> None:
    ranks = Ranks()
    ranks.run(60)
    ranks.now += 10 * LIMIT
    assert ranks.monitor.see(ranks.beats, ranks.now) is None  # what was written before the pause
    assert ranks.run(60) is None
    assert ranks.run(20 * LIMIT, stopped=(1,), gap=10 * LIMIT) is None
    assert ranks.run(LIMIT, stopped=(1,)) is not None  # it counts again from here


def test_a_rank_that_has_left_may_be_silent() -> None:
    ranks = Ranks()
    ranks.run(10)
    ranks.set(0, left=True)
    assert ranks.run(3 * LIMIT, stopped=(0,)) is None
    assert ranks.run(3 * LIMIT, stopped=(0, 1)) is not None


def test_a_rank_that_never_starts() -> None:
    ranks = Ranks()
    beats = ranks.beats
    ranks.beats = {}
    assert ranks.run(0.9 * TIMEOUT - 10) is None and not ranks.monitor.start_expected
    ranks.beats = {rank: beats[rank] for rank in (0, 1, 3)}
    hang = ranks.run(20)
    assert hang is not None and (hang.kind, hang.ranks) == ("not started", (2,))
    (said, _) = hang_report.lines(hang, ranks.beats, ranks.monitor.silence, {})
    assert said == f"error: rank 2 has not started, {hang.seconds:.0f} s after the others"


@pytest.mark.parametrize(
    ("moves", "waiting", "blamed"),
    [
        ((7, 7, 6, 7), (0, 0, 0, 0), (2,)),  # the others are in a later phase
        ((7, 7, 7, 7), (250, 250, 0, 250), (2,)),  # the others wait for ranks
        ((7, 7, 7, 7), (0, 0, 0, 0), ()),
        ((7, 7, 7, 7), (250, 250, 250, 250), ()),
    ],
)
def test_no_progress_although_all_live(
    moves: tuple[int, ...], waiting: tuple[float, ...], blamed: tuple[int, ...]
) -> None:
    ranks = Ranks()
    for rank in range(4):
        ranks.set(rank, moves=moves[rank], phase="iteration 7", limit=900.0, waiting=waiting[rank])
    began = ranks.now
    hang = ranks.run(900)
    assert hang is not None and (hang.kind, hang.ranks, hang.silent) == ("no progress", blamed, ())
    assert ranks.now - began == pytest.approx(900, abs=4 * PERIOD)
    (first, *_) = hang_report.lines(hang, ranks.beats, ranks.monitor.silence, {})
    assert (
        "rank 2 (host h1, process 102) is alive, but the others have waited for it" in first
        if blamed
        else "all ranks are alive, but none has made progress" in first
    )


def test_slow_steps_and_phases_without_a_usual_duration() -> None:
    ranks = Ranks()
    ranks.set(limit=2000.0, phase="iteration 7")
    assert ranks.run(1900) is None
    ranks.set(2, moves=1)
    assert ranks.run(1900) is None
    # One of them saves: nobody knows how long that takes.
    ranks.set(1, moves=2, limit=None, phase="saving iteration 7")
    assert ranks.run(10 * TIMEOUT) is None


def test_a_wait_that_its_timeout_would_end_is_a_hang_in_any_phase() -> None:
    ranks = Ranks()
    ranks.set(phase="saving iteration 7", waiting=3000.0)
    ranks.set(1, waiting=0.0)
    assert ranks.run(60) is None
    ranks.set(0, waiting=3300.0)
    hang = ranks.run(60)
    assert hang is not None and hang.ranks == (1,) and hang.seconds == 3300


def test_the_report_groups_ranks_by_host_and_place() -> None:
    beats = {
        r: Beat(number=1, host=f"h{r // 4}", pid=100 + r, phase="iteration 9", place="a.py:1 (f)")
        for r in range(8)
    }
    beats[1] = dataclasses.replace(beats[1], place="")
    hang = Hang(kind="silent", ranks=(5, 4, 6, 7), silent=(4, 5, 6, 7), seconds=290)
    stacks = {0: "/s/hang/rank_0.txt", 1: "", 2: "/s/hang/rank_2.txt", 3: "/tmp/x/rank_3.txt"}
    assert hang_report.lines(hang, beats, lambda rank: 300.0 - rank, stacks) == [
        "error: no sign of life for 295 s of rank 4-7 (host h1, process 104, 105, 106, 107): stopped or ended, or the "
        "host or the link to it is down; last seen in iteration 9, a.py:1 (f)",
        "rank 0, 2-3: iteration 9, a.py:1 (f)",
        "rank 1: iteration 9",
        "stacks of rank 0, 2 are in /s/hang/rank_N.txt",
        "stacks of rank 3 are in /tmp/x/rank_N.txt",
    ]
    assert behind(beats) == ()


def test_stacks_go_elsewhere_where_the_disk_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    mkdir = Path.mkdir

    def hanging(path: Path, *args: bool, **more: bool) -> None:
        if path == tmp_path / "hang":
            release.wait(30)
        mkdir(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", hanging)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    written = hang_report.write_stacks(tmp_path / "hang", 3, "rank 3", seconds=0.2)
    release.set()
    assert written == tmp_path / "tmp" / f"megatron_ultralong-hang-{os.getppid()}" / "rank_3.txt"
    text = written.read_text()
    assert text.startswith("rank 3\n") and "test_stacks_go_elsewhere" in text
    (tmp_path / "file").touch()
    assert hang_report.write_stacks(tmp_path / "file", 4, "rank 4", seconds=5) != tmp_path / "file"


def test_iterations_are_measured_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    limits = []
    for number, (seconds, then) in enumerate(((500, ""), (20, ""), (30, "save"), (25, ""), (20, ""))):
        heartbeat.iteration(number)
        limits.append(heartbeat.limit)
        now[0] += seconds
        if then:
            heartbeat.phase(then)
            assert (heartbeat.phase_name, heartbeat.limit) == (then, None)
            now[0] += 1000
    assert limits == [None, None, None, 150.0, 150.0]
    assert heartbeat.moves == 6


def test_the_period_follows_the_limit_and_the_ranks() -> None:
    assert period_of(300, 8) == 5 and period_of(15, 2) == 0.25
    assert period_of(300, 1024) == 10.24 and period_of(6, 1024) == 0.3


def test_the_limit_of_an_iteration() -> None:
    assert step_limit(2, LIMIT, TIMEOUT) == LIMIT
    assert step_limit(100, LIMIT, TIMEOUT) == 500
    assert step_limit(1000, LIMIT, TIMEOUT) == 3240  # before the collectives' timeout
    assert step_limit(2000, LIMIT, TIMEOUT) == 6000


def test_the_setting() -> None:
    assert Runtime().hang_minutes == 5 and Runtime(hang_minutes=0).hang_minutes == 0
    for wrong in (-1.0, 0.05, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"runtime.hang_minutes=\S+ must be 0 \(off\), or at least 0.1"):
            Runtime(hang_minutes=wrong)


def leave(code: int) -> None:
    raise SystemExit(code)


def test_each_line_of_an_error_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        warnings.warn("an old file", stacklevel=1)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        print("\r 3%", end="", file=sys.stderr)
        print("\r 4%", file=sys.stderr)
        raise ValueError("wrong\nin two lines")

    def mistake() -> None:
        raise UserError("lower it")

    def thread_error(told: threading.ExceptHookArgs) -> None:
        sys.stderr.write("ZeroDivisionError\nin a thread\n")

    monkeypatch.setattr(threading, "excepthook", thread_error)  # pytest's own collects them
    monkeypatch.setattr(cli, "leave", leave)
    monkeypatch.setattr(cli, "record", lambda text: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"test {time.time()}")
    monkeypatch.setenv("RANK", "3")
    for world, name in (("4", f"[rank 3 on {socket.gethostname()}] "), ("1", "")):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with pytest.raises(SystemExit, match="1"), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            cli.main(fail)
        lines = stream.getvalue().split("\n")
        assert lines[:3] == [
            f"{name}{x}" for x in ("warning: an old file", "ZeroDivisionError", "in a thread")
        ]
        assert lines[3] == "\r 3%\r 4%" and lines[-1] == ""
        assert lines[-3:-1] == [f"{name}ValueError: wrong", f"{name}in two lines"]
        assert all(line.startswith(name) for line in lines[4:-1])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with pytest.raises(SystemExit, match="2"):
        cli.main(mistake)
    assert stream.getvalue() == "error: lower it\n"


def test_a_rank_that_fails_waits_for_a_store_on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its torchrun would wait for that store for a quarter of an hour."""
    beats = object.__new__(heartbeat._Beats)
    beats._answers, beats._one_host, beats._store_gone, beats._period = 3, False, False, 0.2
    beats._stopping = threading.Event()
    ended: list[str] = []
    monkeypatch.setattr(cli, "_before_failing", [])
    monkeypatch.setattr(cli, "record", lambda text: ended.append(text))
    monkeypatch.setattr(cli, "leave", leave)
    cli.before_failing(beats.wait_for_store)

    def fail() -> None:
        raise RuntimeError("connection closed by peer")

    def rank() -> None:
        with pytest.raises(SystemExit, match="1"):
            cli.main(fail)

    failed = threading.Thread(target=rank)
    failed.start()
    failed.join(0.5)
    assert failed.is_alive() and not ended
    beats._answers += 1
    failed.join(10)
    assert len(ended) == 1 and "connection closed by peer" in ended[0]

    for name, value in (("_answers", 0), ("_one_host", True), ("_store_gone", True)):
        with monkeypatch.context() as patch:
            patch.setattr(beats, name, value)
            beats.wait_for_store()


def test_a_heartbeat_that_starts_is_asked_before_its_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beats:
        def __init__(self, *_: object) -> None: ...

        def wait_for_store(self) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(heartbeat, "_Beats", Beats)
    monkeypatch.setattr(cli, "_before_failing", [])
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "host-0")):
        monkeypatch.setenv(name, value)
    one = Heartbeat()
    one.start(5, 60)
    assert cli._before_failing == [one._thread.wait_for_store]  # type: ignore[union-attr]
    one.stop()
