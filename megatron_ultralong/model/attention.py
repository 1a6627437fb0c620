"""Core attention: RoPE for this rank's own positions, then the context-parallel ring.

Shapes: s tokens of this context-parallel rank (S/CP), b sequences, h query heads and g KV heads of this tensor-parallel
rank, d head dimension. Megatron hands tensors as [s, b, h, d]; the ring takes [b, h, s, d] views of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import Rope
from megatron_ultralong.context_parallel import layout
from megatron_ultralong.context_parallel.ring import ring_attention
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
    """Causal attention over the whole sequence, of which each context-parallel rank holds two zigzag pieces."""

    def __init__(self, *, config: Any, rotary: RotaryTable, pg_collection: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.group = pg_collection.cp
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
                packed_seq_params: Any = None, **unused: Any) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]."""
        assert attention_mask is None and packed_seq_params is None
        s, b, h, d = query.shape
        cp = self.group.size()
        cos, sin = self.rotary(s * cp, self.group.rank(), cp, query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, h or g, s, d]
        out = ring_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self.group, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(s, b, h * d)
