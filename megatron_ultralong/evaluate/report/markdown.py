"""Tables of the report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from megatron_ultralong.evaluate.report import published
from megatron_ultralong.evaluate.report.cells import LEGEND, TableCell

CellsByRow = dict[str, dict[str, TableCell]]
"""{row: {column: cell}}"""


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """One table of the report."""

    name: str
    """Of its .csv file and plot."""
    heading: str
    columns: list[str]
    rows: CellsByRow
    published: list[str]
    """The rows with published figures."""

    def shown(self, row: str) -> list[str]:
        """A row's cells with their marks; "-" where a score is missing."""
        return [
            cell.number() + cell.marks() if (cell := self.rows[row].get(column)) else "-"
            for column in self.columns
        ]

    def notes(self, row: str) -> list[str]:
        """The notes of a row's scores, as "COLUMNS: note; note" per group of columns that have them; without
        columns where all have."""
        cells = self.rows[row]
        columns_of: dict[str, dict[str, int]] = {}
        for column, cell in cells.items():
            for note, count in cell.all_notes().items():
                columns_of.setdefault(note, {})[column] = count
        lines: dict[tuple[str, ...], list[str]] = {}
        for note, counts in columns_of.items():
            lines.setdefault(tuple(counts), []).append(_counted(note, counts))
        return [
            ("" if len(columns) == len(cells) else f"{', '.join(columns)}: ") + "; ".join(notes)
            for columns, notes in lines.items()
        ]

    def footnotes(self) -> list[str]:
        """Lines below the table: the legend of its marks, and its notes."""
        marks = {mark for cells in self.rows.values() for cell in cells.values() for mark in cell.marks()}
        return [
            *(f"{mark} {text}" for mark, text in LEGEND.items() if mark in marks),
            *(f"{row}: {line}" for row in self.rows for line in self.notes(row)),
        ]


def _counted(note: str, counts: dict[str, int]) -> str:
    if not any(counts.values()):
        return note
    return f"{note}: " + ", ".join(
        f"{count} at {column}" if len(counts) > 1 else str(count) for column, count in counts.items()
    )


def markdown(table: ReportTable) -> str:
    lines = ["| model | " + " | ".join(table.columns) + " |", "|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        name = row.replace("|", "\\|")
        lines.append(
            f"| {f'*{name}*' if row in table.published else name} | " + " | ".join(table.shown(row)) + " |"
        )
    footnotes = [f"- {line}" for line in table.footnotes()]
    return "\n".join([*lines, *([""] if footnotes else []), *footnotes])


def as_csv(table: ReportTable) -> str:
    """The table with plain numbers, and the notes in the last column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "source", *table.columns, "notes"])
    for row, cells in table.rows.items():
        is_published = row in table.published
        writer.writerow(
            [
                row.removesuffix(" (published)") if is_published else row,
                published.SOURCE if is_published else "measured",
                *(cells[column].number() if column in cells else "-" for column in table.columns),
                ". ".join(table.notes(row)),
            ]
        )
    return text.getvalue()
