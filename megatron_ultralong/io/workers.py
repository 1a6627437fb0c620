"""Work spread over processes that end with the main one, whose progress is seen while they work."""

from __future__ import annotations

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
"""Seconds between two looks at the progress."""

Advance = Callable[[int], None]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def spread(
    function: Callable[..., Any],
    tasks: Iterable[tuple[Any, ...]],
    shared: tuple[Any, ...],
    workers: int,
    advance: Advance,
) -> Iterator[Any]:
    """function(*shared, *task, advance) of every task, in processes, as they end (not in order). The first
    error stops all.

    advance: called here with what the tasks passed to theirs. Tokenizers' own threads share the cores with
    the processes. One worker or one task: no other process. UserError where a process ends suddenly.
    """
    todo = list(tasks)
    if workers == 1 or len(todo) < 2:
        for task in todo:
            yield function(*shared, *task, advance)
        return
    workers = min(workers, len(todo))
    others = set(multiprocessing.active_children())
    waiting: set[Future[Any]] = set()
    context = get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(function, shared, counter, max(1, cores() // workers))
    )
    seen = 0
    try:
        waiting = {pool.submit(_work, task) for task in todo}
        while waiting:
            ended, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
            now = counter.value
            advance(now - seen)
            seen = now
            yield from (future.result() for future in ended)
    except BrokenProcessPool:
        raise UserError(
            "a worker process ended suddenly (out of memory?); try again with fewer --workers, what was done is kept"
        ) from None
    finally:
        for process in (
            set(multiprocessing.active_children()) - others if waiting else ()
        ):  # an error: nobody wants what is under way
            process.terminate()
        pool.shutdown(cancel_futures=True)
        waiting.clear()
        del (
            pool,
            counter,
        )  # an error's traceback would keep their semaphores past the end of the process, which complains of them then


_function: Callable[..., Any] | None = None
_shared: tuple[Any, ...] = ()
_counter: Any = None


def _start(function: Callable[..., Any], shared: tuple[Any, ...], counter: Any, threads: int) -> None:
    global _function, _shared, _counter
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    _follow_main()
    _function, _shared, _counter = function, shared, counter


def _work(task: tuple[Any, ...]) -> Any:
    assert _function is not None
    return _function(*_shared, *task, _advance)


def _advance(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count


class Workers:
    """`workers` processes that hold what `make(*arguments)` returns, a function; 0 or 1 = this process does
    the work itself."""

    def __init__(
        self, workers: int, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
    ) -> None:
        self._here = make(*arguments) if workers <= 1 else None
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=_start_made, initargs=(make, arguments)
            )
        self._most = 2 * workers

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
        """(item, rest, result) of each (item, rest), in order; `rest` stays in this process. Few items are on
        their way at a time."""
        if self._pool is None:
            assert self._here is not None
            for item, rest in items:
                yield item, rest, self._here(item)
            return
        waiting: deque[tuple[Any, Any, Future[Any]]] = deque()
        try:
            for item, rest in items:
                waiting.append((item, rest, self._pool.submit(_work_item, item)))
                if len(waiting) > self._most:
                    item, rest, future = waiting.popleft()
                    yield item, rest, future.result()
            while waiting:
                item, rest, future = waiting.popleft()
                yield item, rest, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process ended suddenly (out of memory?); try again with fewer --workers"
            ) from None


_made: Callable[[Any], Any] | None = None


def _start_made(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _made
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _follow_main()
    _made = make(*arguments)


def _work_item(item: Any) -> Any:
    assert _made is not None
    return _made(item)


def _follow_main() -> None:
    """A worker ends with the main process: a killed one would leave it waiting forever. Ctrl-C is the main
    process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process()
    assert main is not None

    def end_with_main() -> None:
        connection.wait([main.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()
