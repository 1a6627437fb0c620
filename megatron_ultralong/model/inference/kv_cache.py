"""The KV cache of a pipeline stage: keys and values of the tokens read so far that this context-parallel rank
holds.

Two caches can form a chain: the tokens of one question after a context that many questions share.

Shapes: g KV heads of this tensor-parallel rank, d head dimension, n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """A range of tokens that follows those of `before`, filled in order of position."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        before: KVCache | None = None,
        **kind: Any,
    ) -> None:
        """capacity: tokens that this rank has room for (`reserve` makes more). kind: dtype and device."""
        assert before is None or before.before is None
        self.before: KVCache | None = before
        self.start: int = before.end if before else 0
        """Position of its first token."""
        self.end: int = self.start
        """Position after its last token, on any rank."""
        self.held = 0
        """Tokens that this rank holds."""
        self._runs: list[tuple[int, int]] = []
        """(first position, count) of the runs of tokens that this rank holds."""
        self._kv = [torch.empty(2, 1, kv_heads, capacity, head_dim, **kind) for _ in range(layers)]

    @property
    def chain(self) -> list[KVCache]:
        return [self.before, self] if self.before else [self]

    @property
    def capacity(self) -> int:
        """Tokens that this rank has room for."""
        return self._kv[0].shape[3]

    def kept(self, layer: int, more: int = 0) -> tuple[Tensor, Tensor]:
        """Return this rank's keys and values of a layer, [1, g, held + more, d] each. more: tokens that were
        put but not yet counted by `advance`."""
        k, v = self._kv[layer]
        return k[:, :, : self.held + more], v[:, :, : self.held + more]

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append k and v [1, g, n, d] of a layer; `advance` counts them once every layer has done so."""
        n = k.shape[2]
        for kept, new in zip(self._kv[layer], (k, v), strict=True):
            kept[:, :, self.held : self.held + n] = new

    def advance(self, tokens: int, first: int, n: int) -> None:
        """Count `tokens` tokens read by all ranks, of which this one put `n`, from position `first` on."""
        if n:
            self._runs.append((first, n))
        self.held += n
        self.end += tokens

    def truncate(self, end: int) -> None:
        """Remove the tokens from position `end` on."""
        assert self.start <= end <= self.end
        self._runs = [(first, min(n, end - first)) for first, n in self._runs if first < end]
        self.held = sum(n for _, n in self._runs)
        self.end = end

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens of this rank, one layer at a time: at most one layer exists
        twice."""
        for layer, old in enumerate(self._kv):
            if old.shape[3] < capacity:
                new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
                new[:, :, :, : self.held] = old[:, :, :, : self.held]
                self._kv[layer] = new
                del old


def kv_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return 2 * layers * kv_heads * head_dim * itemsize * tokens
