"""Core attention: RoPE for this rank's own positions, then attention over the context-parallel ranks.

Shapes: s tokens of this context-parallel rank (S/CP), b sequences, h query heads and g KV heads of this
tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import Rope
from megatron_ultralong.context_parallel import api, zigzag
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.context_parallel.zigzag import Starts
from megatron_ultralong.model.rope import apply_rope, cos_sin
from megatron_ultralong.rope.methods import inverse_frequencies


class RotaryTable:
    """cos and sin of the positions that one rank holds; one table serves every layer of the stage.

    Kept for the last sequence length only: 8 bytes a token and frequency (128 MiB at 256K tokens a rank and
    head_dim 128).
    """

    def __init__(self, rope: Rope, head_dim: int, by_document: bool = False) -> None:
        """by_document: positions count anew in each document of a packed row."""
        self.by_document = by_document
        self.inverse_frequencies, self.attention_factor = inverse_frequencies(rope, head_dim)
        self._key: tuple[Any, ...] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, seq_length: int, cp_rank: int, cp: int, device: torch.device, starts: Starts | None = None
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32 [S/CP, d/2], of the zigzag positions of `cp_rank`. starts: of the row's
        documents."""
        starts = starts if self.by_document else None
        key = (seq_length, cp_rank, cp, device, starts)
        if key != self._key or self._tables is None:
            positions = (
                zigzag.positions(seq_length, cp_rank, cp, device=device)
                if starts is None
                else zigzag.document_positions(starts, seq_length, cp_rank, cp, device=device)
            )
            self._tables = cos_sin(positions, self.inverse_frequencies.to(device), self.attention_factor)
            self._key = key
        return self._tables


class CoreAttention(torch.nn.Module):
    """Causal attention over the whole sequence, of which each context-parallel rank holds two zigzag pieces.

    q [b, h, s, d], k and v [b, g, s, d] of this rank, rotated by `rotate`; out [b, h, s, d], lse float32 [b,
    h, s]. starts: where documents start in the row, where attention is to stay inside them; None = one
    document.
    """

    def __init__(
        self,
        *,
        config: Any,
        rotary: RotaryTable,
        groups: ContextGroups,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.groups = groups
        self.scale = softmax_scale

    def rotate(
        self, q: Tensor, k: Tensor, rows: slice, whole: int, parts: int, starts: Starts | None = None
    ) -> tuple[Tensor, Tensor]:
        """RoPE of q [b, h, c, d] and k [b, g, c, d], which hold `rows` of each of `parts` equal stretches of
        this rank's s tokens, `whole` tokens each."""
        cp = self.groups.size
        angles = self.rotary(whole * parts * cp, self.groups.rank, cp, q.device, starts)
        cos, sin = (x.unflatten(0, (parts, whole))[:, rows].flatten(0, 1) for x in angles)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Starts | None = None) -> Tensor:
        """out, differentiable."""
        return api.attention(q, k, v, self.groups, scale=self.scale, starts=starts)

    def forward_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Starts | None, rows: list[slice] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), outside autograd; with them `backward` needs no second forward. rows: the local tokens
        that q holds; None = all."""
        return api.attention_forward(q, k, v, self.groups, scale=self.scale, starts=starts, rows=rows)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        starts: Starts | None,
        rows: list[slice] | None = None,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv); with rows dk and dv are their shares, in float32, added to the two halves of `sums`
        where it is given."""
        return api.attention_backward(
            dout, q, k, v, out, lse, self.groups, scale=self.scale, starts=starts, rows=rows, sums=sums
        )
