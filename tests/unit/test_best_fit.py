"""Best fit, longest first: the same bins as by looking at every bin, and never more room than there is."""

from __future__ import annotations

import time

import numpy
import pytest

from megatron_ultralong.data.best_fit import best_fit, contents, even_fit


def by_looking(lengths: list[int], capacity: int, first: bool = False) -> list[int]:
    """Room left in each bin, rising, by trying all of them: best fit, or first fit, longest first."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [k for k, room in enumerate(bins) if room >= length]
        if not fitting:
            bins.append(capacity - length)
            continue
        bins[fitting[0] if first else min(fitting, key=lambda k: bins[k])] -= length
    return sorted(bins)


@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 1000, 8193, 1048577])
def test_each_item_once_and_never_over_capacity(capacity):
    rng = numpy.random.default_rng(capacity)
    for count in (1, 2, 30, 300):
        lengths = rng.integers(1, min(capacity, rng.integers(2, capacity + 2)) + 1, count)
        of_item = best_fit(lengths, capacity)
        items = contents(of_item)
        assert sorted(numpy.concatenate(items).tolist()) == list(range(count))
        assert [set(of_item[some].tolist()) for some in items] == [{k} for k in range(len(items))], (
            "bins are numbered from 0 without gaps"
        )
        assert all((numpy.diff(some) > 0).all() for some in items)
        filled = [int(lengths[some].sum()) for some in items]
        assert max(filled) <= capacity
        assert sorted(capacity - full for full in filled) == by_looking(lengths.tolist(), capacity)


def test_as_good_as_first_fit_on_the_whole():
    rng = numpy.random.default_rng(5)
    best = first = 0
    for _ in range(300):
        lengths = rng.integers(1, 101, rng.integers(5, 40))
        best += len(contents(best_fit(lengths, 100)))
        first += len(by_looking(lengths.tolist(), 100, first=True))
    assert best <= first


def test_layout_by_hand():
    #          7 alone leaves 3; 6 + 4; 5 + 5; the 2 goes where 3 is left, the last 1 into what that leaves
    assert best_fit(numpy.array([5, 4, 7, 2, 6, 5, 1]), 10).tolist() == [2, 1, 0, 0, 1, 2, 0]
    assert best_fit(numpy.array([3, 3, 3]), 3).tolist() == [0, 1, 2]
    assert (
        best_fit(numpy.array([], dtype=numpy.int64), 3).tolist()
        == []
        == contents(numpy.array([], dtype=numpy.int64))
    )


def test_depends_on_nothing_but_its_arguments_and_is_fast():
    lengths = numpy.random.default_rng(1).integers(1, 9000, 200_000).astype(numpy.int32)
    begun = time.perf_counter()
    once = best_fit(lengths, 1 << 20)
    assert (
        time.perf_counter() - begun < 20
    )  # a second or less; the limit tells linear from quadratic on a busy machine
    assert numpy.array_equal(once, best_fit(lengths.astype(numpy.int64), 1 << 20))
    assert len(contents(once)) == -(-int(lengths.sum()) // (1 << 20))


@pytest.mark.parametrize("capacity", [7, 65, 1000, 8193, 1048577])
def test_even_work_takes_no_more_bins(capacity):
    rng = numpy.random.default_rng(capacity)
    for count in (1, 2, 30, 300):
        lengths = rng.integers(1, min(capacity, rng.integers(2, capacity + 2)) + 1, count)
        fewest, even = best_fit(lengths, capacity), even_fit(lengths, capacity)
        items = contents(even)
        assert sorted(numpy.concatenate(items).tolist()) == list(range(count))
        assert len(items) <= len(contents(fewest)) and max(even) == len(items) - 1
        assert max(int(lengths[some].sum()) for some in items) <= capacity
        assert numpy.array_equal(even, even_fit(lengths, capacity))
    assert even_fit(numpy.array([], dtype=numpy.int64), capacity).tolist() == []


def test_even_work_of_conversations_and_documents():
    """Best fit packs long with long; with short ones between, no row has much more attention than others."""
    rng = numpy.random.default_rng(0)
    conversations = rng.lognormal(numpy.log(1000) - 0.5, 1, 20_000).clip(1, 8192).astype(int)
    pages = rng.lognormal(numpy.log(866) - 0.6, 1.1, 40_000).clip(1, 100_000).astype(int)
    for lengths, capacity, most in ((conversations, 65_537, 1.05), (pages, 1 << 20, 2.5)):
        work = {}
        for fit in (best_fit, even_fit):
            of_row = numpy.bincount(fit(lengths, capacity), weights=lengths.astype(float) ** 2)
            work[fit] = len(of_row), of_row.max() / of_row.mean()
        assert work[even_fit][0] == work[best_fit][0]
        assert work[even_fit][1] < most and work[best_fit][1] > 3
