"""Which rank is hung, from the heartbeats of all ranks. Pure functions of beats and a clock: no threads, no
store (heartbeat.py has those).

Clocks of different hosts are never compared: a monitor measures for how long a beat has not changed, by its
own clock, and only over time in which it could read the beats.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

STEPS = 5
"""Multiple of the longest recent iteration after which one that has not ended counts as hung."""
TIMEOUT = 0.9
"""Part of a collective's timeout after which a wait counts as hung: then all stacks can still be written,
while the collective itself would end the rank that waits, which is not the one at fault."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank writes every few seconds."""

    number: int
    """Increases with every beat."""
    host: str
    pid: int
    moves: int = 0
    """Phases that the main thread has entered."""
    phase: str = "start-up"
    limit: float | None = None
    """Longest usual duration of the phase, in seconds; None = not known."""
    place: str = ""
    """The line at which the main thread is."""
    waiting: float = 0.0
    """Seconds for which the main thread has been blocked in a wait for other ranks; 0 = it is not."""
    left: bool = False
    """Whether the rank has come to its end."""

    def encode(self) -> str:
        """As text for the store."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def decode(text: bytes | str) -> Beat:
        """Inverse of `encode`."""
        return Beat(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A hang: what kind, since when, and the ranks at fault."""

    kind: Literal["not started", "silent", "no progress"]
    ranks: tuple[int, ...]
    """The ranks that the others wait for; () where that is not known."""
    silent: tuple[int, ...]
    """Ranks without a sign of life, which cannot do anything about it."""
    seconds: float

    def encode(self) -> str:
        """As text for the store."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def decode(text: bytes | str) -> Hang:
        """Inverse of `encode`."""
        values = json.loads(text)
        return Hang(**{**values, "ranks": tuple(values["ranks"]), "silent": tuple(values["silent"])})


def period_of(limit: float, world: int) -> float:
    """Seconds between two beats: a small part of the limit; longer with many ranks, all of which read all
    beats."""
    return min(max(limit / 60, world / 100, 0.2), limit / 20)


def step_limit(longest: float, limit: float, timeout: float) -> float:
    """Seconds after which an iteration counts as hung; longest: the longest recent one. At least `limit`,
    that of silence; before the timeout of collectives, unless iterations take a good part of that."""
    return max(limit, min(STEPS * longest, max(3 * longest, TIMEOUT * timeout)))


class Monitor:
    """One rank's view of all beats."""

    def __init__(self, world: int, limit: float, timeout: float, period: float) -> None:
        """limit: seconds without a sign of life. timeout: that of collectives, in seconds. period: seconds
        between two beats."""
        self.world, self.limit, self.timeout, self.period = world, limit, timeout, period
        self.clock = 0.0
        """Seconds in which beats could be read: neither a pause of this process or of the store nor a cut
        link count."""
        self._before: float | None = None
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._moved = 0.0

    @property
    def start_expected(self) -> bool:
        """Whether all ranks should have started by now."""
        return self.clock >= TIMEOUT * self.timeout

    def see(self, beats: Mapping[int, Beat], now: float) -> Hang | None:
        """Take the beats that have just been read, at `now` on this rank's clock; return the hang they
        show."""
        if self._before is not None:
            self.clock += min(now - self._before, 3 * self.period)
        self._before = now
        for rank, beat in beats.items():
            known = self._beats.get(rank)
            if known is None or (known.number, known.pid) != (beat.number, beat.pid):
                self._heard[rank] = self.clock
            if known is None or (known.moves, known.left) != (beat.moves, beat.left):
                self._moved = self.clock
        self._beats = dict(beats)
        return self._not_started() or self._silent() or self._no_progress()

    def silence(self, rank: int) -> float:
        """Seconds for which nothing was heard from a rank."""
        return self.clock - self._heard.get(rank, 0.0)

    def _running(self) -> dict[int, Beat]:
        return {rank: beat for rank, beat in self._beats.items() if not beat.left}

    def _not_started(self) -> Hang | None:
        missing = tuple(rank for rank in range(self.world) if rank not in self._beats)
        if not missing or not self.start_expected:
            return None
        return Hang(kind="not started", ranks=missing, silent=missing, seconds=self.clock)

    def _silent(self) -> Hang | None:
        # A few beats early: the report is promised within the limit.
        longest = max(map(self.silence, self._running()), default=0.0)
        if longest < self.limit - 3 * self.period or len(self._beats) < self.world:
            return None
        # Those of one host fall silent within a few beats; others may later, because they wait for these.
        first = (r for r in self._running() if self.silence(r) >= longest - 3 * self.period)
        ranks = tuple(sorted(first, key=self.silence, reverse=True))
        return Hang(kind="silent", ranks=ranks, silent=self._quiet(), seconds=longest)

    def _no_progress(self) -> Hang | None:
        running, still = self._running(), self.clock - self._moved
        if not running or len(self._beats) < self.world:
            return None
        limits = [beat.limit for beat in running.values()]
        known = [limit for limit in limits if limit is not None]
        in_step = len(known) == len(limits) and still >= max(known) - 3 * self.period
        longest_wait = max(beat.waiting for beat in running.values())
        if not in_step and longest_wait < TIMEOUT * self.timeout:
            return None
        return Hang(
            kind="no progress",
            ranks=self._quiet() or behind(running),
            silent=self._quiet(),
            seconds=still if in_step else longest_wait,
        )

    def _quiet(self) -> tuple[int, ...]:
        """Ranks that have missed several beats."""
        return tuple(r for r in self._running() if self.silence(r) > 5 * self.period)


def behind(beats: Mapping[int, Beat]) -> tuple[int, ...]:
    """The ranks that the others wait for: those in an earlier phase, or else those that wait for no rank; ()
    where all are alike."""
    first = min(beat.moves for beat in beats.values())
    late = tuple(rank for rank, beat in beats.items() if beat.moves == first)
    if len(late) < len(beats):
        return late
    busy = tuple(rank for rank, beat in beats.items() if not beat.waiting)
    return busy if len(busy) < len(beats) else ()
