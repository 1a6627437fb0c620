"""One value that says which attention is computed, passed from the model down to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ultralong.context_parallel.placement import Placement

Backend = Literal["cpu", "flash", "flash3", "flash4", "cudnn", "eager"]
"""Attention kernels (kernels/select.py)."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention; the same on all context-parallel ranks, except `query_rows`."""

    scale: float | None = None
    """Of the logits; None = head_dim ** -0.5."""
    placement: Placement | None = None
    """Of a row (b = 1) whose attention stays inside its several documents, on the ranks of the ring; None =
    one document, in the zigzag order."""
    query_rows: Sequence[slice] | None = None
    """The local tokens whose queries are given, concatenated; None = all s. Ring only (query_rows.py)."""
    backend: Backend | None = None
    """None = the choice of kernels/select.py."""
