"""How often each document is used, to reach a mix of lengths and sources within a budget of tokens (after Fu
et al., arXiv 2402.10171).

Each bucket of lengths of a source has a target of tokens. Every document of the bucket is used as often as
all of them fit the target; then documents in random order are used once more, until another one would lead
further from the target. So a bucket misses its target by at most half a document, two documents of a bucket
differ by at most one use, and none is used more than `max_repeats` times. The result depends on lengths and
seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.permutation import permutation
from megatron_ultralong.data.pretrain.length_buckets import LengthBuckets
from megatron_ultralong.data.pretrain.sources import DocumentMix
from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The documents of one source in one bucket of lengths."""

    source: int
    documents: NDArray[numpy.int64]
    """Their numbers, ascending."""
    tokens: int
    """Of all of them together, once."""
    value: float
    """Rate or share; 1 where the source has neither."""


def count_uses(
    lengths: NDArray[numpy.int64],
    source_of: NDArray[numpy.int32],
    usable: NDArray[numpy.bool_],
    mix: DocumentMix,
) -> NDArray[numpy.int32]:
    """How often each document is used [documents].

    lengths: tokens [documents]; source_of: its source; usable: False = not at all. UserError where the
    documents do not suffice for the mix.
    """
    uses = numpy.zeros(len(lengths), numpy.int32)
    if not mix.resampled:
        uses[usable] = 1
        return uses
    by_source = [
        buckets(lengths, (source_of == k) & usable, k, source.lengths) for k, source in enumerate(mix.sources)
    ]
    for source, own in zip(mix.sources, by_source, strict=True):
        if not sum(b.tokens for b in own):
            raise UserError(f"source {source.name}: has no tokens; leave it out, or give it documents")
        for k, bucket in enumerate(own):
            if not bucket.tokens and bucket.value and source.lengths is not None and source.lengths.shares:
                raise UserError(
                    f"source {source.name}: has no document of {source.lengths.name(k)} tokens, but a share for them; "
                    "set that share to 0, or give longer documents"
                )
        if not sum(b.value * b.tokens for b in own):
            raise UserError(
                f"source {source.name}: the rates or shares of all its documents are 0; change them, or leave the source out"
            )
    for source, own, target in zip(mix.sources, by_source, source_targets(mix, by_source), strict=True):
        shares = source.lengths is not None and source.lengths.shares
        weights = [b.value if shares else b.value * b.tokens for b in own]
        for k, (bucket, weight) in enumerate(zip(own, weights, strict=True)):
            goal = target * weight / sum(weights)
            if goal > bucket.tokens * mix.max_repeats * (1 + 1e-9):
                of_length = "" if source.lengths is None else f" of {source.lengths.name(k)} tokens"
                raise UserError(
                    f"source {source.name}: its documents{of_length} have {bucket.tokens:,} tokens, less than "
                    f"{goal:,.0f} / max_repeats {mix.max_repeats}; give more documents, request fewer tokens or a smaller share, "
                    "or raise max_repeats"
                )
            uses[bucket.documents] = _uses_in_bucket(
                lengths[bucket.documents], goal, mix.max_repeats, [mix.seed, bucket.source, k]
            )
    return uses


def buckets(
    lengths: NDArray[numpy.int64], own: NDArray[numpy.bool_], source: int, by_length: LengthBuckets | None
) -> list[Bucket]:
    """Divide the documents of one source (where `own` is True) by length."""
    numbers = numpy.flatnonzero(own)
    edges, values = ((), (1.0,)) if by_length is None else (by_length.edges, by_length.values)
    place = numpy.searchsorted(numpy.array(edges, numpy.int64), lengths[numbers], side="right")
    members = [numbers[place == k] for k in range(len(values))]
    return [
        Bucket(source=source, documents=m, tokens=int(lengths[m].sum()), value=v)
        for m, v in zip(members, values, strict=True)
    ]


def source_targets(mix: DocumentMix, by_source: list[list[Bucket]]) -> list[float]:
    """Tokens to take of each source.

    Where sources have weights: their shares of the budget, or of the largest total for which no source and no
    bucket has to give more than its rates. Without weights: what each source's rates give (with shares, the
    largest total that repeats nothing), scaled to the budget.
    """
    natural = []
    for source, own in zip(mix.sources, by_source, strict=True):
        if source.lengths is not None and source.lengths.shares:
            total = sum(b.value for b in own)
            natural.append(min(b.tokens * total / b.value for b in own if b.value))
        else:
            natural.append(float(sum(b.value * b.tokens for b in own)))
    weights = [
        float(s.weight) if s.weight is not None else n for s, n in zip(mix.sources, natural, strict=True)
    ]
    total = (
        mix.tokens
        if mix.tokens is not None
        else min(n / w for n, w in zip(natural, weights, strict=True) if w) * sum(weights)
    )
    return [total * w / sum(weights) for w in weights]


def order(uses: NDArray[numpy.int32], shuffle: bool, seed: int) -> NDArray[numpy.int64]:
    """Numbers of the documents in packing order, each as often as it is used; repeated ones are shuffled
    too."""
    used = numpy.repeat(numpy.arange(len(uses), dtype=numpy.int64), uses)
    return used[permutation(len(used), [seed, 1 << 20])] if shuffle else used


def first_of_equal(low: NDArray[numpy.uint64], high: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
    """Whether each hash (given in two halves) is the first of those equal to it, bool [hashes]."""
    by_hash = numpy.lexsort((numpy.arange(len(low)), high, low))
    again = (low[by_hash][1:] == low[by_hash][:-1]) & (high[by_hash][1:] == high[by_hash][:-1])
    first = numpy.ones(len(low), numpy.bool_)
    first[by_hash[1:][again]] = False
    return first


def _uses_in_bucket(
    lengths: NDArray[numpy.int64], goal: float, most: int, seed: list[int]
) -> NDArray[numpy.int32]:
    """How often each document of a bucket is used to make `goal` tokens, at most `most` times."""
    total = int(lengths.sum())
    all_of_them = min(int(goal / total + 1e-9), most) if total else 0
    uses = numpy.full(len(lengths), all_of_them, numpy.int32)
    left = goal - all_of_them * total
    if left > 0 and all_of_them < most and total:
        chosen = permutation(len(lengths), seed)
        sums = numpy.concatenate([[0], numpy.cumsum(lengths[chosen])])
        uses[chosen[: int(numpy.argmin(numpy.abs(sums - left)))]] += 1
    return uses
