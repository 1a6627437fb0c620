"""Random inputs for measuring attention, and their exact attention in float64.

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
from megatron_ultralong.context_parallel.placement import Placement, place


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and dtype of one sequence."""

    length: int
    """S."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    documents: int | None = None
    """Documents of random lengths in the sequence; None = not packed."""


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Inputs and output gradient of attention over one whole sequence."""

    q: Tensor
    """[1, h, S, d]; dout has the same shape."""
    k: Tensor
    """[1, g, S, d]; v has the same shape."""
    v: Tensor
    dout: Tensor
    starts: list[int] | None
    """Positions at which documents start; None = not packed."""

    def placement(self, ranks: int) -> Placement | None:
        """Of a packed sequence, on the ranks of a ring."""
        return None if self.starts is None else place(self.starts, self.q.shape[2], ranks)

    def positions(self, cp: int, ulysses: int) -> list[Tensor]:
        """Return the positions of the tokens of every rank, in local order."""
        placement = self.placement(cp // ulysses)
        if placement is None:
            return [zigzag.positions(self.q.shape[2], rank, cp) for rank in range(cp)]
        return [placement.positions(rank, ulysses) for rank in range(cp)]

    def shards(self, cp: int, ulysses: int) -> list[tuple[Tensor, ...]]:
        """Return (dout, q, k, v) of every rank."""
        return [
            tuple(x[:, :, held.to(x.device)] for x in (self.dout, self.q, self.k, self.v))
            for held in self.positions(cp, ulysses)
        ]


def random_inputs(shape: AttentionShape, device: torch.device, seed: int) -> AttentionInputs:
    """Draw normally distributed inputs and, if the sequence is packed, document borders."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, dout = (
        torch.randn(
            1, count, shape.length, shape.head_dim, generator=generator, device=device, dtype=shape.dtype
        )
        for count in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    starts = None if shape.documents is None else random_starts(shape.length, shape.documents, seed)
    return AttentionInputs(q=q, k=k, v=v, dout=dout, starts=starts)


def random_starts(length: int, documents: int, seed: int) -> list[int]:
    """Where this many documents of random lengths start in a row."""
    borders = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))
    return [0, *sorted((borders[: documents - 1] + 1).tolist())]


def float64_reference(inputs: AttentionInputs) -> list[Tensor]:
    """Return [out, dq, dk, dv] in float64, computed document by document."""
    dout, q, k, v = (x.double() for x in (inputs.dout, inputs.q, inputs.k, inputs.v))
    scale = q.shape[3] ** -0.5
    results = [torch.empty_like(x) for x in (q, q, k, v)]
    for a, b in itertools.pairwise([*(inputs.starts or [0]), q.shape[2]]):
        dout_, q_, k_, v_ = (x[:, :, a:b] for x in (dout, q, k, v))
        out, lse = eager.forward(q_, k_, v_, True, scale)
        gradients = eager.backward(dout_, q_, k_, v_, out, lse, True, scale)
        for result, document in zip(results, (out, *gradients), strict=True):
            result[:, :, a:b] = document
    return results
