"""Work spread over processes: the library's only process pool. The processes end with the main one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

from megatron_ultralong.errors import UserError

POLL = 0.25
"""Seconds between two calls of `progress`."""


def cores() -> int:
    """CPU cores that this process may use; where the system does not say which, as macOS, all there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


class WorkerPool:
    """A context with `workers` processes, each of which calls `make(*arguments)` once and applies the
    function that it returns to items. 0 or 1: this process does the work.

    An exception that leaves the context terminates the processes. Their tokenizers share the cores.
    """

    def __init__(
        self,
        workers: int,
        make: Callable[..., Callable[[Any], Any]],
        arguments: tuple[Any, ...],
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """progress: where given, `make` gets a further argument, a function of a number that may be called in
        any process; `progress` is called in this one with the sums."""
        self._apply = self._pool = self._counter = None
        self._progress, self._reported = progress, 0
        if workers <= 1:
            self._apply = make(*arguments, *([progress] if progress else []))
            return
        context = get_context("spawn")
        self._counter = context.Value("q", 0) if progress else None
        self._others = set(multiprocessing.active_children())
        self._in_flight = 2 * workers
        threads = max(1, cores() // workers)
        self._pool = ProcessPoolExecutor(
            workers, context, initializer=_start, initargs=(make, arguments, self._counter, threads)
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if error is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        # A traceback would keep their semaphores until the interpreter exits, which then warns of them.
        self._pool = self._counter = None

    def map(self, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
        """Yield (item, rest, result) of each (item, rest), in order. `rest` stays in this process. Items are
        taken as they are needed."""
        if self._apply is not None:
            for item, rest in items:
                yield item, rest, self._apply(item)
            return
        assert self._pool is not None
        waiting: deque[tuple[Any, Any, Future[Any]]] = deque()
        with _sudden_end():
            for item, rest in items:
                waiting.append((item, rest, self._pool.submit(_work, item)))
                if len(waiting) > self._in_flight:
                    item, rest, future = waiting.popleft()
                    yield item, rest, future.result()
            while waiting:
                item, rest, future = waiting.popleft()
                yield item, rest, future.result()

    def unordered(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of each item, in order of completion. All items are taken at once."""
        if self._apply is not None:
            yield from map(self._apply, items)
            return
        assert self._pool is not None
        waiting = {self._pool.submit(_work, item) for item in items}
        with _sudden_end():
            while waiting:
                done, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                self._report()
                yield from (future.result() for future in done)

    def _report(self) -> None:
        if self._counter is not None and self._progress is not None:
            total = self._counter.value
            self._progress(total - self._reported)
            self._reported = total


@contextlib.contextmanager
def _sudden_end() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended suddenly (out of memory?); use fewer --workers, finished work is kept"
        ) from None


# ---- in a worker process -----------------------------------------------------------------------

_function: Callable[[Any], Any] | None = None


def _start(
    make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], counter: Any, threads: int
) -> None:
    global _function
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    end_with_main()

    def advance(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _function = make(*arguments, *([] if counter is None else [advance]))


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)


def end_with_main(*, with_children: bool = False) -> None:
    """Exit when the main process ends: a killed one would leave this one waiting forever. Ctrl-C is handled
    by the main process.

    with_children: make this process the leader of a new process group, and end all of that group.
    """
    if with_children:
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process()
    assert main is not None

    def exit_with_main() -> None:
        connection.wait([main.sentinel])
        if with_children:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=exit_with_main, daemon=True).start()
