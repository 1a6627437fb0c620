"""The zigzag order of context parallelism: which tokens a rank holds, and which of them may see each other.

S tokens of the whole sequence, cp ranks, s = S/cp tokens of one rank. The sequence is cut into 2 cp equal pieces; rank r
holds piece r and piece 2 cp - 1 - r, in that order. Under a causal mask every rank then has the same work. Nothing else
in the library knows this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.config import UserError


class Part(NamedTuple):
    """The part of one rank's queries and of another's keys between which attention is to be computed."""

    queries: slice
    """Of the s local queries."""
    keys: slice
    """Of the s keys of the other rank."""
    causal: bool
    """Query i of the part sees keys 0..i of the part (both are then as long); otherwise every query sees every key."""


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
    """What `rank` holds of `x`, cut along `dim` (S -> s); `x` itself where cp is 1. UserError as for `positions`."""
    _check_rank(rank, cp)
    if cp == 1:
        return x
    length = _piece_length(x.shape[dim], cp)
    return torch.cat([x.narrow(dim, p * length, length) for p in pieces(rank, cp)], dim=dim)


def unshard(shards: Sequence[Tensor], dim: int) -> Tensor:
    """The whole of what `shard` cut: the share of every rank, in rank order -> S along `dim`."""
    cp = len(shards)
    if cp == 1:
        return shards[0]
    if cp == 0 or any(x.shape != shards[0].shape for x in shards) or shards[0].shape[dim] % 2:
        raise ValueError(f"shards of shapes {[tuple(x.shape) for x in shards]} are not the zigzag shares of one tensor")
    whole: dict[int, Tensor] = {}
    for rank, x in enumerate(shards):
        whole.update(zip(pieces(rank, cp), x.chunk(2, dim=dim), strict=True))
    return torch.cat([whole[p] for p in range(2 * cp)], dim=dim)


def part(rank: int, source: int, s: int) -> Part:
    """What the queries of `rank` see of the keys of `source`, under the causal mask over the whole sequence.

    A lower rank's first piece lies before, its second piece after both of ours; a higher rank's pieces both lie between
    ours. Our own two pieces are in ascending order, so the mask among them is the plain causal one.
    """
    if source == rank:
        return Part(slice(0, s), slice(0, s), True)
    if source < rank:
        return Part(slice(0, s), slice(0, s // 2), False)
    return Part(slice(s // 2, s), slice(0, s), False)


def _piece_length(seq_length: int, cp: int) -> int:
    count = 2 * cp if cp > 1 else 1
    if seq_length % count:
        low = seq_length // count * count
        near = f"{low} and {low + count}" if low else str(count)
        raise UserError(f"sequence length {seq_length} is not divisible by 2 x context parallel size = {count}; "
                        f"the nearest that are: {near}")
    return seq_length // count


def _check_rank(rank: int, cp: int) -> None:
    if not 0 <= rank < cp:
        raise ValueError(f"context parallel rank {rank} is not one of {cp}")
