"""How often each document is used: the mix of lengths and sources, to a budget of tokens (after Fu et al.,
arXiv 2402.10171).

Within a source each bucket of lengths has a target of tokens. It is met by using every document of the bucket
as often as it goes in whole, and then documents in random order, once more each, until another one would lead
further from the target than none. So a bucket is off its target by half a document at most, two documents of
a bucket differ by at most one use, and nobody is used more than `max_repeats` times. All is a function of
lengths and seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.pretrain.sources import Lengths, Sources
from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Documents of some lengths of one source, and what is wanted of them."""

    source: int
    documents: NDArray[numpy.int64]
    """Their numbers, rising."""
    tokens: int
    """Of all of them together, once."""
    value: float
    """Rate or share, as told; 1 where nothing was."""


def copies(
    lengths: NDArray[numpy.int64],
    source_of: NDArray[numpy.int32],
    usable: NDArray[numpy.bool_],
    wanted: Sources,
) -> NDArray[numpy.int32]:
    """Times each document is used [documents]. lengths: tokens [documents]; source_of: its source; usable:
    False = not at all.

    UserError where the documents cannot give what is wanted.
    """
    times = numpy.zeros(len(lengths), numpy.int32)
    if not wanted.resampled:
        times[usable] = 1
        return times
    by_source = [
        buckets(lengths, (source_of == k) & usable, k, source.lengths)
        for k, source in enumerate(wanted.sources)
    ]
    for source, found in zip(wanted.sources, by_source, strict=True):
        if not sum(b.tokens for b in found):
            raise UserError(f"source {source.name}: has no tokens; leave it out, or give it documents")
        for k, bucket in enumerate(found):
            if not bucket.tokens and bucket.value and source.lengths is not None and source.lengths.shares:
                raise UserError(
                    f"source {source.name}: no document of {name(source.lengths, k)} tokens, but a share of them is wanted; "
                    "set that share to 0, or give longer documents"
                )
        if not sum(b.value * b.tokens for b in found):
            raise UserError(
                f"source {source.name}: the lengths it has are wanted 0 times; change its rates or shares, or leave it out"
            )
    targets = source_targets(wanted, by_source)
    for source, found, target in zip(wanted.sources, by_source, targets, strict=True):
        weights = [
            b.value if source.lengths is not None and source.lengths.shares else b.value * b.tokens
            for b in found
        ]
        for k, (bucket, weight) in enumerate(zip(found, weights, strict=True)):
            goal = target * weight / sum(weights)
            if goal > bucket.tokens * wanted.max_repeats * (1 + 1e-9):
                lengths_named = "" if source.lengths is None else f" of {name(source.lengths, k)} tokens"
                raise UserError(
                    f"source {source.name}: its documents{lengths_named} hold {bucket.tokens:,} tokens, which is less than "
                    f"{goal:,.0f} / max_repeats {wanted.max_repeats}; give more of them, ask for fewer tokens or a smaller share, "
                    "or raise max_repeats"
                )
            times[bucket.documents] = _times(
                lengths[bucket.documents], goal, wanted.max_repeats, [wanted.seed, bucket.source, k]
            )
    return times


def buckets(
    lengths: NDArray[numpy.int64], own: NDArray[numpy.bool_], source: int, wanted: Lengths | None
) -> list[Bucket]:
    """The documents of one source (`own`: which those are) by length."""
    numbers = numpy.flatnonzero(own)
    edges, values = ((), (1.0,)) if wanted is None else (wanted.edges, wanted.values)
    place = numpy.searchsorted(numpy.array(edges, numpy.int64), lengths[numbers], side="right")
    members = [numbers[place == k] for k in range(len(values))]
    return [
        Bucket(source=source, documents=m, tokens=int(lengths[m].sum()), value=v)
        for m, v in zip(members, values, strict=True)
    ]


def source_targets(wanted: Sources, by_source: list[list[Bucket]]) -> list[float]:
    """Tokens wanted of each source.

    By weights, where sources have them: of the budget, or of the largest set for which no source and no
    bucket needs more than its rates give. Without weights: what each source's rates give (of shares, the
    largest set that repeats nothing), scaled to the budget together.
    """
    natural = []
    for source, found in zip(wanted.sources, by_source, strict=True):
        if source.lengths is not None and source.lengths.shares:
            total = sum(b.value for b in found)
            natural.append(min(b.tokens * total / b.value for b in found if b.value))
        else:
            natural.append(float(sum(b.value * b.tokens for b in found)))
    weights = [
        float(s.weight) if s.weight is not None else n for s, n in zip(wanted.sources, natural, strict=True)
    ]
    total = (
        wanted.tokens
        if wanted.tokens is not None
        else min(n / w for n, w in zip(natural, weights, strict=True) if w) * sum(weights)
    )
    return [total * w / sum(weights) for w in weights]


def order(times: NDArray[numpy.int32], shuffle: bool, seed: int) -> NDArray[numpy.int64]:
    """Numbers of the documents in the order they are packed, each as often as told; shuffled, copies of one
    lie anywhere."""
    used = numpy.repeat(numpy.arange(len(times), dtype=numpy.int64), times)
    return used[_permutation(len(used), [seed, 1 << 20])] if shuffle else used


def first_of_equal(low: NDArray[numpy.uint64], high: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
    """Whether each of some hashes (in two halves) is the first of those equal to it."""
    by_hash = numpy.lexsort((numpy.arange(len(low)), high, low))
    again = (low[by_hash][1:] == low[by_hash][:-1]) & (high[by_hash][1:] == high[by_hash][:-1])
    first = numpy.ones(len(low), numpy.bool_)
    first[by_hash[1:][again]] = False
    return first


def name(lengths: Lengths, bucket: int) -> str:
    """A bucket as people write it: <4K, 4K-8K, >=8K."""
    borders = [_short(edge) for edge in lengths.edges]
    if not borders:
        return "all"
    if bucket == 0:
        return f"<{borders[0]}"
    return f">={borders[-1]}" if bucket == len(borders) else f"{borders[bucket - 1]}-{borders[bucket]}"


def _short(count: int) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)


def _times(lengths: NDArray[numpy.int64], goal: float, most: int, seed: list[int]) -> NDArray[numpy.int32]:
    """Times each document of a bucket is used to make `goal` tokens."""
    total = int(lengths.sum())
    whole = min(int(goal / total + 1e-9), most) if total else 0
    found = numpy.full(len(lengths), whole, numpy.int32)
    left = goal - whole * total
    if left > 0 and whole < most and total:
        chosen = _permutation(len(lengths), seed)
        sums = numpy.concatenate([[0], numpy.cumsum(lengths[chosen])])
        found[chosen[: int(numpy.argmin(numpy.abs(sums - left)))]] += 1
    return found


def _permutation(count: int, seed: list[int]) -> NDArray[numpy.int64]:
    """numpy keeps raw random bits the same in all versions, but not its own shuffles."""
    return numpy.argsort(numpy.random.PCG64(numpy.random.SeedSequence(seed)).random_raw(count), kind="stable")
