"""Tables and paragraphs for a terminal: no line is longer than it is wide, or than 80 columns where there is
none."""

from __future__ import annotations

import itertools
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

WIDTH = 80
"""Columns where standard output is no terminal, and at least."""
_FIRST = 20
"""Least width of a first column that is folded."""
_CELL = 10
"""Greatest width of a cell that is never folded."""
_NO_NOTES: Mapping[int, str] = MappingProxyType({})


def width() -> int:
    """Columns that a line may have."""
    try:
        return max(WIDTH, os.get_terminal_size(sys.stdout.fileno()).columns)
    except (OSError, ValueError, AttributeError):  # no terminal, or no file
        return WIDTH


def paragraphs(lines: Iterable[str], indent: str = "  ") -> list[str]:
    """Fold each line that is too long; `indent` begins its further lines."""
    return [
        folded
        for line in lines
        for folded in textwrap.wrap(
            line, width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        or [""]
    ]


def text_table(
    rows: Sequence[Sequence[str]], *, rule: bool = False, notes: Mapping[int, str] = _NO_NOTES
) -> list[str]:
    """Return `rows` as aligned lines: the first column to the left, the others to the right.

    The first row is the header; a row of one cell is a heading of those below it. Where the table is too
    wide, first the header's words are put below each other and names are folded, then the columns are divided
    among several tables below each other, each with the first column. rule: a line under the header. notes:
    by number of the row, text after it; where its cells are all "-", in their place.
    """
    full = [row for row in rows if len(row) > 1]
    count = max((len(row) for row in full), default=1)
    widths = [max(len(row[i]) for row in full) for i in range(count)] if full else [0]
    limit, head = width(), [[cell] for cell in rows[0]]
    if _total(widths) > limit:
        for i in range(1, count):
            widths[i] = _folded_width([row[i] for row in full[1:]])
            head[i] = _fold(rows[0][i], max(widths[i], 7))
            widths[i] = max(widths[i], *map(len, head[i]))
        room = limit - _total([0, *widths[1:]])
        widths[0] = min(widths[0], room if room >= _FIRST else limit // 3)
    lines: list[str] = []
    for block in _blocks(widths, limit):
        kept = [widths[0], *(widths[i] for i in block)]
        lines += [""] if lines else []
        heights = max(len(head[i]) for i in (0, *block))
        head_lines = [[""] * (heights - len(head[i])) + head[i] for i in (0, *block)]
        lines += _lines(head_lines, kept)
        if rule:
            lines.append("-" * _total(kept))
        for number, row in enumerate(rows[1:], 1):
            if len(row) == 1:
                lines.append(row[0])
                continue
            first = _fold(row[0], widths[0], indent="  ")
            if number in notes and all(cell in ("-", "") for cell in row[1:]):
                if block[0] == 1:
                    lines += _beside(first, notes[number], widths[0], limit)
                continue
            lines += _lines([first, *(_fold(row[i], widths[i]) for i in block)], kept)
            if number in notes and block[0] == 1:
                lines += paragraphs([f"  {notes[number]}"], "  ")
    return lines


def described(texts: Mapping[str, str]) -> list[str]:
    """Return names, and beside each its text, folded where it is long."""
    size = max(map(len, texts))
    return [line for name, text in texts.items() for line in _beside([name], text, size, width())]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _blocks(widths: Sequence[int], limit: int) -> list[list[int]]:
    """The columns after the first, in groups that fit beside it."""
    blocks: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if blocks[-1] and _total([widths[0], *(widths[j] for j in blocks[-1]), widths[i]]) > limit:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _folded_width(cells: Sequence[str]) -> int:
    """Width of a column whose long cells, like all_but_attention, are folded."""
    short = max((len(cell) for cell in cells if len(cell) <= _CELL), default=0)
    long = (line for cell in cells if len(cell) > _CELL for line in _fold(cell, _CELL))
    return max([short, *map(len, long)])


def _fold(text: str, limit: int, indent: str = "") -> list[str]:
    """Break `text` at spaces, and after underscores and slashes, into lines of at most `limit`; a longer
    piece is a line."""
    if len(text) <= limit:
        return [text]
    margin = text[: len(text) - len(text.lstrip())]
    lines, line = [], margin
    for piece in re.findall(r"\s*[^\s_/]*[_/]?", text.lstrip()):
        if len((line + piece).rstrip()) > limit and line.strip():
            lines.append(line.rstrip())
            line, piece = margin + indent, piece.lstrip()
        line += piece
    return [*lines, line.rstrip()]


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """The lines of one row, whose cells may have several."""
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in itertools.zip_longest(*cells, fillvalue="")
    ]


def _beside(first: Sequence[str], note: str, size: int, limit: int) -> list[str]:
    """A name and, in the columns after it, a note."""
    words = textwrap.wrap(note, limit - size - 2) or [""]
    return [
        f"{name.ljust(size)}  {text}".rstrip()
        for name, text in itertools.zip_longest(first, words, fillvalue="")
    ]
