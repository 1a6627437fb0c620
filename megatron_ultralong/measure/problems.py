"""Random sequences for the attention benchmark, and their attention in float64.

Shapes: S tokens of the whole sequence, s = S/CP of a rank, h query heads, g KV heads, d head dimension; b =
1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.kernels import eager


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One whole sequence."""

    q: Tensor
    """[1, h, S, d]; so is dout."""
    k: Tensor
    """[1, g, S, d]; so is v."""
    v: Tensor
    dout: Tensor
    starts: list[int] | None
    """Positions at which documents start; None = not packed."""

    def shards(self, cp: int) -> list[tuple[Tensor, ...]]:
        """(dout, q, k, v) of every rank."""
        return [
            tuple(zigzag.shard(x, rank, cp, 2).contiguous() for x in (self.dout, self.q, self.k, self.v))
            for rank in range(cp)
        ]


def draw(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    documents: int | None,
    seed: int,
) -> Problem:
    """Normal values; `documents` of random lengths, or None."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, dout = (
        torch.randn(1, count, length, head_dim, generator=generator, device=device, dtype=dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    starts = None
    if documents is not None:
        cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))[: documents - 1] + 1
        starts = [0, *sorted(cuts.tolist())]
    return Problem(q=q, k=k, v=v, dout=dout, starts=starts)


def reference(problem: Problem) -> list[Tensor]:
    """[out, dq, dk, dv] in float64, document by document."""
    dout, q, k, v = (x.double() for x in (problem.dout, problem.q, problem.k, problem.v))
    scale = q.shape[3] ** -0.5
    found = [torch.empty_like(x) for x in (q, q, k, v)]
    for a, b in itertools.pairwise([*(problem.starts or [0]), q.shape[2]]):
        dout_, q_, k_, v_ = (x[:, :, a:b] for x in (dout, q, k, v))
        out, lse = eager.forward(q_, k_, v_, True, scale)
        gradients = eager.backward(dout_, q_, k_, v_, out, lse, True, scale)
        for whole, piece in zip(found, (out, *gradients), strict=True):
            whole[:, :, a:b] = piece
    return found
