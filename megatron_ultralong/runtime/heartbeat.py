"""Signs of life of all ranks beside the collectives: a rank that hangs, or whose link is cut, is named by
those that notice, which write their stacks and end the run.

A thread of each rank writes a beat into torchrun's store every few seconds, over a connection of its own, and
reads those of all others. It goes on while the main thread waits in a collective; in a stopped process it
does not. hang_detection.py decides what beats mean, hang_report.py what is said about it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.runtime import cli, hang_report
from megatron_ultralong.runtime.hang_detection import TIMEOUT, Beat, Hang, Monitor, period_of, step_limit

_END = 30.0
"""Seconds after which a rank that has noticed a hang ends, even if its report is not finished."""
_ANSWER = timedelta(minutes=1)
"""For which an answer of the store is waited for, before it is connected to again."""
_VERDICT = "hang"
_DONE = "reported"
_starts = 0


class Heartbeat:
    """This rank's heartbeat, and what its main thread is at. Without effect before `start`: with a single
    rank, or where it is turned off."""

    def __init__(self) -> None:
        self.moves, self.phase_name = 0, "start-up"
        self.limit: float | None = None
        """Seconds after which the phase counts as hung; None = not known."""
        self.folder: Path | None = None
        self.checkpoint: Callable[[], str] | None = None
        self._durations: deque[float] = deque(maxlen=50)
        self._began: float | None = None
        self._first = True
        self._limits = 0.0, math.inf  # seconds without a sign of life, and in a collective
        self._thread: _Beats | None = None

    def iteration(self, number: int) -> None:
        """Say that an iteration begins. It counts as hung after a multiple of the longest of the last 50,
        without the first, which compiles and allocates."""
        self._measure()
        self._began = time.monotonic()
        known = len(self._durations) > 1
        self._move(f"iteration {number}", step_limit(max(self._durations), *self._limits) if known else None)

    def phase(self, name: str) -> None:
        """Say that something begins whose usual duration is not known."""
        self._measure()
        self._move(name, None)

    def prepare_report(self, folder: Path, checkpoint: Callable[[], str]) -> None:
        """folder: where stacks are written. checkpoint: which one is good; called in another thread."""
        self.folder, self.checkpoint = folder, checkpoint

    def start(self, hang_minutes: float, timeout_minutes: float) -> None:
        """Begin. Every rank of a torchrun calls it, before it joins the process group."""
        global _starts
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or not hang_minutes or "MASTER_ADDR" not in os.environ or self._thread:
            return
        _starts += 1
        timeout = 60.0 * timeout_minutes
        # Not after the collectives' timeout: they would end the ranks that wait, and name those.
        limit = min(60.0 * hang_minutes, TIMEOUT * timeout)
        self._limits = limit, timeout
        monitor = Monitor(world, limit, timeout, period_of(limit, world))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._thread = _Beats(self, monitor, f"heartbeat/{attempt}/{_starts}")
        cli.before_failing(self._thread.wait_for_store)
        atexit.register(self.stop)  # its threads must not outlive the interpreter

    def stop(self) -> None:
        """End it on this rank, whose silence means nothing from now on; safe to call twice."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _measure(self) -> None:
        if self._began is not None and not self._first:
            self._durations.append(time.monotonic() - self._began)
        self._first = self._first and self._began is None
        self._began = None

    def _move(self, name: str, limit: float | None) -> None:
        self.phase_name, self.limit = name, limit
        self.moves += 1


