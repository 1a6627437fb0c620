"""Where documents lie in rows of S + 1 tokens: joined across row borders, or whole in one row where they fit.

A placement is a pure function of the documents' lengths, so writing goes on at any row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import best_fit

SEPARATOR = -1


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document, or of a separator, in a row."""

    at: int
    """Where in the row."""
    document: int
    """Which of the documents in packing order; SEPARATOR."""
    begin: int
    """Its first token that is here."""
    length: int


class Placement(Protocol):
    rows: int
    padding: int
    """Tokens of padding in all rows."""
    separators: int
    """Tokens of separators, dropped ones too."""
    dropped: int
    """Tokens left out, at the end of the stream."""

    def pieces(self, row: int) -> list[Piece]:
        """What a row holds, in order, without gaps; padding follows."""
        ...

    def starts(self, row: int) -> list[int]:
        """Where in a row documents start, 0 first; padding is a document of its own."""
        ...


class Crossing:
    """Documents and separators as one stream, cut into rows; the last one padded or left out."""

    def __init__(self, lengths: NDArray[numpy.int64], separator: int, row: int, pad: bool) -> None:
        """lengths: tokens of the documents in packing order, all above 0; separator: its tokens; row: S + 1."""
        self.length, self.separator = row, separator
        self.ends = numpy.cumsum(lengths + separator) - separator
        """Of each document, the place in the stream behind its last token."""
        self.lengths = lengths
        total = int(self.ends[-1]) if len(lengths) else 0
        self.rows, left = divmod(total, row)
        self.rows += bool(left and pad)
        self.padding, self.dropped = (row - left if left and pad else 0), (left if not pad else 0)
        self.separators = separator * max(len(lengths) - 1, 0)

    def pieces(self, row: int) -> list[Piece]:
        found = []
        at, last = row * self.length, min((row + 1) * self.length, int(self.ends[-1]))
        document = int(numpy.searchsorted(self.ends, at, side="right"))
        while at < last:
            first = int(self.ends[document] - self.lengths[document])
            if at < first:  # in the separator before it
                count = min(first, last) - at
                found.append(Piece(at - row * self.length, SEPARATOR, at - (first - self.separator), count))
                at += count
            if at < last:
                count = min(int(self.ends[document]), last) - at
                found.append(Piece(at - row * self.length, document, at - first, count))
                at += count
            document += 1
        return found

    def starts(self, row: int) -> list[int]:
        begin, end = row * self.length, (row + 1) * self.length
        first, last = numpy.searchsorted(self.ends, [begin, end], side="right")
        inside = (self.ends[first : last + 1] - self.lengths[first : last + 1]) - begin
        found = [0, *inside[(inside > 0) & (inside < self.length)].tolist()]
        return found + [self.length - self.padding] if self.padding and row == self.rows - 1 else found


class BestFit:
    """Documents whole in rows, by best fit decreasing; of longer ones, full rows of their own and the rest
    like another document."""

    def __init__(self, lengths: NDArray[numpy.int64], separator: int, row: int) -> None:
        self.length, self.separator = row, separator
        full, rest = numpy.divmod(lengths, row)
        items = numpy.flatnonzero(rest)
        # A row of n pieces has n - 1 separators: each piece counts with one, and a row holds one more.
        bins = best_fit.best_fit(rest[items] + separator, row + separator)
        own = numpy.repeat(numpy.arange(len(lengths)), full)  # documents that fill rows alone
        within = numpy.arange(len(own)) - numpy.repeat(numpy.cumsum(full) - full, full)
        document = numpy.concatenate([own, items])
        begin = numpy.concatenate([within, full[items]]) * row
        count = numpy.concatenate([numpy.full(len(own), row), rest[items]])
        where = numpy.concatenate(
            [numpy.arange(len(own)), len(own) + bins]
        )  # row of each piece, by any number
        # Rows stand in the order of their first documents, and documents in a row in their own.
        pieces = numpy.lexsort((begin, document))
        _, first = numpy.unique(where[pieces], return_index=True)
        place = numpy.empty(len(first), numpy.int64)
        place[numpy.argsort(first)] = numpy.arange(len(first))
        pieces = pieces[numpy.argsort(place[where[pieces]], kind="stable")]
        self._document, self._begin, self._count = document[pieces], begin[pieces], count[pieces]
        self._ends = numpy.cumsum(numpy.bincount(place[where], minlength=len(first)))
        """Of each row, the number of pieces up to its last."""
        self.rows, self.dropped = len(first), 0
        self.separators = separator * (len(pieces) - self.rows)
        self.padding = self.rows * row - int(lengths.sum()) - self.separators

    def pieces(self, row: int) -> list[Piece]:
        found, at = [], 0
        for k in range(int(self._ends[row - 1]) if row else 0, int(self._ends[row])):
            if at and self.separator:
                found.append(Piece(at, SEPARATOR, 0, self.separator))
                at += self.separator
            found.append(Piece(at, int(self._document[k]), int(self._begin[k]), int(self._count[k])))
            at += int(self._count[k])
        return found

    def starts(self, row: int) -> list[int]:
        pieces = self.pieces(row)
        found = [piece.at for piece in pieces if piece.document != SEPARATOR]
        end = pieces[-1].at + pieces[-1].length
        return found + [end] if end < self.length else found
