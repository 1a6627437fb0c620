"""Where documents lie in rows of S + 1 tokens: continued in the next row, or in one row where they fit.

A layout is a pure function of the documents' lengths, so writing can resume at any row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import best_fit

SEPARATOR = -1


@dataclass(frozen=True)
class RowSegment:
    """Consecutive tokens of one document, or of a separator, in a row."""

    at: int
    """Where it begins in the row."""
    document: int
    """Which document, in packing order; or SEPARATOR."""
    begin: int
    """The first token of the document, or separator, that is in the segment."""
    length: int


class RowLayout(Protocol):
    rows: int
    padding: int
    """Tokens of padding in all rows."""
    separators: int
    """Tokens of separators, dropped ones included."""
    dropped: int
    """Tokens left out at the end of the stream."""

    def segments(self, row: int) -> list[RowSegment]:
        """The content of a row, in order, without gaps; padding follows."""
        ...

    def document_starts(self, row: int) -> list[int]:
        """Where documents start in a row, 0 first; padding counts as a document."""
        ...


class StreamLayout:
    """Documents and separators as one stream, cut into rows; the last row is padded or left out."""

    def __init__(self, lengths: NDArray[numpy.int64], separator: int, row: int, pad: bool) -> None:
        """lengths: tokens of the documents in packing order, all above 0; separator: its tokens; row: S +
        1."""
        self.length, self.separator = row, separator
        self.ends = numpy.cumsum(lengths + separator) - separator
        """Of each document, the place in the stream after its last token."""
        self.lengths = lengths
        total = int(self.ends[-1]) if len(lengths) else 0
        self.rows, left = divmod(total, row)
        self.rows += bool(left and pad)
        self.padding, self.dropped = (row - left if left and pad else 0), (left if not pad else 0)
        self.separators = separator * max(len(lengths) - 1, 0)

    def segments(self, row: int) -> list[RowSegment]:
        segments = []
        at, last = row * self.length, min((row + 1) * self.length, int(self.ends[-1]))
        document = int(numpy.searchsorted(self.ends, at, side="right"))
        while at < last:
            first = int(self.ends[document] - self.lengths[document])
            if at < first:  # in the separator before the document
                count = min(first, last) - at
                within = at - (first - self.separator)
                segments.append(RowSegment(at - row * self.length, SEPARATOR, within, count))
                at += count
            if at < last:
                count = min(int(self.ends[document]), last) - at
                segments.append(RowSegment(at - row * self.length, document, at - first, count))
                at += count
            document += 1
        return segments

    def document_starts(self, row: int) -> list[int]:
        begin, end = row * self.length, (row + 1) * self.length
        first, last = numpy.searchsorted(self.ends, [begin, end], side="right")
        inside = (self.ends[first : last + 1] - self.lengths[first : last + 1]) - begin
        starts = [0, *inside[(inside > 0) & (inside < self.length)].tolist()]
        return starts + [self.length - self.padding] if self.padding and row == self.rows - 1 else starts


class BestFitLayout:
    """Complete documents in rows, by best fit decreasing with even attention. Longer ones have full rows of
    their own, and the rest of each is packed like a document."""

    def __init__(self, lengths: NDArray[numpy.int64], separator: int, row: int) -> None:
        """As StreamLayout."""
        self.length, self.separator = row, separator
        full, rest = numpy.divmod(lengths, row)
        items = numpy.flatnonzero(rest)
        # A row of n segments has n - 1 separators: count one with each segment, and one more room in a row.
        bins = best_fit.even_fit(rest[items] + separator, row + separator)
        own = numpy.repeat(numpy.arange(len(lengths)), full)  # documents that fill rows of their own
        within = numpy.arange(len(own)) - numpy.repeat(numpy.cumsum(full) - full, full)
        document = numpy.concatenate([own, items])
        begin = numpy.concatenate([within, full[items]]) * row
        count = numpy.concatenate([numpy.full(len(own), row), rest[items]])
        where = numpy.concatenate([numpy.arange(len(own)), len(own) + bins])  # row of each segment, unordered
        # Rows are in the order of their first documents, and so are the documents in a row.
        order = numpy.lexsort((begin, document))
        _, first = numpy.unique(where[order], return_index=True)
        place = numpy.empty(len(first), numpy.int64)
        place[numpy.argsort(first)] = numpy.arange(len(first))
        order = order[numpy.argsort(place[where[order]], kind="stable")]
        self._document, self._begin, self._count = document[order], begin[order], count[order]
        self._ends = numpy.cumsum(numpy.bincount(place[where], minlength=len(first)))
        """Of each row, the number of segments up to its last."""
        self.rows, self.dropped = len(first), 0
        self.separators = separator * (len(order) - self.rows)
        self.padding = self.rows * row - int(lengths.sum()) - self.separators

    def segments(self, row: int) -> list[RowSegment]:
        segments, at = [], 0
        for k in range(int(self._ends[row - 1]) if row else 0, int(self._ends[row])):
            if at and self.separator:
                segments.append(RowSegment(at, SEPARATOR, 0, self.separator))
                at += self.separator
            count = int(self._count[k])
            segments.append(RowSegment(at, int(self._document[k]), int(self._begin[k]), count))
            at += count
        return segments

    def document_starts(self, row: int) -> list[int]:
        segments = self.segments(row)
        starts = [segment.at for segment in segments if segment.document != SEPARATOR]
        end = segments[-1].at + segments[-1].length
        return starts + [end] if end < self.length else starts
