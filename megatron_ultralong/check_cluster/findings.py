"""What a check returns: lines of a table, figures for the JSON file, and problems with what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 80
"""Columns that the table fits."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of one check, the same on every rank."""

    title: str
    lines: tuple[str, ...] = ()
    """Text for the table."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, for the JSON file."""
    problems: tuple[str, ...] = ()
    """A line each: what is wrong, and what to change."""


def ranges(ranks: Iterable[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def on_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 0-3 (node-a)`: some ranks and their hosts; `hosts` are those of all ranks."""
    named = sorted({hosts[rank] for rank in ranks})
    if len(named) > 3:
        named = [*named[:2], f"{len(named) - 2} more"]
    return f"rank {ranges(ranks)} ({', '.join(named)})"


def by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    """The ranks that have each value, the most frequent value first."""
    groups: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])))


def table(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Columns with two spaces between them, the first to the left; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return tuple(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number_of_bytes(count: float) -> str:
    """`1.5 GB`, in powers of 1000 as links and disks are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"
