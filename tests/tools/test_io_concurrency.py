"""Many requests at a time, and work spread over processes."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.endpoint_client import Failure, ask_many, iterate
from megatron_ultralong.io.workers import WorkerPool


class Asked:
    """Answers n after some milliseconds; keeps how many are in flight at a time."""

    def __init__(self, failing: dict[int, Exception] | None = None, seconds: float = 0.002) -> None:
        self.failing, self.seconds = failing or {}, seconds
        self.now, self.most, self.asked = 0, 0, []

    async def __call__(self, n: int) -> int:
        self.asked.append(n)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.seconds * (1 + n % 3))
        finally:
            self.now -= 1
        if n in self.failing:
            raise self.failing[n]
        return 10 * n


def answers(ask: Asked, count: int, concurrency: int, **settings):
    return iterate(ask_many(ask, range(count), concurrency, **settings))


def test_every_item_has_its_answer_or_failure():
    ask = Asked({3: Failure("timeout", "late")})
    got = dict(answers(ask, 20, 4))
    failure = got.pop(3)
    assert isinstance(failure, Failure) and failure.kind == "timeout"
    assert got == {n: 10 * n for n in range(20) if n != 3} and ask.most == 4
    assert list(answers(ask, 0, 4)) == []


def test_a_fatal_error_waits_for_requests_in_flight():
    ask, got = Asked({2: UserError("no such model")}, seconds=0.05), []
    with pytest.raises(UserError, match="no such model"):
        got.extend(answers(ask, 100, 6))
    assert sorted(n for n, _ in got) == [n for n in sorted(ask.asked) if n != 2] and len(ask.asked) < 20

    def broken():
        yield from range(3)
        raise UserError("line 4 is broken")

    with pytest.raises(UserError, match="line 4"):
        list(iterate(ask_many(Asked(), broken(), 2)))


def test_a_stop_ends_within_the_grace_time():
    async def run(grace: float) -> tuple[list[int], float]:
        stop, got, began = asyncio.Event(), [], time.monotonic()
        asyncio.get_running_loop().call_later(0.05, stop.set)
        async with contextlib.aclosing(ask_many(slow, range(9), 3, stop=stop, grace=grace)) as pairs:
            async for n, _ in pairs:
                got.append(n)
        return got, time.monotonic() - began

    slow = Asked(seconds=0.3)
    assert sorted(asyncio.run(run(5))[0]) == [0, 1, 2] and slow.asked == [0, 1, 2]
    slow = Asked(seconds=60)
    got, seconds = asyncio.run(run(0.05))
    assert got == [] and seconds < 20


def test_leaving_the_loop_cancels_the_rest():
    ask = Asked()
    pairs = answers(ask, 1000, 3)
    next(pairs)
    pairs.close()
    assert ask.now == 0 and len(ask.asked) < 20


def adder(add: int, advance=None):
    def work(n: int) -> tuple[int, int]:
        if n < 0:
            os._exit(1)
        if advance is not None:
            advance(n)
        return n + add, os.getpid()

    return work


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_pool(workers):
    advanced: list[int] = []
    with WorkerPool(workers, adder, (100,), advanced.append) as pool:
        ordered = list(pool.map((n, str(n)) for n in range(20)))
        unordered = list(pool.unordered(range(20)))
    assert [(item, rest, result[0]) for item, rest, result in ordered] == [
        (n, str(n), n + 100) for n in range(20)
    ]
    assert sorted(result[0] for result in unordered) == list(range(100, 120))
    assert sum(advanced) == 2 * sum(range(20))
    assert (os.getpid() in {pid for _, pid in unordered}) == (workers < 2)
    if workers == 2:
        with (
            pytest.raises(UserError, match="a worker process ended suddenly"),
            WorkerPool(2, adder, (0,)) as pool,
        ):
            list(pool.unordered([1, -1, 2]))
        assert not multiprocessing.active_children()
