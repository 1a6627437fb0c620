"""Memory that is written, or given back to the allocator, before what still uses it has been waited for.

A race detector over recorded calls. Every stream has a clock, and an event hands on what its stream had
waited for when it was recorded (vector clocks: Fidge 1988, Mattern 1989). Two uses of the same bytes, one of
which writes, must be ordered by a chain of events. NCCL's calls inside one group run at the same time. Memory
that is freed may at once be used by the stream it was allocated on, so that this stream must have waited for
all uses by others; unless the allocator waits for them (`record_stream`), which records an event on each of
their streams as the memory is freed.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.null_gpu.recording import Call

Clock = dict[str, int]
"""The time up to which each stream has been waited for."""
DEFAULT_STREAM = "(nil)"


@dataclass(frozen=True)
class Use:
    """The last time that a stream used some bytes."""

    stream: str
    time: int
    what: str

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.stream, 0) >= self.time


@dataclass
class Bytes:
    """A range of addresses that was always used as a whole."""

    start: int
    end: int
    write: Use | None = None
    reads: dict[str, Use] = field(default_factory=dict)
    """Since the last write, by stream."""

    def uses(self) -> Iterator[Use]:
        if self.write is not None:
            yield self.write
        yield from self.reads.values()


class Memory:
    """All bytes that are in use."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # of what `_ranges` has
        self._ranges: dict[int, Bytes] = {}

    def used(self, start: int, end: int) -> list[Bytes]:
        """Return what is known of this range, in order."""
        for cut in (start, end):
            index = bisect.bisect_right(self._starts, cut) - 1
            known = self._ranges[self._starts[index]] if index >= 0 else None
            if known is not None and known.start < cut < known.end:
                self._add(Bytes(cut, known.end, known.write, dict(known.reads)))
                known.end = cut
        first, last = (bisect.bisect_left(self._starts, cut) for cut in (start, end))
        return [self._ranges[at] for at in self._starts[first:last]]

    def all(self, start: int, end: int) -> list[Bytes]:
        """Return the whole range, in order."""
        found = []
        for known in [*self.used(start, end), Bytes(end, end)]:
            if start < known.start:
                found.append(gap := Bytes(start, known.start))
                self._add(gap)
            if known.start < known.end:
                found.append(known)
            start = known.end
        return found

    def forget(self, start: int, end: int) -> None:
        for known in self.used(start, end):
            self._starts.pop(bisect.bisect_left(self._starts, known.start))
            del self._ranges[known.start]

    def _add(self, new: Bytes) -> None:
        bisect.insort(self._starts, new.start)
        self._ranges[new.start] = new


class Detector:
    """Follows the calls of one rank."""

    def __init__(self) -> None:
        self.races: dict[str, int] = {}
        """What was found, and how often."""
        self._memory = Memory()
        self._host: Clock = {}
        self._clocks: dict[str, Clock] = defaultdict(lambda: dict(self._host))
        self._events: dict[str, Clock] = {}
        self._owners: dict[int, str] = {}  # the stream that a block was allocated on, by the block's start
        self._blocks: list[int] = []
        self._freed: dict[str, str] = {}  # races of the last call, if memory was freed: by stream

    def follow(self, call: Call) -> None:
        if call.kind == "record" and self._freed:
            self._freed.pop(call.stream, None)  # the allocator waits for it
        elif self._freed:
            self._found(*self._freed.values())
            self._freed = {}
        match call.kind:
            case "op" | "nccl":
                self._use(call, call.stream)
            case "group":
                self._use_together(call.group)
            case "record":
                self._events[call.event] = dict(self._clocks[call.stream])
            case "wait":
                _join(self._clocks[call.stream], self._events.get(call.event, {}))
            case "sync device":
                self._wait_on_host(*self._clocks.values())
            case "sync stream":
                self._wait_on_host(self._clocks[call.stream])
            case "sync event":
                self._wait_on_host(self._events.get(call.event, {}))
            case "alloc":
                [(start, _)] = call.reads
                if start not in self._owners:
                    bisect.insort(self._blocks, start)
                self._owners[start] = call.stream
            case "free":
                self._free(call)

    def _use(self, call: Call, stream: str) -> None:
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        use = Use(stream, clock[stream], f"{call.name} ({call.where})")
        for start, end in call.reads:
            for known in self._memory.all(start, end):
                if known.write is not None and not known.write.is_before(clock):
                    self._found(f"{use.what} reads what {known.write.what} writes")
                known.reads[stream] = use
        for start, end in call.writes:
            for known in self._memory.all(start, end):
                for other in known.uses():
                    if not other.is_before(clock):
                        self._found(f"{use.what} writes what {other.what} uses")
                known.write, known.reads = use, {}

    def _use_together(self, group: Sequence[Call]) -> None:
        """Each call of a group at the same time as the others, after what came before on its stream."""
        lanes = [f"{call.stream}, {number} of its group" for number, call in enumerate(group)]
        for lane, call in zip(lanes, group):
            self._clocks[lane] = {**self._clocks[call.stream], lane: self._clocks[lane].get(lane, 0)}
        for lane, call in zip(lanes, group):
            self._use(call, lane)
        for lane, call in zip(lanes, group):
            _join(self._clocks[call.stream], self._clocks[lane])

    def _free(self, call: Call) -> None:
        [(start, _)] = call.reads
        owner = self._owners.pop(start, DEFAULT_STREAM)
        index = bisect.bisect_left(self._blocks, start)
        if self._blocks[index : index + 1] == [start]:
            self._blocks.pop(index)
        end = self._blocks[index] if index < len(self._blocks) else 2**64
        clock = self._clocks[owner]
        for known in self._memory.used(start, end):
            for use in known.uses():
                if not use.is_before(clock):
                    self._freed[use.stream.split(",")[0]] = f"memory is freed that {use.what} uses"
        self._memory.forget(start, end)

    def _wait_on_host(self, *clocks: Clock) -> None:
        for clock in list(clocks):
            _join(self._host, clock)
        for clock in self._clocks.values():  # what is launched from now on
            _join(clock, self._host)

    def _found(self, *races: str) -> None:
        for race in races:
            self.races[race] = self.races.get(race, 0) + 1


def find(calls: Sequence[Call]) -> dict[str, int]:
    """Return the races among the calls of one rank, and how often each occurs. Nothing ran before."""
    detector = Detector()
    for call in calls:
        detector.follow(call)
    return detector.races


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time
