"""The zigzag order of context parallelism: which tokens a rank holds, and which of them may see each other.

S tokens of the whole sequence, cp ranks, s = S/cp tokens of one rank. The sequence is cut into 2 cp equal
pieces; rank r holds piece r and piece 2 cp - 1 - r, in that order. Under a causal mask every rank then has
the same work. Nothing else in the library knows this order.

The order nests: the shares of U adjacent ranks r U .. r U + U - 1, put together by `unshard` as if they were
the whole, are the share of rank r among cp/U. This is what all-to-all inside a ring stands on (ulysses.py).

Packed rows: `starts` are the positions, in the whole row, at which its documents start, the first 0,
ascending. The row is cut like any other; a token sees only its own document. What a rank holds of one
document is one run of its local tokens (or nothing), since it holds all that lies between its two pieces or
none of it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from megatron_ultralong.errors import UserError

Starts: TypeAlias = "Sequence[int] | Tensor"
"""Document starts of one packed row; best as numbers or on the CPU, for the host reads them."""


class Part(NamedTuple):
    """The part of one rank's queries and of another's keys between which attention is to be computed."""

    queries: slice
    """Of the s local queries."""
    keys: slice
    """Of the s keys of the other rank (`parts`), or of the S keys in order of position (`parts_before`)."""
    causal: bool
    """Query i of the part sees keys 0..i of the part (both are then as long); otherwise every query sees
    every key."""


def pieces(rank: int, cp: int) -> tuple[int, ...]:
    """The pieces that `rank` holds, of 2 cp (of one where cp is 1), in local order."""
    _check_rank(rank, cp)
    return (rank, 2 * cp - 1 - rank) if cp > 1 else (0,)


def positions(seq_length: int, rank: int, cp: int, device: torch.device | str | None = None) -> Tensor:
    """Global positions of the tokens that `rank` holds, in local order: int64 [s], ascending.

    UserError where the sequence cannot be cut into 2 cp equal pieces.
    """
    _check_rank(rank, cp)
    length = _piece_length(seq_length, cp)
    return torch.cat([torch.arange(p * length, (p + 1) * length, device=device) for p in pieces(rank, cp)])


def shard(x: Tensor, rank: int, cp: int, dim: int) -> Tensor:
    """What `rank` holds of `x`, cut along `dim` (S -> s); `x` itself where cp is 1. UserError as for
    `positions`."""
    _check_rank(rank, cp)
    if cp == 1:
        return x
    length = _piece_length(x.shape[dim], cp)
    return torch.cat([x.narrow(dim, p * length, length) for p in pieces(rank, cp)], dim=dim)


def unshard(shards: Sequence[Tensor], dim: int, out: Tensor | None = None) -> Tensor:
    """The whole of what `shard` cut: the share of every rank, in rank order -> S along `dim`; in `out` where
    it is given (cp > 1)."""
    cp = len(shards)
    if cp == 1:
        return shards[0]
    if cp == 0 or any(x.shape != shards[0].shape for x in shards) or shards[0].shape[dim] % 2:
        raise ValueError(
            f"shards of shapes {[tuple(x.shape) for x in shards]} are not the zigzag shares of one tensor"
        )
    whole: dict[int, Tensor] = {}
    for rank, x in enumerate(shards):
        whole.update(zip(pieces(rank, cp), x.chunk(2, dim=dim), strict=True))
    return torch.cat([whole[p] for p in range(2 * cp)], dim=dim, out=out)


def part(rank: int, source: int, s: int) -> Part:
    """What the queries of `rank` see of the keys of `source`, under the causal mask over the whole sequence.

    A lower rank's first piece lies before, its second piece after both of ours; a higher rank's pieces both
    lie between ours. Our own two pieces are in ascending order, so the mask among them is the plain causal
    one.
    """
    if source == rank:
        return Part(slice(0, s), slice(0, s), True)
    if source < rank:
        return Part(slice(0, s), slice(0, s // 2), False)
    return Part(slice(s // 2, s), slice(0, s), False)


def parts(rank: int, source: int, s: int, cp: int, starts: Sequence[int] = (0,)) -> list[Part]:
    """As `part`, where attention stays inside documents (`starts` as `document_starts` gives them): what is
    left of the part.

    Between other ranks at most one part is left: keys that all lie before the queries share no more than one
    document with them. Of our own keys there is a causal part for every document of which we hold something,
    in ascending order; these cover all queries without a gap.
    """
    if source == rank:
        return [
            Part(slice(a, b), slice(a, b), True) for a, b in itertools.pairwise(_bounds(starts, s, rank, cp))
        ]
    all_seen = part(rank, source, s)
    in_piece, length = all_seen.keys.stop - 1, s // 2
    last_key = pieces(source, cp)[in_piece // length] * length + in_piece % length
    document = _document(starts, last_key, s * cp)
    queries = _common(_run(document, s, rank, cp), all_seen.queries)
    keys = _common(_run(document, s, source, cp), all_seen.keys)
    return [Part(queries, keys, False)] if queries.start < queries.stop else []


def rows_of(parts: Sequence[Part], rows: Sequence[slice]) -> tuple[list[Part], list[Part]]:
    """What `rows` of the local queries, put one after the other, see of `parts`; the queries are counted
    among them.

    (causal parts over the rows' own keys, which cover them where `parts` are our own; all others, none of
    them causal).
    """
    causal, others = [], []
    offsets = itertools.accumulate((run.stop - run.start for run in rows), initial=0)
    for (run, offset), part in itertools.product(zip(rows, offsets, strict=False), parts):
        seen = _common(part.queries, run)
        if seen.start >= seen.stop:
            continue
        queries = slice(seen.start - run.start + offset, seen.stop - run.start + offset)
        if not part.causal:
            others.append(Part(queries, part.keys, False))
            continue
        first = part.keys.start + seen.start - part.queries.start
        causal.append(Part(queries, slice(first, first + seen.stop - seen.start), True))
        if part.keys.start < first:
            others.append(Part(queries, slice(part.keys.start, first), False))
    return causal, others


def key_blocks(parts: Sequence[Part], most: int) -> list[Part]:
    """`parts`, none of them causal, with no more than `most` keys each."""
    return [
        Part(part.queries, slice(first, min(first + most, part.keys.stop)), False)
        for part in parts
        for first in range(part.keys.start, part.keys.stop, most)
    ]


def parts_within(rank: int, s: int, cp: int, starts: Sequence[int] = (0,)) -> list[Part]:
    """What each piece of `rank` sees of itself: causal parts in ascending order that cover all queries
    without a gap."""
    length = s // len(pieces(rank, cp))
    bounds = sorted({*_bounds(starts, s, rank, cp), length})
    return [Part(slice(a, b), slice(a, b), True) for a, b in itertools.pairwise(bounds)]


def parts_before(rank: int, s: int, cp: int, starts: Sequence[int] = (0,)) -> list[Part]:
    """What each piece of `rank` sees of the keys before it, by their positions in the whole sequence: at most
    one part a piece.

    With `parts_within` this is all that the queries of `rank` see.
    """
    length = s // len(pieces(rank, cp))
    found = []
    for local, piece in enumerate(pieces(rank, cp)):
        first = piece * length
        document = _document(starts, first, s * cp)
        if document.start < first:
            queries = min(document.stop - first, length)
            found.append(
                Part(slice(local * length, local * length + queries), slice(document.start, first), False)
            )
    return found


def document_positions(
    starts: Starts, seq_length: int, rank: int, cp: int, device: torch.device | str | None = None
) -> Tensor:
    """As `positions`, counted from the start of each token's document: int64 [s]."""
    held = positions(seq_length, rank, cp, device)
    begins = torch.tensor(document_starts(starts, seq_length), device=device)
    return held - begins[torch.bucketize(held, begins, right=True) - 1]


