"""Packed rows on context-parallel ranks, for tests that give documents by their starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.placement import Placement, place
from megatron_ultralong.context_parallel.zigzag import AttentionBlock


def placed(
    starts: Sequence[int] | None, length: int, ranks: int, ranks_per_node: int = 1
) -> Placement | None:
    """A row of this length on the ranks of a ring; None where it is one document."""
    one = starts is None or len(starts) == 1
    return None if one else place(starts, length, ranks, ranks_per_node)


def held(
    length: int,
    rank: int,
    cp: int,
    starts: Sequence[int] | None = None,
    ulysses: int = 1,
    ranks_per_node: int = 1,
) -> Tensor:
    """The positions of a rank's tokens."""
    placement = placed(starts, length, cp // ulysses, ranks_per_node)
    return zigzag.positions(length, rank, cp) if placement is None else placement.positions(rank, ulysses)


def joined(parts: Sequence[Tensor], starts: Sequence[int] | None, ulysses: int = 1, dim: int = 2) -> Tensor:
    """The tokens of all ranks, along `dim`, in order of position."""
    cp, length = len(parts), len(parts) * parts[0].shape[dim]
    positions = torch.cat([held(length, rank, cp, starts, ulysses) for rank in range(cp)])
    found = torch.cat(list(parts), dim)
    return found.index_select(dim, positions.argsort().to(found.device))


def own_blocks(starts: Sequence[int], length: int) -> list[AttentionBlock]:
    """The diagonal blocks of a packed row on one rank."""
    return place(starts, length, 1).schedules[0].own
