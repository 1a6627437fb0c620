"""Buckets of documents by length, and how they are written: <4K, 4K-8K, >=8K."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

EDGES = tuple(1024 << k for k in range(11))
"""Edges of the length buckets of reports, tokens: 1K, 2K ... 1M."""


@dataclass(frozen=True, kw_only=True)
class LengthBuckets:
    """How much of each length of document is used. Bucket k contains documents of edges[k - 1] to edges[k] -
    1 tokens."""

    edges: tuple[int, ...]
    """Ascending, tokens; one less than buckets."""
    values: tuple[float, ...]
    """Rate or share of each bucket."""
    shares: bool
    """True: values are shares of the source's tokens, relative to each other. False: rates, how often a
    document is used (0.25 = one in four)."""

    def name(self, bucket: int) -> str:
        """A bucket as written in the file: <4K, 4K-8K, >=8K, all."""
        borders = [_short(edge) for edge in self.edges]
        if not borders:
            return "all"
        if bucket == 0:
            return f"<{borders[0]}"
        return f">={borders[-1]}" if bucket == len(borders) else f"{borders[bucket - 1]}-{borders[bucket]}"


def parse_bucket(name: str) -> tuple[float, float] | None:
    """(first, last + 1) of "<4K", "4K-8K", ">=8K" or "all", tokens; None for anything else."""
    size = r"(\d+[KkMm]?)"
    if name == "all":
        return 0, math.inf
    if match := re.fullmatch(rf"<\s*{size}", name):
        return 0, _count(match[1])
    if match := re.fullmatch(rf"{size}\s*-\s*{size}", name):
        return _count(match[1]), _count(match[2])
    if match := re.fullmatch(rf">=\s*{size}", name):
        return _count(match[1]), math.inf
    return None


def _count(text: str) -> int:
    scale = {"k": 1024, "m": 1024**2}.get(text[-1].lower(), 1)
    return int(text.rstrip("KkMm")) * scale


def _short(count: int) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)
