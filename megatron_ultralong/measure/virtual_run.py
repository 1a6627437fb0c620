"""Running one function as every rank of a context-parallel group in this process, and counting what the ranks
send each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from megatron_ultralong.context_parallel.comm import Transfer
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual

Make: TypeAlias = "Callable[[Any, Sequence[int] | None], tuple[Any, Any]]"
"""(group, document starts) -> (forward, backward) of a rank, as in context_parallel/ulysses.py; group
None = one rank."""
Inside: TypeAlias = "Callable[[], contextlib.AbstractContextManager[Any]]"


class Runner(Protocol):
    """Runs ranks."""

    sent: int | None
    """Bytes that all ranks together sent in the last run; None where that is not counted."""

    def __init__(self, cp: int) -> None: ...

    def run(self, function: Callable[[Any, int], Any], inside: Inside = contextlib.nullcontext) -> list[Any]:
        """function(group, rank) of every rank, inside `inside` in its thread; the results in rank order."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the attention benchmark."""

    name: str
    cp: int
    make: Make | None
    """None: cannot be run here, and `note` says why."""
    ours: bool = True
    note: str = ""
    runner: Callable[[int], Runner] | None = None
    """Default `VirtualRunner`."""


class VirtualRunner:
    """Ranks as threads by context_parallel/virtual_ranks.py; a single rank in this thread, without a group."""

    def __init__(self, cp: int) -> None:
        self.cp = cp
        self.sent: int | None = None

    def run(self, function: Callable[[Any, int], Any], inside: Inside = contextlib.nullcontext) -> list[Any]:
        tally = Tally()

        def rank(ring: Any) -> Any:
            with inside():
                return function(Counted(ring, tally), ring.rank)

        # One rank runs in the thread that measures, which is inside already.
        results = [function(None, 0)] if self.cp == 1 else run_virtual(rank, self.cp, timeout=3600.0)
        self.sent = tally.bytes
        return results

    def close(self) -> None: ...


class Tally:
    """A sum over threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class Counted:
    """`comm.Communicator` that counts what leaves the rank: of a collective, what the other ranks get of it."""

    def __init__(self, peers: Any, tally: Tally) -> None:
        self.rank, self.size = peers.rank, peers.size
        self._peers, self._tally = peers, tally

    def subgroup(self, ranks: list[int]) -> Counted:
        return Counted(self._peers.subgroup(ranks), self._tally)

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
        self._tally.add(size)
        return transfer
