"""The zigzag order: which tokens a context-parallel rank holds, and which blocks of attention it computes.

S tokens of the complete sequence, cp ranks, s = S/cp tokens per rank. The sequence is cut into 2 cp equal
chunks; rank r holds chunks r and 2 cp - 1 - r, in that order, so that under a causal mask every rank has the
same work. Other modules ask this one for it.

The order nests: the shards of U adjacent ranks r U .. r U + U - 1, joined by `unshard` as if they were a
complete sequence, are the shard of rank r among cp/U. Ulysses inside a ring relies on this (ulysses.py).

Rows of several documents that attention stays inside are placed otherwise (placement.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.errors import UserError


class AttentionBlock(NamedTuple):
    """A block of the attention matrix: queries of one rank against keys of the same or another rank."""

    queries: slice
    """Among the s local queries."""
    keys: slice
    """Among the s keys of the other rank; in `past_blocks` positions in the complete sequence, in schedule.py
    places in a message."""
    causal: bool
    """True for a diagonal block: query i sees keys 0..i of the block, which has as many keys as queries.
    False for a past block: every query sees every key."""


# ---- which tokens a rank holds ------------------------------------------------------------------


def chunk_ids(rank: int, cp: int) -> tuple[int, ...]:
    """Return which of the 2 cp chunks `rank` holds, in local order; with cp = 1 the sequence is one chunk."""
    _check_rank(rank, cp)
    return (rank, 2 * cp - 1 - rank) if cp > 1 else (0,)


def positions(seq_length: int, rank: int, cp: int, device: torch.device | str | None = None) -> Tensor:
    """Return the global positions of the tokens of `rank`, in local order: int64 [s], ascending.

    Raises UserError if the sequence cannot be cut into 2 cp equal chunks.
    """
    _check_rank(rank, cp)
    length = _chunk_length(seq_length, cp)
    return torch.cat([torch.arange(c * length, (c + 1) * length, device=device) for c in chunk_ids(rank, cp)])


def shard(x: Tensor, rank: int, cp: int, dim: int) -> Tensor:
    """Return the shard of `rank` of `x`, cut along `dim` (S -> s); `x` itself if cp is 1. Raises as
    `positions`."""
    _check_rank(rank, cp)
    if cp == 1:
        return x
    length = _chunk_length(x.shape[dim], cp)
    return torch.cat([x.narrow(dim, c * length, length) for c in chunk_ids(rank, cp)], dim=dim)


def unshard(shards: Sequence[Tensor], dim: int, out: Tensor | None = None) -> Tensor:
    """Invert `shard`: the shards of all ranks, in rank order -> S along `dim`, written to `out` if given
    (cp > 1)."""
    cp = len(shards)
    if cp == 1:
        return shards[0]
    if cp == 0 or any(x.shape != shards[0].shape for x in shards) or shards[0].shape[dim] % 2:
        raise ValueError(
            f"shards of shapes {[tuple(x.shape) for x in shards]} are not the zigzag shards of one tensor"
        )
    chunks: dict[int, Tensor] = {}
    for rank, x in enumerate(shards):
        chunks.update(zip(chunk_ids(rank, cp), x.chunk(2, dim=dim), strict=True))
    return torch.cat([chunks[c] for c in range(2 * cp)], dim=dim, out=out)


# ---- which blocks of attention a rank computes --------------------------------------------------


def block_between(rank: int, source: int, s: int) -> AttentionBlock:
    """Return what the queries of `rank` see of the keys of `source` under the causal mask of the complete
    sequence.

    A lower rank's first chunk lies before both of ours, its second after both; a higher rank's chunks both
    lie between ours. Our own two chunks are in ascending order, so the mask among them is the plain causal
    one.
    """
    if source == rank:
        return AttentionBlock(slice(0, s), slice(0, s), True)
    if source < rank:
        return AttentionBlock(slice(0, s), slice(0, s // 2), False)
    return AttentionBlock(slice(s // 2, s), slice(0, s), False)


def diagonal_blocks(s: int) -> list[AttentionBlock]:
    """Return what each of a rank's two chunks, of s tokens together, sees of itself."""
    return [AttentionBlock(slice(a, a + s // 2), slice(a, a + s // 2), True) for a in (0, s // 2)]


def past_blocks(rank: int, s: int, cp: int) -> list[AttentionBlock]:
    """Return what each chunk of `rank` sees of the keys before it, which are given by their positions in the
    complete sequence.

    Together with `diagonal_blocks` this is all that the queries of `rank` see.
    """
    length = s // 2
    return [
        AttentionBlock(slice(local * length, (local + 1) * length), slice(0, chunk * length), False)
        for local, chunk in enumerate(chunk_ids(rank, cp))
        if chunk
    ]


def select_query_rows(
    blocks: Sequence[AttentionBlock], query_rows: Sequence[slice]
) -> tuple[list[AttentionBlock], list[AttentionBlock]]:
    """Return what the queries of `query_rows` alone, concatenated, see of `blocks`; queries are counted among
    these rows.

    (diagonal blocks over the rows' own keys, past blocks). The diagonal blocks cover the rows if `blocks` are
    those of the rank's own keys.
    """
    diagonal, past = [], []
    offsets = itertools.accumulate((rows.stop - rows.start for rows in query_rows), initial=0)
    for (rows, offset), block in itertools.product(zip(query_rows, offsets, strict=False), blocks):
        seen = _intersection(block.queries, rows)
        if seen.start >= seen.stop:
            continue
        queries = slice(seen.start - rows.start + offset, seen.stop - rows.start + offset)
        if not block.causal:
            past.append(AttentionBlock(queries, block.keys, False))
            continue
        first = block.keys.start + seen.start - block.queries.start
        diagonal.append(AttentionBlock(queries, slice(first, first + seen.stop - seen.start), True))
        if block.keys.start < first:
            past.append(AttentionBlock(queries, slice(block.keys.start, first), False))
    return diagonal, past


def split_keys(blocks: Sequence[AttentionBlock], max_keys: int) -> list[AttentionBlock]:
    """Split past blocks along their keys, so that none has more than `max_keys`."""
    return [
        AttentionBlock(block.queries, slice(first, min(first + max_keys, block.keys.stop)), False)
        for block in blocks
        for first in range(block.keys.start, block.keys.stop, max_keys)
    ]


# ---- groups of ranks ----------------------------------------------------------------------------


def ulysses_ranks(cp: int, ulysses: int) -> list[list[int]]:
    """Return the groups of ranks, of cp, that exchange heads: adjacent ranks, which launchers place on one
    node."""
    _check_ulysses(cp, ulysses)
    return [list(range(first, first + ulysses)) for first in range(0, cp, ulysses)]


def ring_ranks(cp: int, ulysses: int) -> list[list[int]]:
    """Return the groups of ranks that hold the same heads after the exchange, each in the order of its ring
    of cp/ulysses."""
    _check_ulysses(cp, ulysses)
    return [list(range(first, cp, ulysses)) for first in range(ulysses)]


def _intersection(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _check_ulysses(cp: int, ulysses: int) -> None:
    if ulysses < 1 or cp % ulysses:
        raise UserError(
            f"{cp} context parallel ranks are not divisible by {ulysses} ranks of all-to-all: set "
            "parallel.ulysses to a divisor"
        )


def _chunk_length(seq_length: int, cp: int) -> int:
    count = 2 * cp if cp > 1 else 1
    if seq_length % count:
        low = seq_length // count * count
        nearest = f"{low} and {low + count}" if low else str(count)
        raise UserError(
            f"sequence length {seq_length} is not divisible by 2 x context parallel size = {count}; "
            f"the nearest that are: {nearest}"
        )
    return seq_length // count


def _check_rank(rank: int, cp: int) -> None:
    if not 0 <= rank < cp:
        raise ValueError(f"context parallel rank {rank} is not one of {cp}")
