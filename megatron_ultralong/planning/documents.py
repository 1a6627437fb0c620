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

from megatron_ultralong.context_parallel.placement import PAIRS, Placement, place
from megatron_ultralong.errors import UserError

_ROWS = 3
"""Rows that are placed."""


@dataclass(frozen=True, kw_only=True)
class RowWork:
    """What ranks do for a row, of all layers alike: the rank that takes longest, if not said otherwise.
    Tokens are per token that a rank holds."""

    imbalance: float
    """Attention of the rank with most over the mean."""
    attention: float
    """Attention over the mean."""
    sent: float
    """Tokens whose keys and values are sent in a forward."""
    sent_far: float
    """Of those sent to another node."""
    received: float
    """Tokens whose keys and values are received."""
    copied: float
    """Tokens whose keys and values are copied to be sent, or to put in order what is received."""
    merged: float
    """Query tokens of partial results that are merged."""
    most_sent: float
    """`sent`, the most of any rank."""
    most_sent_far: float
    """`sent_far`, the most of any rank."""
    sent_in_rings: float
    """The most that a rank would send if each of its cut documents made a round of the k ranks that have it,
    1 / k of it each."""
    messages: float
    """The most that a rank sends."""
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
    held, mean = placement.seq_length // ranks, sum(placement.work) / ranks
    bounds = [0.0] * ranks
    documents = [*placement.starts, placement.seq_length]
    for document, holders in placement.holders.items():
        length = documents[document + 1] - documents[document]
        for rank in holders:
            bounds[rank] += (len(holders) - 1) * length / len(holders)
    all_ranks = []
    for rank, mine in enumerate(planned):
        far = [step for step in mine.steps if step.to // ranks_per_node != rank // ranks_per_node]
        sent = sum(step.tokens_sent for step in mine.steps)
        all_ranks.append(
            {
                "attention": placement.work[rank] / mean,
                "sent": sent / held,
                "sent_far": sum(step.tokens_sent for step in far) / held,
                "received": sum(this.tokens for this in mine.rounds) / held,
                "copied": mine.tokens_copied / held,
                "merged": sum(
                    block.queries.stop - block.queries.start for this in mine.rounds for block in this.blocks
                )
                / held,
            }
        )

    def pairs(of: dict[str, float]) -> float:
        """The time of a rank in pairs of a query and a key, over the mean."""
        return of["attention"] + sum(PAIRS[name] * of[name] for name in PAIRS) * held / mean

    return RowWork(
        **max(all_ranks, key=pairs),
        imbalance=placement.imbalance,
        most_sent=max(one["sent"] for one in all_ranks),
        most_sent_far=max(one["sent_far"] for one in all_ranks),
        sent_in_rings=max(bounds) / held,
        messages=max(sum(bool(step.tokens_sent) for step in mine.steps) for mine in planned),
        rounds=len(planned[0].rounds),
    )
