"""Length resampling: targets met to half a document, the cap held, the same for the same seed."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest

from megatron_ultralong.data.pretrain import length_resampling
from megatron_ultralong.data.pretrain.length_buckets import LengthBuckets
from megatron_ultralong.data.pretrain.sources import DocumentMix, DocumentSource
from megatron_ultralong.errors import UserError


def lengths(seed: int, count: int = 3000) -> numpy.ndarray:
    """Many short documents and few long ones, 1 to about 300K tokens."""
    return numpy.maximum(1, numpy.random.default_rng(seed).lognormal(7.5, 1.4, count)).astype(numpy.int64)


def source(name: str = "a", **settings) -> DocumentSource:
    return DocumentSource(name=name, files=(), **settings)


def by_rates(*values: float, shares: bool = False) -> LengthBuckets:
    return LengthBuckets(edges=(4096, 8192), values=values, shares=shares)


def take(
    found: numpy.ndarray,
    wanted: DocumentMix,
    of: numpy.ndarray | None = None,
    usable: numpy.ndarray | None = None,
) -> numpy.ndarray:
    of = numpy.zeros(len(found), numpy.int32) if of is None else of
    return length_resampling.count_uses(
        found, of, numpy.ones(len(found), bool) if usable is None else usable, wanted
    )


def masses(found: numpy.ndarray, times: numpy.ndarray) -> list[int]:
    place = numpy.searchsorted([4096, 8192], found, side="right")
    return [int((found * times)[place == k].sum()) for k in range(3)]


def near(got: float, want: float, found: numpy.ndarray) -> bool:
    """Off by half of the longest document at most."""
    return abs(got - want) <= found.max() / 2 + 1


def test_every_document_once_unless_something_is_wanted():
    found = lengths(0)
    usable = numpy.arange(len(found)) % 7 > 0
    assert numpy.array_equal(take(found, DocumentMix(sources=(source(),)), usable=usable), usable)


@pytest.mark.parametrize("seed", range(5))
def test_rates(seed):
    found = lengths(seed)
    before = masses(found, numpy.ones(len(found)))
    times = take(found, DocumentMix(sources=(source(lengths=by_rates(0.25, 1, 2.5)),), seed=seed))
    for got, mass, rate in zip(masses(found, times), before, (0.25, 1, 2.5), strict=True):
        assert near(got, mass * rate, found)
    place = numpy.searchsorted([4096, 8192], found, side="right")
    assert [(int(times[place == k].min()), int(times[place == k].max())) for k in range(3)] == [
        (0, 1),
        (1, 1),
        (2, 3),
    ]
    edge = take(
        numpy.array([4095, 4096, 8191, 8192]), DocumentMix(sources=(source(lengths=by_rates(0, 1, 2)),))
    )
    assert edge.tolist() == [0, 1, 1, 2], "a bucket begins with its first length"


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_budget(seed):
    found = lengths(seed)
    budget = 2_000_000
    times = take(
        found,
        DocumentMix(
            sources=(source(lengths=by_rates(1, 2, 7, shares=True)),), tokens=budget, seed=seed, max_repeats=9
        ),
    )
    for got, share in zip(masses(found, times), (0.1, 0.2, 0.7), strict=True):
        assert near(got, share * budget, found)
    assert times.max() <= 9
    # Without a budget: the largest set that repeats nothing.
    times = take(found, DocumentMix(sources=(source(lengths=by_rates(1, 2, 7, shares=True)),), seed=seed))
    got, before = masses(found, times), masses(found, numpy.ones(len(found)))
    assert times.max() == 1 and max(g / b for g, b in zip(got, before, strict=True)) > 0.99
    assert all(near(g, share * sum(got), found) for g, share in zip(got, (0.1, 0.2, 0.7), strict=True))
    # Rates keep their proportions under a budget.
    times = take(
        found, DocumentMix(sources=(source(lengths=by_rates(0.25, 1, 3)),), tokens=budget, seed=seed)
    )
    mass = [b * r for b, r in zip(before, (0.25, 1, 3), strict=True)]
    assert all(
        near(g, budget * m / sum(mass), found) for g, m in zip(masses(found, times), mass, strict=True)
    )


def test_weights():
    found = numpy.concatenate([lengths(1), lengths(2, 500)])
    of = numpy.repeat([0, 1], [3000, 500]).astype(numpy.int32)
    both = (source("a", weight=Fraction(1, 4)), source("b", weight=Fraction(3, 4)))
    for budget in (None, 1_000_000):
        times = take(found, DocumentMix(sources=both, tokens=budget), of)
        got = [int((found * times)[of == k].sum()) for k in range(2)]
        total = budget or found[of == 1].sum() * 4 / 3
        assert near(got[0], total / 4, found) and near(got[1], 3 * total / 4, found)
        assert times.max() == 1


def test_the_cap_is_held_or_told():
    found = numpy.array([100, 200, 300])
    assert take(found, DocumentMix(sources=(source(),), tokens=2400, max_repeats=4)).tolist() == [4, 4, 4]
    with pytest.raises(
        UserError,
        match=r"source a: its documents have 600 tokens, less than 2,401 / max_repeats 4; give more",
    ):
        take(found, DocumentMix(sources=(source(),), tokens=2401, max_repeats=4))
    with pytest.raises(
        UserError,
        match=r"documents of >=8K tokens have 9,000 tokens, less than 40,000 / max_repeats 4",
    ):
        take(
            numpy.array([5000, 9000]),
            DocumentMix(sources=(source(lengths=by_rates(0, 1, 4, shares=True)),), tokens=50_000),
        )


def test_what_cannot_be_had_is_told():
    for wanted, message in (
        (by_rates(1, 0, 0), "the rates or shares of all its documents are 0"),
        (by_rates(1, 1, 1, shares=True), "has no document of <4K tokens, but a share for them"),
    ):
        with pytest.raises(UserError, match=f"source a: {message}"):
            take(numpy.array([5000]), DocumentMix(sources=(source(lengths=wanted),)))
    with pytest.raises(UserError, match="source b: has no tokens"):
        take(
            numpy.array([5]),
            DocumentMix(sources=(source("a", weight=Fraction(1)), source("b", weight=Fraction(1)))),
        )


def test_seeds_orders_and_hashes():
    found = lengths(3)
    wanted = [DocumentMix(sources=(source(lengths=by_rates(0.5, 1, 1)),), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (take(found, one) for one in wanted)
    assert numpy.array_equal(first, again) and not numpy.array_equal(first, other)
    times = numpy.array([2, 0, 1, 3], numpy.int32)
    assert length_resampling.order(times, False, 0).tolist() == [0, 0, 2, 3, 3, 3]
    shuffled = length_resampling.order(numpy.tile(times, 50), True, 0)
    assert sorted(shuffled) == length_resampling.order(
        numpy.tile(times, 50), False, 0
    ).tolist() and not numpy.array_equal(sorted(shuffled), shuffled)
    low, high = numpy.array([5, 5, 7, 5, 5], numpy.uint64), numpy.array([1, 2, 1, 1, 2], numpy.uint64)
    assert length_resampling.first_of_equal(low, high).tolist() == [True, True, True, False, False]
    assert length_resampling.first_of_equal(low[:0], high[:0]).tolist() == []
