"""The zigzag order: which tokens a context-parallel rank holds, and which blocks of attention it computes.

S tokens of the complete sequence, cp ranks, s = S/cp tokens per rank. The sequence is cut into 2 cp equal
chunks; rank r holds chunks r and 2 cp - 1 - r, in that order, so that under a causal mask every rank has the
same work. No other module knows this order.

The order nests: the shards of U adjacent ranks r U .. r U + U - 1, joined by `unshard` as if they were a
complete sequence, are the shard of rank r among cp/U. Ulysses inside a ring relies on this (ulysses.py).

Packed rows: `document_starts` are the positions in the complete row at which its documents start, ascending,
the first 0. The row is cut like any other; a token attends to its own document only. A rank's tokens of one
document are one contiguous range of its local tokens, possibly empty: it holds no token between its two
chunks.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.host_values import copy_to_device
from megatron_ultralong.errors import UserError


class AttentionBlock(NamedTuple):
    """A block of the attention matrix: queries of one rank against keys of the same or another rank."""

    queries: slice
    """Among the s local queries."""
    keys: slice
    """Among the s keys of the other rank; in `past_blocks` positions in the complete sequence."""
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


def document_positions(
    document_starts: Sequence[int],
    seq_length: int,
    rank: int,
    cp: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """As `positions`, counted from the start of each token's document: int64 [s]."""
    row_positions = positions(seq_length, rank, cp, device)
    starts = copy_to_device(torch.tensor(check_document_starts(document_starts, seq_length)), device)
    return row_positions - starts[torch.bucketize(row_positions, starts, right=True) - 1]


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


def blocks_between(
    rank: int, source: int, s: int, cp: int, document_starts: Sequence[int] = (0,)
) -> list[AttentionBlock]:
    """Return what is left of `block_between` if attention stays inside documents.

    Own keys: one diagonal block for every document of which the rank holds tokens, in ascending order;
    together they cover all queries without a gap. Another rank's keys: at most one past block, because keys
    that all lie before the queries share at most one document with them.
    """
    if source == rank:
        return _diagonal(_local_document_bounds(document_starts, s, rank, cp))
    unpacked = block_between(rank, source, s)
    last_local, length = unpacked.keys.stop - 1, s // 2
    last_key = chunk_ids(source, cp)[last_local // length] * length + last_local % length
    document = _document_at(document_starts, last_key, s * cp)
    queries = _intersection(_local_range(document, s, rank, cp), unpacked.queries)
    keys = _intersection(_local_range(document, s, source, cp), unpacked.keys)
    return [AttentionBlock(queries, keys, False)] if queries.start < queries.stop else []


def diagonal_blocks(
    rank: int, s: int, cp: int, document_starts: Sequence[int] = (0,)
) -> list[AttentionBlock]:
    """Return what each chunk of `rank` sees of itself: diagonal blocks in ascending order that cover all
    queries without a gap."""
    length = s // len(chunk_ids(rank, cp))
    return _diagonal(sorted({*_local_document_bounds(document_starts, s, rank, cp), length}))


def past_blocks(rank: int, s: int, cp: int, document_starts: Sequence[int] = (0,)) -> list[AttentionBlock]:
    """Return what each chunk of `rank` sees of the keys before it, which are given by their positions in the
    complete sequence: at most one past block per chunk.

    Together with `diagonal_blocks` this is all that the queries of `rank` see.
    """
    length = s // len(chunk_ids(rank, cp))
    blocks = []
    for local, chunk in enumerate(chunk_ids(rank, cp)):
        first = chunk * length
        document = _document_at(document_starts, first, s * cp)
        if document.start < first:
            queries = min(document.stop - first, length)
            rows = slice(local * length, local * length + queries)
            blocks.append(AttentionBlock(rows, slice(document.start, first), False))
    return blocks


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


def check_document_starts(document_starts: Sequence[int], seq_length: int) -> tuple[int, ...]:
    """Return `document_starts` as a tuple. Raises UserError unless they are 0 followed by ascending positions
    of the row."""
    starts = tuple(document_starts)
    ascending = all(a < b for a, b in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] >= seq_length or not ascending:
        shown = ", ".join(map(str, starts[:5])) + (", ..." if len(starts) > 5 else "")
        raise UserError(
            f"document starts [{shown}] are not 0 followed by ascending positions below the sequence length "
            f"{seq_length}; prepare the data again"
        )
    return starts


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


def _diagonal(bounds: Sequence[int]) -> list[AttentionBlock]:
    return [AttentionBlock(slice(a, b), slice(a, b), True) for a, b in itertools.pairwise(bounds)]


def _document_at(document_starts: Sequence[int], position: int, seq_length: int) -> slice:
    """The positions of the document that contains `position`."""
    following = bisect.bisect_right(document_starts, position)
    stop = document_starts[following] if following < len(document_starts) else seq_length
    return slice(document_starts[following - 1], stop)


def _local_range(document: slice, s: int, rank: int, cp: int) -> slice:
    """The local tokens of `rank` that belong to a document given by its positions; may be empty."""
    length = s // len(chunk_ids(rank, cp))

    def held_before(position: int) -> int:
        return sum(min(max(position - chunk * length, 0), length) for chunk in chunk_ids(rank, cp))

    return slice(held_before(document.start), held_before(document.stop))


def _local_document_bounds(document_starts: Sequence[int], s: int, rank: int, cp: int) -> list[int]:
    """Where one document ends and another begins among the local tokens of `rank`, from 0 to s inclusive."""
    length = s // len(chunk_ids(rank, cp))
    bounds, begun = [], 0  # begun: documents that start before the current token
    for local, chunk in enumerate(chunk_ids(rank, cp)):
        first = chunk * length
        low = bisect.bisect_right(document_starts, first)
        high = bisect.bisect_left(document_starts, first + length)
        if low > begun:
            bounds.append(local * length)
        bounds += [start - first + local * length for start in document_starts[low:high]]
        begun = max(low, high)
    return [*bounds, s]


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
