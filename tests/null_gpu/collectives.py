"""What ranks ask NCCL for, held against each other: the same collectives in the same order, every send with
its receive, and no queue that waits for ever."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.null_gpu.recording import Call

P2P = ("send", "recv")
ISSUED = ("nccl", "group", "record", "wait", "sync device", "sync stream", "sync event")
"""Calls that matter for the order."""


def differences(ranks: Sequence[Sequence[Call]]) -> list[str]:
    """Return, in a line each, where the ranks of a communicator do not ask for the same.

    Collectives must be equal in operation, dtype, count and root, and in order; of every pair of ranks, the
    sends of one and the receives of the other in dtype, count and order. ranks: the calls of each rank.
    """
    found = []
    for name, members in _by_communicator(ranks).items():
        size = next(iter(members.values()))[0].size
        if sorted(members) != list(range(size)):
            found.append(f"{name}: of {size} ranks only {sorted(members)} take part")
            continue
        asked = {
            rank: [(c.name, c.dtype, c.count, c.peer) for c in calls if c.name not in P2P]
            for rank, calls in members.items()
        }
        for rank in range(1, size):
            if asked[rank] != asked[0]:
                found.append(f"{name}: {_first_difference(0, asked[0], rank, asked[rank])}")
        for sender in range(size):
            for receiver in range(size):
                sent, received = (
                    [(c.dtype, c.count) for c in members[rank] if c.name == kind and c.peer == peer]
                    for rank, kind, peer in ((sender, "send", receiver), (receiver, "recv", sender))
                )
                if sent != received:
                    found.append(
                        f"{name}: {sender} to {receiver}: {_first_difference(sender, sent, receiver, received)}"
                    )
    return found


def counts(calls: Sequence[Call]) -> Counter[str]:
    """Return how often one rank asks for each operation."""
    return Counter(call.name for call in _nccl(calls))


def _nccl(calls: Sequence[Call]) -> Iterator[Call]:
    for call in calls:
        if call.kind in ("nccl", "group"):
            yield from call.group or [call]


def _by_communicator(ranks: Sequence[Sequence[Call]]) -> dict[str, dict[int, list[Call]]]:
    """The calls of each communicator's ranks, by their rank in it."""
    found: dict[str, dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for calls in ranks:
        for call in _nccl(calls):
            found[call.communicator][call.rank].append(call)
    return found


def _first_difference(rank: int, calls: list, other: int, others: list) -> str:
    at = next((i for i, pair in enumerate(zip(calls, others)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(calls)} of rank {rank}, {len(others)} of rank {other}"
    return f"number {at + 1} is {calls[at]} on rank {rank} and {others[at]} on rank {other}"


# ---- deadlocks ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Item:
    """An entry of a queue: calls of NCCL in a group, an event that is recorded, or one that is waited for."""

    after: Item | None = None
    """The recorded event that it waits for."""
    open: list[Call] = field(default_factory=list)
    """Calls whose other side has not begun."""
    done: bool = False


class Rank:
    """A rank's host, which issues its calls in order, and its queues, one for every stream."""

    def __init__(self, calls: Sequence[Call], one_queue: bool) -> None:
        self._program = deque(call for call in calls if call.kind in ISSUED)
        self._one_queue = one_queue
        self._queues: dict[str, deque[Item]] = defaultdict(deque)
        self._events: dict[str, Item] = {}

    def issue(self) -> bool:
        """Issue calls until the host has to wait; return whether there were any."""
        issued = False
        while self._program and self._may_go_on(self._program[0]):
            call = self._program.popleft()
            issued = True
            queue = self._queues["" if self._one_queue else call.stream]
            if call.kind in ("nccl", "group"):
                queue.append(Item(open=list(call.group or [call])))
            elif call.kind == "record":
                queue.append(item := Item())
                self._events[call.event] = item
            elif call.kind == "wait" and call.event in self._events:
                queue.append(Item(after=self._events[call.event]))
        return issued

    def _may_go_on(self, call: Call) -> bool:
        if call.kind == "sync device":
            return not any(self._queues.values())
        if call.kind == "sync stream":
            return not self._queues["" if self._one_queue else call.stream]
        event = self._events.get(call.event) if call.kind == "sync event" else None
        return event is None or event.done

    def advance(self) -> bool:
        """Take what is done off the queues; return whether there was anything."""
        moved = False
        for queue in self._queues.values():
            while queue and not queue[0].open and (queue[0].after is None or queue[0].after.done):
                queue.popleft().done = True
                moved = True
        return moved

    def running(self) -> Iterator[Call]:
        """Iterate over the calls that wait for other ranks."""
        for queue in self._queues.values():
            if queue:
                yield from queue[0].open

    def close(self, call: Call) -> None:
        for queue in self._queues.values():
            if queue:
                queue[0].open = [other for other in queue[0].open if other is not call]

    def is_done(self) -> bool:
        return not self._program and not any(self._queues.values())


def deadlock(ranks: Sequence[Sequence[Call]], one_queue: bool = False) -> str | None:
    """Run the calls of all ranks as NCCL does; return in one line what waits for ever, or None.

    A call begins when it is first in its stream's queue, and ends when its counterparts have begun as well;
    nothing is buffered. The host issues calls in order and stops where it waits for the device. one_queue: as
    if all streams of a rank were one.
    """
    simulated = [Rank(calls, one_queue) for calls in ranks]
    moved = True
    while moved:
        moved = False
        for rank in simulated:
            moved |= rank.issue()
            moved |= rank.advance()
        moved |= _meet(simulated)
    if all(rank.is_done() for rank in simulated):
        return None
    waiting = {
        number: sorted({f"{c.name} {c.peer if c.name in P2P else ''} ({c.where})" for c in rank.running()})
        for number, rank in enumerate(simulated)
        if not rank.is_done()
    }
    return f"deadlock: {waiting}"


def _meet(ranks: Sequence[Rank]) -> bool:
    """Close running calls whose counterparts run too; return whether there were any."""
    running: dict[tuple[str, str, int], dict[int, tuple[Rank, Call]]] = defaultdict(dict)
    for rank in ranks:
        for call in rank.running():
            if call.name in P2P:
                ends = (call.rank, call.peer) if call.name == "send" else (call.peer, call.rank)
                key = (call.communicator, f"from {ends[0]} to {ends[1]}", 2)
            else:
                key = (call.communicator, call.name, call.size)
            running[key].setdefault(call.rank, (rank, call))
    met = False
    for (_, _, needed), calls in running.items():
        if len(calls) == needed:
            met = True
            for rank, call in calls.values():
                rank.close(call)
    return met
