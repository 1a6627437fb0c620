"""Virtual ranks: every rank of a group in one process, as threads on one device; copies replace the network.

For tests and benchmarks of context parallelism on a machine with a single GPU, or with none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Key: TypeAlias = tuple[tuple[int, ...], int, int, int]
"""A transfer: its group, sender and receiver in that group, and how many the sender had started before."""
Receive: TypeAlias = Callable[[Tensor], object]


def run_virtual(
    function: Callable[[VirtualCommunicator], Result], size: int, timeout: float = 120.0
) -> list[Result]:
    """Call `function(communicator)` in `size` threads, one per rank, and return the results in rank order.
    Raises the first failure.

    Backward passes inside run in the rank's own thread: autograd has only one thread per GPU, in which the
    ranks would wait for each other for ever. A rank that waits longer than `timeout` seconds for another
    fails.
    """
    exchange = _Exchange(timeout)
    results: list[Result | None] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(VirtualCommunicator(rank, size, exchange))
        except BaseException as failure:
            failures.append(failure)
            exchange.fail()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"virtual rank {rank}") for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results  # type: ignore[return-value]


class VirtualCommunicator:
    """`comm.Communicator` of one rank among threads. All ranks must use the same CUDA stream."""

    def __init__(
        self, rank: int, size: int, exchange: _Exchange, members: tuple[int, ...] | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.members = tuple(range(size)) if members is None else members
        self._exchange = exchange
        self._started = 0

    def subgroup(self, ranks: list[int]) -> VirtualCommunicator:
        """Make the group of these ranks, which include this one; each of them makes it once, and in the same
        order."""
        return VirtualCommunicator(
            ranks.index(self.rank), len(ranks), self._exchange, tuple(self.members[rank] for rank in ranks)
        )

    def send_recv(self, send: Tensor, receive: Tensor) -> _Copies:
        return self._launch({(self.rank + 1) % self.size: send}, {(self.rank - 1) % self.size: receive.copy_})

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> _Copies:
        return self._launch(dict(sends), {rank: buffer.copy_ for rank, buffer in receives})

    def all_to_all(self, send: Tensor, receive: Tensor) -> _Copies:
        return self._launch(dict(enumerate(send)), {rank: x.copy_ for rank, x in enumerate(receive)})

    def all_gather(self, send: Tensor, receive: Tensor) -> _Copies:
        return self._launch(
            dict.fromkeys(range(self.size), send), {rank: x.copy_ for rank, x in enumerate(receive)}
        )

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> _Copies:
        first: dict[int, Receive] = {0: receive.copy_}
        return self._launch(dict(enumerate(send)), first | dict.fromkeys(range(1, self.size), receive.add_))

    def _launch(self, sends: dict[int, Tensor], receives: dict[int, Receive]) -> _Copies:
        """sends: the buffer for each rank. receives: what to do with the buffer of each rank, in this
        order."""
        number = self._started
        self._started += 1
        sent = [(self.members, self.rank, to, number) for to in sends]
        for key, buffer in zip(sent, sends.values(), strict=True):
            self._exchange.offer(key, buffer)
        return _Copies(
            self._exchange,
            sent,
            {(self.members, source, self.rank, number): receive for source, receive in receives.items()},
        )


class _Copies:
    """Receiving copies out of the senders' buffers when waited for; a sender waits until that is done."""

    def __init__(self, exchange: _Exchange, sent: list[Key], awaited: dict[Key, Receive]) -> None:
        self._exchange, self._sent, self._awaited = exchange, sent, awaited

    def wait(self) -> None:
        for key, receive in self._awaited.items():
            self._exchange.take(key, receive)
        for key in self._sent:
            self._exchange.wait_taken(key)


class _Exchange:
    """The buffers that ranks have sent and not yet received."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._offers: dict[Key, Tensor] = {}
        self._changed = threading.Condition()
        self._failed = False

    def offer(self, key: Key, buffer: Tensor) -> None:
        with self._changed:
            self._offers[key] = buffer
            self._changed.notify_all()

    def take(self, key: Key, receive: Receive) -> None:
        with self._changed:
            self._wait_until(lambda: key in self._offers)
            # On a GPU this only queues the copy; what either rank launches later follows it on their common
            # stream.
            receive(self._offers.pop(key))
            self._changed.notify_all()

    def wait_taken(self, key: Key) -> None:
        with self._changed:
            self._wait_until(lambda: key not in self._offers)

    def fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _wait_until(self, done: Callable[[], bool]) -> None:
        if not self._changed.wait_for(lambda: done() or self._failed, self._timeout):
            raise TimeoutError(f"a virtual rank waited more than {self._timeout} s for another rank")
        if not done():
            raise RuntimeError("another virtual rank failed")
