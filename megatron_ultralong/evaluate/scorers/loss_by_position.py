"""Loss by position: sums over buckets of positions, added up over rows, micro-batches and ranks.

The token at position p of a row (from 0 on) is what the label there is foretold after p + 1 tokens. Buckets
are by powers of two (up to 1K, 1K to 2K, 2K to 4K ...) and by sixteenths of the length; both are read off the
stretches between all their edges.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

FIRST = 1024
"""Where the first bucket ends, tokens."""
PARTS = 16
"""Equal parts that a length is cut into beside."""


def doubling(length: int) -> list[int]:
    """Edges by powers of two: 0, 1K, 2K, 4K ... length."""
    edges = [0]
    edge = FIRST
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def equal(length: int) -> list[int]:
    """Edges of 16 equal parts; fewer where the length has fewer tokens."""
    return sorted({length * i // PARTS for i in range(PARTS + 1)})


def edges(length: int) -> list[int]:
    return sorted({*doubling(length), *equal(length)})


def sums(nll: Tensor, counts: Tensor, positions: Tensor, length: int) -> Tensor:
    """Float64 [2, stretches]: the sum of nll x counts, and of counts, in each stretch between
    `edges(length)`; positions beyond are left out.

    nll, counts [b, t]: losses of tokens, and 1 where one counts; positions int64 [t].
    """
    borders = torch.tensor(edges(length), device=nll.device)
    stretch = torch.bucketize(positions, borders, right=True) - 1  # [t]
    inside = positions < length
    found = torch.zeros(2, len(borders) - 1, dtype=torch.float64, device=nll.device)
    weights = counts.double()[:, inside]
    # A token that does not count may have any loss, infinite too.
    losses = torch.where(weights > 0, nll.double()[:, inside] * weights, 0.0)
    found[0].index_add_(0, stretch[inside], losses.sum(dim=0))
    found[1].index_add_(0, stretch[inside], weights.sum(dim=0))
    return found


def summary(found: Tensor, length: int) -> dict[str, Any]:
    """Of `sums`: nll, perplexity and tokens, over all (None where no token counts) and `by_position` and
    `by_sixteenth`."""
    borders = edges(length)

    def within(low: int, high: int) -> dict[str, Any]:
        inside = [i for i, (a, b) in enumerate(itertools.pairwise(borders)) if low <= a and b <= high]
        loss, tokens = found[:, inside].sum(dim=1).tolist()
        nll = loss / tokens if tokens else None
        return {
            "nll": nll,
            "perplexity": None if nll is None else math.exp(min(nll, 700.0)),
            "tokens": int(tokens),
        }

    def table(bounds: list[int]) -> list[dict[str, Any]]:
        return [{"from": low, "to": high, **within(low, high)} for low, high in itertools.pairwise(bounds)]

    return {**within(0, length), "by_position": table(doubling(length)), "by_sixteenth": table(equal(length))}