class _Beats:
    """The threads of a heartbeat: one exchanges beats with the store, which may block for ever on a cut link;
    the other looks whether it still does."""

    def __init__(self, rank: Heartbeat, monitor: Monitor, prefix: str) -> None:
        self._main, self._monitor, self._prefix = rank, monitor, prefix
        self._rank = int(os.environ["RANK"])
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        self._host, self._period = socket.gethostname(), monitor.period
        self._store: Any = None
        self._all_here = False
        self._beats: dict[int, Beat] = {}
        self._number = self._answers = 0
        self._store_gone = False
        self._ending = threading.Event()
        self._cpu_clock, self._cpu, self._busy = _main_thread_clock(), 0.0, time.monotonic()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=act, name=f"heartbeat {act.__name__}", daemon=True)
            for act in (self._exchange, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(5.0)

    def wait_for_store(self) -> None:
        """Wait for an answer of the store on another host, when this rank has failed.

        Ranks fail as soon as others, which noticed a cut link first, have ended. A torchrun whose rank has
        failed waits for its store for a quarter of an hour, and so must not be told before the store is known
        to answer; if it does not, `_watch` ends this rank and its torchrun.
        """
        answers = self._answers
        if self._one_host or not answers:
            return
        while self._answers == answers and not self._store_gone and not self._stopping.is_set():
            time.sleep(self._period / 10)

    # ---- the store ---------------------------------------------------------------------------------

    def _exchange(self) -> None:
        while True:
            last = self._stopping.is_set()
            hang = None
            try:
                if self._store is None and self._reachable():
                    self._connect()
                if self._store is not None:
                    hang = self._round(left=last)
            except RuntimeError:  # torch's, of several kinds, for a broken connection
                self._store = None
            if hang is not None:
                self._end(hang)
            if last or (self._stopping.wait(self._period) and self._store is None):
                return

    def _connect(self) -> None:
        store = torch.distributed.TCPStore(*self._address, is_master=False, timeout=_ANSWER)
        self._store = torch.distributed.PrefixStore(self._prefix, store)
        self._store.compare_set(_VERDICT, "", "")
        self._store_gone = False

    def _round(self, left: bool = False) -> Hang | None:
        """Write this rank's beat and read all others; return the hang that any rank has found."""
        self._number += 1
        self._store.set(str(self._rank), self._beat(left).encode())
        world = range(self._monitor.world)
        # A key is read only where it is known to be there: a read would wait for it.
        self._all_here = self._all_here or self._store.check([str(rank) for rank in world])
        here = [
            rank
            for rank in world
            if self._all_here or (self._monitor.start_expected and self._store.check([str(rank)]))
        ]
        verdict, *beats = self._store.multi_get([_VERDICT, *map(str, here)])
        self._beats = {rank: Beat.decode(beat) for rank, beat in zip(here, beats, strict=True)}
        hang = self._monitor.see(self._beats, time.monotonic())
        self._answers += 1
        if hang is not None and not verdict and not left:
            verdict = self._store.compare_set(_VERDICT, "", hang.encode())
        return Hang.decode(verdict) if verdict and not left else None

    def _beat(self, left: bool = False) -> Beat:
        place, waits = hang_report.main_thread_place()
        now, cpu = time.monotonic(), self._cpu_clock()
        # Blocked in one wait, it uses none at all; a short collective takes more than this.
        if not waits or cpu - self._cpu > 1e-4:
            self._busy = now
        self._cpu = cpu
        return Beat(
            number=self._number,
            host=self._host,
            pid=os.getpid(),
            moves=self._main.moves,
            phase=self._main.phase_name,
            limit=self._main.limit,
            place=place,
            waiting=now - self._busy,
            left=left,
        )

    def _reachable(self) -> bool:
        """Whether the store can be connected to again. Sets whether its host answers, but it is gone."""
        if not self._answers:
            return True  # its start is waited for
        try:
            socket.create_connection(self._address, timeout=2 * self._period).close()
        except OSError as error:
            self._store_gone = isinstance(error, ConnectionRefusedError)
            return False
        return True

    # ---- without the store -------------------------------------------------------------------------

    def _watch(self) -> None:
        """End this rank if the store does not answer: its host, or the link to it, is down. Where torchrun
        alone is stopped or was killed, ranks train or save on: then only if this rank makes no progress."""
        before, answers, moves = time.monotonic(), 0, -1
        quiet = still = 0.0  # seconds without an answer, and without progress
        warned = False
        while not self._stopping.wait(self._period):
            now = time.monotonic()
            passed = min(now - before, 3 * self._period)  # a pause of this process does not count
            before, quiet, still = now, quiet + passed, still + passed
            if self._answers != answers:
                answers, quiet = self._answers, 0.0
            if self._main.moves != moves:
                moves, still = self._main.moves, 0.0
            limit = self._monitor.limit - 3 * self._period
            if self._ending.is_set() or not answers or (quiet < limit and not self._store_gone):
                continue
            if not warned:
                warned = True
                if self._one_host or self._store_gone:
                    self._say([f"warning: {self._no_store(quiet)}; a rank that hangs is no longer found"])
            if self._one_host or self._store_gone:
                usual = self._main.limit
                limit = math.inf if usual is None else usual
            if still >= limit:
                self._end_alone(quiet)

    def _no_store(self, quiet: float) -> str:
        host, port = self._address
        if self._store_gone:
            return f"torchrun's store at {host}:{port} is gone"
        return f"torchrun's store at {host}:{port} has not answered for {quiet:.0f} s"

    def _end_alone(self, quiet: float) -> None:
        own = self._beat()
        self._end_for_certain()
        stacks = hang_report.write_stacks(self._main.folder, self._rank, self._about(own))
        away: dict[str, list[int]] = {}
        for rank, beat in self._beats.items():
            if beat.host != self._host:
                away.setdefault(beat.host, []).append(rank)
        lost = "; ".join(f"rank {hang_report.ranges(ranks)} on host {host}" for host, ranks in away.items())
        where = hang_report.where(own)
        lines = [
            f"error: {self._no_store(quiet)}: its host, or the link to it, is down; "
            f"this host does not see {lost or 'other hosts'}",
            f"this host, {self._host}, ends its ranks, which were in {where}; stacks: {stacks}",
        ]
        self._say([*lines, *self._how_to_resume()])
        cli.record(lines[0])
        if not self._one_host and not self._store_gone:
            time.sleep(5.0 + 2 * self._period)  # for the other ranks of this host to write their stacks
            hang_report.end_torchrun()
        cli.leave(1)

    # ---- the end -----------------------------------------------------------------------------------

    def _end(self, hang: Hang) -> None:
        """Write this rank's stacks; the first rank alive reports; end."""
        self._end_for_certain()
        stacks = hang_report.write_stacks(self._main.folder, self._rank, self._about(self._beat()))
        alive = [r for r, beat in self._beats.items() if r not in hang.silent and not beat.left]
        files: dict[int, str] = {}
        reported = False
        with contextlib.suppress(RuntimeError):  # a store that is gone by now
            self._store.set(f"stacks/{self._rank}", str(stacks or ""))
            if self._rank == min(alive, default=self._rank):
                self._wait_for([f"stacks/{r}" for r in alive], 2 * self._period + 1.0)
                wrote = [r for r in alive if self._store.check([f"stacks/{r}"])]
                files = {r: self._store.get(f"stacks/{r}").decode() for r in wrote}
            else:
                reported = self._wait_for([_DONE], _END / 2)
        lines = hang_report.lines(hang, self._beats, self._monitor.silence, files)
        if not reported:
            self._say([*lines, *self._how_to_resume()])
            with contextlib.suppress(RuntimeError):
                self._store.set(_DONE, "1")
                time.sleep(1.0)  # for the others to read it, before this rank's torchrun ends, and the store
        cli.record(lines[0])
        hang_report.end_siblings(hang.silent, self._beats)
        cli.leave(1)

    def _end_for_certain(self) -> None:
        """End this process after a while, even without its report: a disk or a pipe may hang."""
        self._ending.set()
        timer = threading.Timer(_END, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (found := self._store.check(keys)) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _about(self, own: Beat) -> str:
        return f"rank {self._rank}, host {self._host}, process {own.pid}, {own.phase}, main thread at {own.place}"

    def _how_to_resume(self) -> list[str]:
        lines = []
        if self._main.checkpoint is not None:
            lines.append(self._main.checkpoint())
        return [*lines, hang_report.resume_line(1 if self._one_host else 2)]

    def _say(self, lines: list[str]) -> None:
        if cli.first_to_say(lines[0].partition(" for ")[0]):
            sys.stderr.write("".join(f"{line}\n" for line in lines))
            sys.stderr.flush()


def _main_thread_clock() -> Callable[[], float]:
    """The processor time of the main thread, in seconds; a clock that runs where the system has none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
    return lambda: time.clock_gettime(clock)
