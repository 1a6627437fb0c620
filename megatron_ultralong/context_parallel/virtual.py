"""Virtual ranks: every rank of a ring in one process, as threads on one device; copies stand for the network.

For tests and benchmarks of context parallelism on a machine with a single GPU, or with none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def run_virtual(function: Callable[[VirtualRing], Result], size: int, timeout: float = 120.0) -> list[Result]:
    """Call `function(ring)` in `size` threads, one a rank; the results in rank order, or the first failure raised.

    Backward passes inside run in the rank's own thread: autograd has only one thread a GPU, in which the ranks would wait
    for each other for ever. A rank that waits longer than `timeout` seconds for its neighbour fails.
    """
    exchange = _Exchange(timeout)
    results: list[Result | None] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(VirtualRing(rank, size, exchange))
        except BaseException as failure:
            failures.append(failure)
            exchange.fail()

    threads = [threading.Thread(target=run, args=(rank,), name=f"virtual rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results  # type: ignore[return-value]


class VirtualRing:
    """One rank's place in a ring of threads (a `comm.Ring`). All ranks must use the same CUDA stream."""

    def __init__(self, rank: int, size: int, exchange: _Exchange) -> None:
        self.rank, self.size = rank, size
        self._exchange = exchange
        self._started = 0

    def start(self, send: Tensor, receive: Tensor) -> _Copy:
        number = self._started
        self._started += 1
        self._exchange.offer((self.rank, number), send)
        return _Copy(self._exchange, (self.rank, number), ((self.rank - 1) % self.size, number), receive)


class _Copy:
    """Receiving is copying out of the sender's buffer, when waited for; the sender waits until that is done."""

    def __init__(self, exchange: _Exchange, sent: tuple[int, int], awaited: tuple[int, int], receive: Tensor) -> None:
        self._exchange, self._sent, self._awaited, self._receive = exchange, sent, awaited, receive

    def wait(self) -> None:
        self._exchange.take(self._awaited, self._receive)
        self._exchange.wait_taken(self._sent)


class _Exchange:
    """Buffers on offer, by (sender, number of its transfer)."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._offers: dict[tuple[int, int], Tensor] = {}
        self._changed = threading.Condition()
        self._failed = False

    def offer(self, key: tuple[int, int], buffer: Tensor) -> None:
        with self._changed:
            self._offers[key] = buffer
            self._changed.notify_all()

    def take(self, key: tuple[int, int], receive: Tensor) -> None:
        with self._changed:
            self._wait_until(lambda: key in self._offers)
            # On a GPU this only queues the copy; whatever either rank launches later comes after it on their one stream.
            receive.copy_(self._offers.pop(key))
            self._changed.notify_all()

    def wait_taken(self, key: tuple[int, int]) -> None:
        with self._changed:
            self._wait_until(lambda: key not in self._offers)

    def fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _wait_until(self, done: Callable[[], bool]) -> None:
        if not self._changed.wait_for(lambda: done() or self._failed, self._timeout):
            raise TimeoutError(f"a virtual rank waited more than {self._timeout} s for its neighbour")
        if not done():
            raise RuntimeError("another virtual rank failed")
