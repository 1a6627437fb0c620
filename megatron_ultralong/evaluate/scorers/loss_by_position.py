"""Loss by position: sums over buckets of positions, accumulated over rows, micro-batches and ranks.

The token at position p of a row (from 0) is the label that is predicted from p + 1 tokens. There are two sets
of buckets: powers of two (up to 1K, 1K to 2K, 2K to 4K ...) and sixteenths of the length. Both are computed
from the intervals between all their edges.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 1024
"""End of the first power-of-two bucket, tokens."""
PARTS = 16
"""Number of equal parts of a length."""


def doubling(length: int) -> list[int]:
    """Edges of the power-of-two buckets: 0, 1K, 2K, 4K ... length."""
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
    """All edges."""
    return sorted({*doubling(length), *equal(length)})


def zeros(length: int, device: Any = None) -> Tensor:
    """Sums of no tokens, float64 [2, intervals]."""
    import torch

    return torch.zeros(2, len(edges(length)) - 1, dtype=torch.float64, device=device)


def sums(nll: Tensor, mask: Tensor, positions: Tensor, length: int) -> Tensor:
    """Float64 [2, intervals]: the sum of nll x mask, and of mask, in each interval of `edges(length)`;
    positions beyond are ignored.

    nll, mask [b, t]: losses of tokens, and 1 where one counts; positions int64 [t].
    """
    import torch

    borders = torch.tensor(edges(length), device=nll.device)
    interval = torch.bucketize(positions, borders, right=True) - 1  # [t]
    inside = positions < length
    total = zeros(length, nll.device)
    weights = mask.double()[:, inside]
    # A masked token may have any loss, including infinity.
    losses = torch.where(weights > 0, nll.double()[:, inside] * weights, 0.0)
    total[0].index_add_(0, interval[inside], losses.sum(dim=0))
    total[1].index_add_(0, interval[inside], weights.sum(dim=0))
    return total


def summary(total: Tensor, length: int) -> dict[str, Any]:
    """nll, perplexity and tokens (None where no token counts) of all of `sums`, `by_position` and
    `by_sixteenth`."""
    borders = edges(length)

    def within(low: int, high: int) -> dict[str, Any]:
        inside = [i for i, (a, b) in enumerate(itertools.pairwise(borders)) if low <= a and b <= high]
        loss, tokens = total[:, inside].sum(dim=1).tolist()
        nll = loss / tokens if tokens else None
        return {
            "nll": nll,
            "perplexity": None if nll is None else math.exp(min(nll, 700.0)),
            "tokens": int(tokens),
        }

    def buckets(bounds: list[int]) -> list[dict[str, Any]]:
        return [{"from": low, "to": high, **within(low, high)} for low, high in itertools.pairwise(bounds)]

    return {
        **within(0, length),
        "by_position": buckets(doubling(length)),
        "by_sixteenth": buckets(equal(length)),
    }
