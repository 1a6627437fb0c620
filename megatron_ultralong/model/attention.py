"""Core attention: RoPE for this rank's own positions, then the context-parallel ring.

Shapes: s tokens of this context-parallel rank (S/CP), b sequences, h query heads and g KV heads of this tensor-parallel
rank, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import Rope
from megatron_ultralong.context_parallel import layout
from megatron_ultralong.context_parallel.ring import ring_attention, ring_backward, ring_forward
from megatron_ultralong.model.rope import apply_rope, cos_sin, inverse_frequencies


class RotaryTable:
    """cos and sin of the positions that one rank holds; one table serves every layer of the stage.

    Kept for the last sequence length only: 8 bytes a token and frequency (128 MiB at 256K tokens a rank and head_dim 128).
    """

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self.inverse_frequencies, self.attention_factor = inverse_frequencies(rope, head_dim)
        self._key: tuple[Any, ...] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, seq_length: int, cp_rank: int, cp: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32 [S/CP, d/2], of the zigzag positions of `cp_rank`."""
        key = (seq_length, cp_rank, cp, device)
        if key != self._key or self._tables is None:
            positions = layout.positions(seq_length, cp_rank, cp, device=device)
            self._tables = cos_sin(positions, self.inverse_frequencies.to(device), self.attention_factor)
            self._key = key
        return self._tables


class CoreAttention(torch.nn.Module):
    """Causal attention over the whole sequence, of which each context-parallel rank holds two zigzag pieces.

    q [b, h, s, d], k and v [b, g, s, d] of this rank, rotated by `rotate`; out [b, h, s, d], lse float32 [b, h, s].
    """

    def __init__(self, *, config: Any, rotary: RotaryTable, pg_collection: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.group = pg_collection.cp
        self.scale = softmax_scale

    def rotate(self, q: Tensor, k: Tensor, rows: slice, whole: int, parts: int) -> tuple[Tensor, Tensor]:
        """RoPE of q [b, h, c, d] and k [b, g, c, d], which hold `rows` of each of `parts` equal stretches of this rank's s tokens,
        `whole` tokens each."""
        cp = self.group.size()
        angles = self.rotary(whole * parts * cp, self.group.rank(), cp, q.device)
        cos, sin = (x.unflatten(0, (parts, whole))[:, rows].flatten(0, 1) for x in angles)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out, differentiable."""
        return ring_attention(q, k, v, self.group, scale=self.scale)

    def forward_with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse), outside autograd; with them `backward` needs no second forward."""
        return ring_forward(q, k, v, self.group, scale=self.scale)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        return ring_backward(dout, q, k, v, out, lse, self.group, scale=self.scale)
