"""Documents of packed rows whose attention stays inside them: how much attention they have, and what their
placement (context_parallel/placement.py) makes ranks compute and send.

Rows are made of given lengths, one document after the other, and placed as in training; the figures are means
over a few rows.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_ultralong.context_parallel.placement import Placement, place
from megatron_ultralong.errors import UserError

_ROWS = 3
"""Rows that are placed."""


@dataclass(frozen=True, kw_only=True)
class RowWork:
    """One rank's work on a row, of all layers alike."""

    imbalance: float
    """Attention of the rank with most over the mean."""
    sent: float
    """Tokens whose keys and values the rank that sends most sends in a forward, per token that it holds."""
    sent_far: float
    """Of those sent to another node, the most of any rank."""
    sent_in_rings: float
    """What it would send if each of its cut documents made a round of the k ranks that have it, 1 / k of it
    each: the most of any rank."""
    received: float
    """Tokens whose keys and values the rank that receives most receives, per token that it holds."""
    merged: float
    """Query tokens of partial results that are merged, of the rank with most, per token that it holds."""
    messages: float
    """Messages that the rank with most sends."""
    rounds: float
    """Rounds of messages that are sent together."""


@dataclass(frozen=True)
class DocumentLengths:
    """Lengths of documents, tokens, as they follow each other in packed rows; repeated as often as needed."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise UserError("documents must have at least 1 token each, and there must be one")

    def rows(self, seq_length: int) -> list[tuple[int, ...]]:
        """Document starts of a few rows; a document that does not fit is cut at the end of the row."""
        found, starts, at = [], [0], 0
        for length in itertools.cycle(self.lengths):
            at += length
            if at < seq_length:
                starts.append(at)
                continue
            found.append(tuple(starts))
            starts, at = [0], 0
            if len(found) == _ROWS:
                return found
        raise AssertionError

    def span(self, seq_length: int) -> float:
        """The length of equal documents that would have as many pairs of a query and a key."""
        return _span(self, seq_length)

    def work(self, seq_length: int, ranks: int, ranks_per_node: int = 1) -> RowWork:
        """Of rows on the ranks of a ring, of which `ranks_per_node` adjacent ones are in a node."""
        return _work(self, seq_length, ranks, ranks_per_node)


def read(path: Path) -> DocumentLengths:
    """Read lengths from packed rows with document starts (a prefix), or from a text file with a number a
    line."""
    from megatron_ultralong.data import row_files
    from megatron_ultralong.data.packed_rows import PackedDataset

    if path.with_name(f"{path.name}.json").is_file():
        length = len(row_files.SequenceFile(str(path))[0]) - 1
        rows = PackedDataset(str(path), length)
        lengths: list[int] = []
        for row in range(min(len(rows), _ROWS)):
            starts = [start for start in rows.document_starts(row) if start < length]
            lengths += [b - a for a, b in itertools.pairwise([*starts, length])]
        return DocumentLengths(tuple(lengths))
    try:
        found = tuple(int(word) for word in path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(f"--documents {path}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # no number, or no text
        raise UserError(
            f"--documents {path}: expected the prefix of packed rows, or a text file with a length a line"
        ) from None
    try:
        return DocumentLengths(found)
    except UserError as error:
        raise UserError(f"--documents {path}: {error}") from None


@functools.cache
def _span(documents: DocumentLengths, seq_length: int) -> float:
    return fmean(
        sum((b - a) ** 2 for a, b in itertools.pairwise([*starts, seq_length])) / seq_length
        for starts in documents.rows(seq_length)
    )


@functools.cache
def _work(documents: DocumentLengths, seq_length: int, ranks: int, ranks_per_node: int) -> RowWork:
    rows = [
        _of_row(place(starts, seq_length, ranks, ranks_per_node), ranks_per_node)
        for starts in documents.rows(seq_length)
    ]
    return RowWork(**{name: fmean(getattr(row, name) for row in rows) for name in vars(rows[0])})


def _of_row(placement: Placement, ranks_per_node: int) -> RowWork:
    ranks, planned = len(placement.runs), placement.schedules
    held = placement.seq_length // ranks
    bounds = [0.0] * ranks
    documents = [*placement.starts, placement.seq_length]
    for document, holders in placement.holders.items():
        length = documents[document + 1] - documents[document]
        for rank in holders:
            bounds[rank] += (len(holders) - 1) * length / len(holders)
    steps = [one.steps for one in planned]
    return RowWork(
        imbalance=placement.imbalance,
        sent=max(sum(step.tokens_sent for step in mine) for mine in steps) / held,
        sent_in_rings=max(bounds) / held,
        sent_far=max(
            sum(step.tokens_sent for step in mine if step.to // ranks_per_node != rank // ranks_per_node)
            for rank, mine in enumerate(steps)
        )
        / held,
        received=max(sum(step.received for step in mine) for mine in steps) / held,
        merged=max(
            sum(block.queries.stop - block.queries.start for step in mine for block in step.blocks)
            for mine in steps
        )
        / held,
        messages=max(sum(bool(step.sent) for step in mine) for mine in steps),
        rounds=len(planned[0].rounds),
    )
