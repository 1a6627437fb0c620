"""A function applied to a stream of items by other processes, in order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

from megatron_ultralong.config import UserError


class Workers:
    """`workers` processes that hold what `make(*arguments)` returns, a function; 0 or 1 = this process does the work itself."""

    def __init__(self, workers: int, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self._here = make(*arguments) if workers <= 1 else None
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(make, arguments))
        self._most = 2 * workers

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
        """(item, rest, result) of each (item, rest), in order; `rest` stays in this process. Few items are on their way at a time."""
        if self._pool is None:
            assert self._here is not None
            for item, rest in items:
                yield item, rest, self._here(item)
            return
        waiting: deque[tuple[Any, Any, Future[Any]]] = deque()
        try:
            for item, rest in items:
                waiting.append((item, rest, self._pool.submit(_work, item)))
                if len(waiting) > self._most:
                    item, rest, future = waiting.popleft()
                    yield item, rest, future.result()
            while waiting:
                item, rest, future = waiting.popleft()
                yield item, rest, future.result()
        except BrokenProcessPool:
            raise UserError("a worker process ended suddenly (out of memory?); try again with fewer --workers") from None


_function: Callable[[Any], Any] | None = None
"""A worker process's own function."""


def _start(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    main = parent_process()
    assert main is not None

    def end_with_main() -> None:  # a killed main process would leave its workers waiting forever
        connection.wait([main.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()
    _function = make(*arguments)


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)