def document_starts(starts: Starts | None, seq_length: int) -> tuple[int, ...]:
    """`starts` as plain numbers, (0,) for None: one document; UserError where they are not 0 and then
    ascending positions of the row."""
    if starts is None:
        return (0,)
    found = tuple(int(start) for start in (starts.tolist() if isinstance(starts, Tensor) else starts))
    if (
        not found
        or found[0] != 0
        or found[-1] >= seq_length
        or any(a >= b for a, b in itertools.pairwise(found))
    ):
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"document starts [{shown}] are not 0 and then ascending positions below the sequence length {seq_length}; "
            "prepare the data again"
        )
    return found


def ulysses_ranks(cp: int, ulysses: int) -> list[list[int]]:
    """Groups of ranks between which heads are exchanged, of cp: adjacent ones, which launchers place in one
    node."""
    _check_ulysses(cp, ulysses)
    return [list(range(first, first + ulysses)) for first in range(0, cp, ulysses)]


def ring_ranks(cp: int, ulysses: int) -> list[list[int]]:
    """Groups of ranks that hold the same heads after the exchange, each in the order of its ring of
    cp/ulysses."""
    _check_ulysses(cp, ulysses)
    return [list(range(first, cp, ulysses)) for first in range(ulysses)]


def _document(starts: Sequence[int], position: int, seq_length: int) -> slice:
    """The positions of the document that holds `position`."""
    after = bisect.bisect_right(starts, position)
    return slice(starts[after - 1], starts[after] if after < len(starts) else seq_length)


def _run(document: slice, s: int, rank: int, cp: int) -> slice:
    """Where among the local tokens of `rank` a document lies, given by its positions; may be empty."""
    length = s // len(pieces(rank, cp))

    def held_before(position: int) -> int:
        return sum(min(max(position - piece * length, 0), length) for piece in pieces(rank, cp))

    return slice(held_before(document.start), held_before(document.stop))


def _bounds(starts: Sequence[int], s: int, rank: int, cp: int) -> list[int]:
    """Where among the local tokens of `rank` one document ends and another begins, from 0 to s, both
    included."""
    length = s // len(pieces(rank, cp))
    bounds, begun = [], 0  # documents that begin before the current token
    for local, piece in enumerate(pieces(rank, cp)):
        first = piece * length
        low, high = bisect.bisect_right(starts, first), bisect.bisect_left(starts, first + length)
        if low > begun:
            bounds.append(local * length)
        bounds += [start - first + local * length for start in starts[low:high]]
        begun = max(low, high)
    return [*bounds, s]


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _check_ulysses(cp: int, ulysses: int) -> None:
    if ulysses < 1 or cp % ulysses:
        raise UserError(
            f"{cp} context parallel ranks are not divisible by {ulysses} ranks of all-to-all: set parallel.ulysses to a divisor"
        )


def _piece_length(seq_length: int, cp: int) -> int:
    count = 2 * cp if cp > 1 else 1
    if seq_length % count:
        low = seq_length // count * count
        near = f"{low} and {low + count}" if low else str(count)
        raise UserError(
            f"sequence length {seq_length} is not divisible by 2 x context parallel size = {count}; "
            f"the nearest that are: {near}"
        )
    return seq_length // count


def _check_rank(rank: int, cp: int) -> None:
    if not 0 <= rank < cp:
        raise ValueError(f"context parallel rank {rank} is not one of {cp}")
