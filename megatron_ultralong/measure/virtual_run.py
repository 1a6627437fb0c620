"""Run one function as every rank of a context parallel group in this process, and count the bytes the ranks
send."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from megatron_ultralong.context_parallel.comm import Messages, Transfer
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual

MakeAttention: TypeAlias = "Callable[[Any, Placement | None], tuple[Any, Any]]"
"""(group, placement of a packed row) -> (forward, backward) of one rank, with the signatures of
context_parallel/ulysses.py; group None = one rank."""
ThreadContext: TypeAlias = "Callable[[], contextlib.AbstractContextManager[Any]]"
"""Makes a context manager that each rank's thread enters."""


class RankRunner(Protocol):
    """Runs a function as every rank of a group."""

    sent: int | None
    """Bytes that all ranks together sent in the last run; None if not counted."""

    def __init__(self, cp: int) -> None: ...

    def run(
        self, function: Callable[[Any, int], Any], context: ThreadContext = contextlib.nullcontext
    ) -> list[Any]:
        """Call function(group, rank) for every rank, inside `context` in its thread; return results in rank
        order."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """One way of computing attention over ranks, a row of the attention report."""

    key: str
    """Name in `AttentionSettings.methods`, with a second word where it has several rows; of the first row
    "one kernel"."""
    name: str
    cp: int
    ulysses: int = 1
    """Ranks that exchange heads."""
    make: MakeAttention | None
    """None: cannot be run here; `note` says why."""
    ours: bool = True
    note: str = ""
    runner: Callable[[int], RankRunner] | None = None
    """None = `VirtualRankRunner`."""


class VirtualRankRunner:
    """Runs ranks as threads (context_parallel/virtual_ranks.py); a single rank in this thread, without a
    group."""

    def __init__(self, cp: int) -> None:
        self.cp = cp
        self.sent: int | None = None

    def run(
        self, function: Callable[[Any, int], Any], context: ThreadContext = contextlib.nullcontext
    ) -> list[Any]:
        counter = ByteCounter()

        def rank(ring: Any) -> Any:
            with context():
                return function(CountingPeers(ring, counter), ring.rank)

        # A single rank runs in the measuring thread, which has entered the context already.
        results = [function(None, 0)] if self.cp == 1 else run_virtual(rank, self.cp, timeout=3600.0)
        self.sent = counter.bytes
        return results

    def close(self) -> None: ...


class ByteCounter:
    """A sum over threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class CountingPeers:
    """`comm.Communicator` that counts bytes that leave the rank; of a collective, what other ranks
    receive."""

    def __init__(self, peers: Any, counter: ByteCounter) -> None:
        self.rank, self.size = peers.rank, peers.size
        self._peers, self._counter = peers, counter

    def subgroup(self, ranks: list[int]) -> CountingPeers:
        return CountingPeers(self._peers.subgroup(ranks), self._counter)

    def exchange(self, sends: Messages, receives: Messages) -> Transfer:
        return self._count(sum(x.nbytes for _, x in sends), self._peers.exchange(sends, receives))

    def send_recv(self, send: Tensor, receive: Tensor) -> Transfer:
        return self._count(send.nbytes, self._peers.send_recv(send, receive))

    def all_to_all(self, send: Tensor, receive: Tensor) -> Transfer:
        return self._count(send.nbytes * (self.size - 1) // self.size, self._peers.all_to_all(send, receive))

    def all_gather(self, send: Tensor, receive: Tensor) -> Transfer:
        return self._count(send.nbytes * (self.size - 1), self._peers.all_gather(send, receive))

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> Transfer:
        return self._count(
            send.nbytes * (self.size - 1) // self.size, self._peers.reduce_scatter(send, receive)
        )

    def _count(self, size: int, transfer: Transfer) -> Transfer:
        self._counter.add(size)
        return transfer
