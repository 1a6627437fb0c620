"""Tables of the report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from megatron_ultralong.evaluate.report import published
from megatron_ultralong.evaluate.report.cells import LEGEND, Cell

Rows = dict[str, dict[str, Cell]]
"""By row and column."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the report."""

    name: str
    """Of its files."""
    heading: str
    columns: list[str]
    rows: Rows
    theirs: list[str]
    """Which rows are published."""

    def shown(self, row: str) -> list[str]:
        """A row's cells with their marks; "-" where there is no score."""
        return [
            cell.number() + cell.marks() if (cell := self.rows[row].get(column)) else "-"
            for column in self.columns
        ]

    def notes(self, row: str) -> list[str]:
        """What a row's scores are told with, "COLUMNS: note; note" for those that have it; no columns where
        all have."""
        cells = self.rows[row]
        found: dict[str, dict[str, int]] = {}
        for column, cell in cells.items():
            for note, count in cell.told().items():
                found.setdefault(note, {})[column] = count
        lines: dict[tuple[str, ...], list[str]] = {}
        for note, counts in found.items():
            lines.setdefault(tuple(counts), []).append(_counted(note, counts))
        return [
            ("" if len(columns) == len(cells) else f"{', '.join(columns)}: ") + "; ".join(notes)
            for columns, notes in lines.items()
        ]

    def foot(self) -> list[str]:
        """Lines below it: what its marks mean, and its notes."""
        found = {mark for cells in self.rows.values() for cell in cells.values() for mark in cell.marks()}
        return [
            *(f"{mark} {text}" for mark, text in LEGEND.items() if mark in found),
            *(f"{row}: {line}" for row in self.rows for line in self.notes(row)),
        ]


def _counted(note: str, counts: dict[str, int]) -> str:
    if not any(counts.values()):
        return note
    return f"{note}: " + ", ".join(
        f"{count} at {column}" if len(counts) > 1 else str(count) for column, count in counts.items()
    )


def markdown(table: Table) -> str:
    lines = ["| model | " + " | ".join(table.columns) + " |", "|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        name = row.replace("|", "\\|")
        lines.append(
            f"| {f'*{name}*' if row in table.theirs else name} | " + " | ".join(table.shown(row)) + " |"
        )
    foot = [f"- {line}" for line in table.foot()]
    return "\n".join([*lines, *([""] if foot else []), *foot])


def as_csv(table: Table) -> str:
    """The same with plain numbers, and what they are told with in the last column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "source", *table.columns, "notes"])
    for row, cells in table.rows.items():
        theirs = row in table.theirs
        writer.writerow(
            [
                row.removesuffix(" (published)") if theirs else row,
                published.SOURCE if theirs else "measured",
                *(cells[column].number() if column in cells else "-" for column in table.columns),
                ". ".join(table.notes(row)),
            ]
        )
    return text.getvalue()
