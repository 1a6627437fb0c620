"""One value that says which attention is computed, passed from the model down to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Backend = Literal["cpu", "flash", "flash3", "flash4", "cudnn", "eager"]
"""Attention kernels (kernels/select.py)."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention; the same on all context-parallel ranks, except `query_rows`."""

    scale: float | None = None
    """Of the logits; None = head_dim ** -0.5."""
    document_starts: Sequence[int] = (0,)
    """Positions in the complete row (b = 1) at which documents start, the first 0; attention stays inside
    them. The default is one document."""
    query_rows: Sequence[slice] | None = None
    """The local tokens whose queries are given, concatenated; None = all s. Ring only (query_rows.py)."""
    backend: Backend | None = None
    """None = the choice of kernels/select.py."""
