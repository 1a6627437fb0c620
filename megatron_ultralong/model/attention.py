"""Core attention: RoPE for this rank's own positions, then attention over the context-parallel ranks.

Shapes: s tokens of this context-parallel rank (S/CP), b sequences, h query heads and g KV heads of this
tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import api, zigzag
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import rank_and_size
from megatron_ultralong.context_parallel.host_values import copy_to_device
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.model.rotary_embedding import FrequencyGradient, HeadNorm, cos_sin, split_and_rotate
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.clex import CLEX, with_network


class Angles(NamedTuple):
    """What rotates the tokens of one rank, in their local order."""

    cos: Tensor
    """float32 [S/CP, d/2]."""
    sin: Tensor
    """float32 [S/CP, d/2]."""
    positions: Tensor
    """int64 [S/CP], or float64 with a `Draw`."""


@dataclass(frozen=True)
class Draw:
    """Frequencies and positions of one training iteration of a RoPE method that trains its frequencies."""

    frequencies: Tensor
    """float32 [d/2]."""
    positions: Tensor
    """float64 [S], of all tokens of a sequence in their order."""
    gradient: Tensor
    """float64 [d/2] on the device; the backward passes of the iteration add the frequencies' gradient of this
    rank."""


class RotaryTable:
    """cos and sin of the positions of one rank; one table serves every layer of the stage.

    Caches the last sequence length only: 8 bytes per token and frequency (128 MiB at 256K tokens per rank and
    head_dim 128).
    """

    def __init__(self, rope: Rope, head_dim: int, by_document: bool = False) -> None:
        """by_document: positions restart in each document of a packed row."""
        self.by_document = by_document
        rope.inverse_frequencies(head_dim)  # refuse settings that do not fit, before any weight is read
        if isinstance(rope, CLEX):
            rope = with_network(rope, rope.network(head_dim))
        self.rope, self.head_dim = rope, head_dim  # the method with its network, if it has one
        self._draw: Draw | None = None
        self._key: tuple[Any, ...] | None = None
        self._angles: Angles | None = None

    @property
    def draw(self) -> Draw | None:
        """What this iteration trains with; None = the method's own frequencies and positions."""
        return self._draw

    @draw.setter
    def draw(self, draw: Draw | None) -> None:
        self._draw, self._key, self._angles = draw, None, None

    def __call__(
        self,
        seq_length: int,
        cp_rank: int,
        cp: int,
        device: torch.device,
        placement: Placement | None = None,
        ulysses: int = 1,
    ) -> Angles:
        """Return the angles of the tokens of `cp_rank`: a zigzag shard, or its tokens of a packed row that is
        placed on groups of `ulysses` ranks."""
        key = (seq_length, cp_rank, cp, device, placement)
        if key != self._key or self._angles is None:
            if placement is None:
                positions = zigzag.positions(seq_length, cp_rank, cp, device=device)
            elif self.by_document:
                positions = copy_to_device(placement.document_positions(cp_rank, ulysses), device)
            else:
                positions = copy_to_device(placement.positions(cp_rank, ulysses), device)
            if self._draw is None:
                frequencies, factor = self.rope.inverse_frequencies(self.head_dim, seq_length)
            else:
                frequencies, factor = self._draw.frequencies, 1.0
                positions = self._draw.positions.to(device)[positions]
            cos, sin = cos_sin(positions, frequencies, factor)
            self._angles = Angles(cos, sin, positions)
            self._key = key
        return self._angles


class CoreAttention(torch.nn.Module):
    """Causal attention over the complete sequence, of which each context-parallel rank holds two zigzag
    chunks; or inside the documents of a packed row, of which it holds the tokens of its placement.

    q [b, h, s, d], k and v [b, g, s, d] of this rank, rotated by `split_and_rotate`. Layers that run outside
    autograd call the functions of context_parallel/api.py with `groups` and `spec`.
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
        self.norms: tuple[torch.nn.Module, ...] = ()
        """The norms of queries and of keys, which belong to the layer, where the model has them."""

    @property
    def head_norm(self) -> HeadNorm | None:
        """The norm of queries and keys before RoPE, if any."""
        if not self.norms:
            return None
        q, k = self.norms
        return HeadNorm(q.weight, k.weight, q.eps)

    def split_and_rotate(
        self,
        qkv: Tensor,
        kv_heads: int,
        rows: slice,
        t: int,
        tp_shards: int,
        placement: Placement | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split a projection [c, b, (h + 2 g) d] into q [b, h, c, d], k and v [b, g, c, d], g = `kv_heads`,
        and normalise (`head_norm`) and rotate q and k.

        It holds `rows` of each of the `tp_shards` shards of t tokens that make up this rank's s tokens.
        """
        cp, (_, ulysses) = self.groups.size, rank_and_size(self.groups.ulysses)
        angles = self.rotary(t * tp_shards * cp, self.groups.rank, cp, qkv.device, placement, ulysses)
        cos, sin, positions = (x.unflatten(0, (tp_shards, t))[:, rows].flatten(0, 1) for x in angles)
        draw = self.rotary.draw
        gradient = None if draw is None else FrequencyGradient(draw.gradient, positions)
        return split_and_rotate(qkv, kv_heads, cos, sin, gradient, self.head_norm)

    def spec(self, placement: Placement | None, query_rows: Sequence[slice] | None = None) -> AttentionSpec:
        """Return what this layer computes, for api.py; query_rows: the local tokens of q, None = all."""
        return AttentionSpec(scale=self.scale, placement=placement, query_rows=query_rows)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, placement: Placement | None = None) -> Tensor:
        """Return the output [b, h, s, d], differentiable."""
        return api.attention(q, k, v, self.groups, self.spec(placement))
