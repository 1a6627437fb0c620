"""What each rank of a placed row (placement.py) computes, and which keys it sends where.

Whole documents need no other rank. The keys of a cut document go straight from the rank that holds them to
each rank that holds later tokens of it: fewer than if all of them were passed along a ring of these ranks.
There are R - 1 steps; in step t rank r sends to rank r + t and receives from rank r - t (modulo R), one
message each way, none where nothing is needed. Steps with few keys are sent together, as a round. All ranks
go through the same rounds in the same order, so that no rank waits for one that waits for it. In the backward
the gradients of received keys go the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_ultralong.context_parallel.zigzag import AttentionBlock


class Run(NamedTuple):
    """Consecutive tokens of one document on one rank."""

    begin: int
    """Position in the row."""
    end: int
    """One after the last position."""
    document: int
    """Index in the row."""


@dataclass
class Step:
    """One step of one rank."""

    to: int
    source: int
    sent: list[slice] = field(default_factory=list)
    """Local tokens whose keys and values are sent, in the order of the message."""
    received: int = 0
    """Tokens whose keys and values arrive."""
    blocks: list[AttentionBlock] = field(default_factory=list)
    """Queries among the local tokens, keys in the order of the message; past blocks all of them."""

    @property
    def tokens_sent(self) -> int:
        """Tokens whose keys and values are sent."""
        return sum(rows.stop - rows.start for rows in self.sent)


@dataclass(frozen=True)
class Schedule:
    """One rank's work on a row."""

    own: list[AttentionBlock]
    """Diagonal blocks over the rank's own keys, one for each of its documents; they cover all queries."""
    rounds: list[list[Step]]
    """Steps whose messages are sent together, in order, without those in which no rank sends; as many on all
    ranks."""

    @property
    def steps(self) -> list[Step]:
        return [step for steps in self.rounds for step in steps]


_SHARE_OF_A_ROUND = 2
"""Steps share a round while no rank sends or receives keys of more than this part (1 / 2) of its tokens."""


class _Held(NamedTuple):
    """A run of a rank."""

    run: Run
    first: int
    """Where it begins among the rank's local tokens."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.run.end - self.run.begin)


def schedules(runs_of: Sequence[Sequence[Run]], cut: Iterable[int]) -> list[Schedule]:
    """The schedule of each rank. runs_of: its runs by position, as many tokens on each. cut: the documents
    that are on more than one."""
    size = len(runs_of)
    steps = [[Step((rank + t) % size, (rank - t) % size) for t in range(size)] for rank in range(size)]
    own: list[list[AttentionBlock]] = []
    held: dict[int, dict[int, list[_Held]]] = {document: {} for document in cut}
    for rank, runs in enumerate(runs_of):
        bounds, first = [], 0
        for document, group in itertools.groupby(runs, key=lambda run: run.document):
            bounds.append(first)
            for run in group:
                if document in held:
                    held[document].setdefault(rank, []).append(_Held(run, first))
                first += run.end - run.begin
        own.append(
            [AttentionBlock(slice(a, b), slice(a, b), True) for a, b in itertools.pairwise([*bounds, first])]
        )
    for by_rank in held.values():
        for (source, keys), (rank, queries) in itertools.permutations(by_rank.items(), 2):
            t = (rank - source) % size
            _add(steps[source][t], steps[rank][t], keys, queries)
    rounds = _rounds(steps, sum(run.end - run.begin for run in runs_of[0]) // _SHARE_OF_A_ROUND)
    return [
        Schedule(mine, [[of_rank[t] for t in together] for together in rounds])
        for mine, of_rank in zip(own, steps, strict=True)
    ]


def _rounds(steps: Sequence[Sequence[Step]], most: int) -> list[list[int]]:
    """The steps that any rank sends in, taken together while no rank sends or receives more than `most`
    tokens."""
    rounds: list[list[int]] = []
    totals: list[tuple[int, int]] = []
    for t in range(1, len(steps)):
        sizes = [(of_rank[t].tokens_sent, of_rank[t].received) for of_rank in steps]
        if not any(sent for sent, _ in sizes):
            continue
        both = [(a + sent, b + received) for (a, b), (sent, received) in zip(totals, sizes, strict=False)]
        if both and max(map(max, both)) <= most:
            rounds[-1].append(t)
            totals = both
        else:
            rounds.append([t])
            totals = sizes
    return rounds


def _add(sending: Step, receiving: Step, keys: Sequence[_Held], queries: Sequence[_Held]) -> None:
    """Add what the queries of one rank see of the keys of another, both of one document: all of a run of keys
    or nothing of it, because each rank's runs lie between those of the others."""
    for key in keys:
        later = [query for query in queries if query.run.begin >= key.run.end]
        if not later:
            continue
        rows = slice(later[0].first, later[-1].rows.stop)
        first = receiving.received
        receiving.received += key.run.end - key.run.begin
        sending.sent.append(key.rows)
        seen = slice(first, receiving.received)
        last = receiving.blocks[-1] if receiving.blocks else None
        if last is not None and last.queries == rows and last.keys.stop == first:
            receiving.blocks[-1] = AttentionBlock(rows, slice(last.keys.start, seen.stop), False)
        else:
            receiving.blocks.append(AttentionBlock(rows, seen, False))
