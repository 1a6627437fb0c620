"""What each rank of a placed row (placement.py) computes, and which keys it sends where.

Whole documents need no other rank. The keys of a cut document go to the ranks that hold later tokens of it:
inside a node straight from the rank that holds them; to another node once, to one of its ranks (the relay),
which forwards them to the others there, so that each key crosses the slow link once a node. Fewer keys are
sent than if all of a document were passed along a ring of its ranks.

Messages that are sent together are a round. All ranks go through the same rounds in the same order, so that
no rank waits for one that waits for it: the keys for other nodes, at increasing distance, each followed by
the rounds that forward them; those inside the nodes go with the first of them, or last. What arrives in a
round is put in the order of the queries that see it, so that few kernels are called and few partial results
merged. In the backward the gradients of received keys go the way back, and a relay adds up those of its node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

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
    """One message each way of one rank, or none."""

    to: int
    source: int
    rows: list[slice] = field(default_factory=list)
    """Local tokens whose keys and values are sent, in the order of the message."""
    sent: list[slice] = field(default_factory=list)
    """The same among `Schedule.sent`; those that follow each other are one."""
    forwarded: list[slice] = field(default_factory=list)
    """Keys of the last relayed round, in its order, that follow them in the message."""
    received: list[Received] = field(default_factory=list)
    """What arrives, in the order of the message."""

    @property
    def tokens_sent(self) -> int:
        """Tokens whose keys and values are sent."""
        return _tokens([*self.rows, *self.forwarded])

    @property
    def tokens_received(self) -> int:
        """Tokens whose keys and values arrive."""
        return self.received[-1].keys.stop if self.received else 0


class Received(NamedTuple):
    """Keys of a message that the same queries see."""

    keys: slice
    queries: slice
    """Local tokens, all of which see all of these keys."""


Kind: TypeAlias = Literal["direct", "relayed", "forwards"]
"""Of a round: `relayed` keys are forwarded by the rounds that follow it, which are of the kind `forwards`."""


@dataclass(frozen=True)
class Round:
    """Steps of one rank whose messages are sent together. What arrives follows each other step by step."""

    steps: list[Step]
    parts: list[slice]
    """The order in which what arrives is computed with."""
    blocks: list[AttentionBlock]
    """Queries among the local tokens, keys in this order; past blocks all of them."""
    kind: Kind

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values arrive."""
        return sum(step.tokens_received for step in self.steps)

    @property
    def in_order(self) -> bool:
        """Whether what arrives is in the order of `parts`."""
        return all(a.stop == b.start for a, b in itertools.pairwise([slice(0, 0), *self.parts]))


@dataclass(frozen=True)
class Schedule:
    """One rank's work on a row."""

    own: list[AttentionBlock]
    """Diagonal blocks over the rank's own keys, one for each of its documents; they cover all queries."""
    sent: list[slice]
    """Local tokens whose keys and values any other rank needs."""
    rounds: list[Round]
    """In order; as many with as many steps each on all ranks."""

    @property
    def steps(self) -> list[Step]:
        return [step for one in self.rounds for step in one.steps]

    @property
    def tokens_copied(self) -> int:
        """Tokens whose keys and values are copied in a forward, to be sent or put in order."""
        joined = sum(step.tokens_sent for step in self.steps if len(step.sent) + len(step.forwarded) > 1)
        return _tokens(self.sent) + joined + sum(one.tokens for one in self.rounds if not one.in_order)


class _Held(NamedTuple):
    """A run of a rank."""

    run: Run
    first: int
    """Where it begins among the rank's local tokens."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.run.end - self.run.begin)


def schedules(
    runs_of: Sequence[Sequence[Run]], cut: Iterable[int], ranks_per_node: int = 1
) -> list[Schedule]:
    """The schedule of each rank. runs_of: its runs by position, as many tokens on each. cut: the documents
    that are on more than one. ranks_per_node: adjacent ranks that are in one node."""
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
    messages = _Messages(len(runs_of), ranks_per_node)
    for by_rank in held.values():
        messages.add(by_rank)
    rounds = messages.rounds(sum(run.end - run.begin for run in runs_of[0]))
    return [_schedule(mine, [one[rank] for one in rounds]) for rank, mine in enumerate(own)]


def _schedule(own: list[AttentionBlock], rounds: list[Round]) -> Schedule:
    steps = [step for one in rounds for step in one.steps]
    sent = [slice(a, b) for a, b in sorted({(rows.start, rows.stop) for step in steps for rows in step.rows})]
    first = dict(
        zip((rows.start for rows in sent), itertools.accumulate(map(_length, sent), initial=0), strict=False)
    )
    for step in steps:
        step.sent = _merged(
            [slice(first[rows.start], first[rows.start] + _length(rows)) for rows in step.rows]
        )
        step.forwarded = _merged(step.forwarded)
    return Schedule(own, sent, rounds)


_Steps: TypeAlias = list[Step]
"""Of each rank one."""


class _Relayed(NamedTuple):
    """A run of keys that a relay receives and other ranks of its node see."""

    relay: int
    where: slice
    """In the message to the relay."""
    keys: _Held
    queries: dict[int, Sequence[_Held]]
    """Of those ranks."""


class _Messages:
    """All messages between ranks, as documents are added."""

    def __init__(self, ranks: int, ranks_per_node: int) -> None:
        self._ranks, self._per_node = ranks, ranks_per_node
        self._nodes = -(-ranks // ranks_per_node)
        self._near: dict[int, _Steps] = {}
        """By how many ranks of the node they go."""
        self._far: dict[tuple[int, int], _Steps] = {}
        """By how many nodes, and how many ranks, they go."""
        self._relayed: dict[tuple[int, int], list[_Relayed]] = {}
        """Of these."""
        self._load = [0] * ranks
        """Tokens that each rank forwards."""

    def add(self, held: dict[int, list[_Held]]) -> None:
        """Add a document. held: the runs of it that each of its ranks holds."""
        nodes = [list(ranks) for _, ranks in itertools.groupby(sorted(held), key=self._node)]
        for source, ranks in itertools.product(held, nodes):
            if self._node(ranks[0]) != self._node(source):
                self._add_far(source, held[source], {rank: held[rank] for rank in ranks})
                continue
            for rank in ranks:
                for keys in _seen(held[source], held[rank]) if rank != source else []:
                    sending, receiving = self._inside(self._near, source, rank)
                    sending.rows.append(keys.rows)
                    _receive(receiving, keys, held[rank])

    def _add_far(self, source: int, keys: Sequence[_Held], queries: dict[int, Sequence[_Held]]) -> None:
        """Add what the ranks of another node see of the keys of `source`."""
        # Each sees the first of them up to some; the relay is one that sees as many as any, if it can be the
        # rank at the same place in its node, so that few steps have a message for each rank.
        seen = {rank: len(_seen(keys, held)) for rank, held in queries.items()}
        most, place = max(seen.values()), source % self._per_node
        if not most:
            return
        relay = min(
            (rank for rank in seen if seen[rank] == most),
            key=lambda rank: (rank % self._per_node != place, self._load[rank], rank),
        )
        at = (self._node(relay) - self._node(source)) % self._nodes, (relay - source) % self._ranks
        if at not in self._far:
            self._far[at] = _ring(range(self._ranks), at[1])
        sending, receiving = self._far[at][source], self._far[at][relay]
        for i, run in enumerate(keys[:most]):
            sending.rows.append(run.rows)
            where = _receive(receiving, run, queries[relay])
            others = {rank: queries[rank] for rank in seen if rank != relay and seen[rank] > i}
            if others:
                self._relayed.setdefault(at, []).append(_Relayed(relay, where, run, others))
                self._load[relay] += len(others) * (where.stop - where.start)

    def rounds(self, tokens: int) -> list[list[Round]]:
        """Return the rounds, of each rank one. tokens: held by a rank."""
        found: list[list[Round]] = []
        # A message has at most a rank's tokens. Together those between nodes have at most half of them, so
        # that the first are computed with while the next are on their way; others a quarter more than a
        # message, which often spares a round.
        most = tokens * 5 // 4
        inside = [[self._near[t] for t in some] for some in _grouped(self._near, most)]
        for together in _grouped(self._far, tokens // 2):
            steps = [self._far[at] for at in together]
            if not found and inside and _most([*steps, *inside[0]]) <= most:
                steps += inside.pop(0)
            relayed = [
                (number, one) for number, at in enumerate(together) for one in self._relayed.get(at, [])
            ]
            found.append(_rounds(steps, "relayed" if relayed else "direct"))
            forwards: dict[int, _Steps] = {}
            for number, (relay, where, keys, queries) in relayed:
                first = sum(step[relay].tokens_received for step in steps[:number]) + where.start
                for rank, held in queries.items():
                    sending, receiving = self._inside(forwards, relay, rank)
                    sending.forwarded.append(_find(found[-1][relay].parts, first, _length(where)))
                    _receive(receiving, keys, held)
            found += [_rounds([forwards[t] for t in some], "forwards") for some in _grouped(forwards, most)]
        return found + [_rounds(steps, "direct") for steps in inside]

    def _node(self, rank: int) -> int:
        return rank // self._per_node

    def _inside(self, steps: dict[int, _Steps], source: int, to: int) -> tuple[Step, Step]:
        """Return the steps in which two ranks of a node send and receive."""
        first = source - source % self._per_node
        t = (to - source) % (min(first + self._per_node, self._ranks) - first)
        if t not in steps:
            steps[t] = [
                step
                for first in range(0, self._ranks, self._per_node)
                for step in _ring(range(first, min(first + self._per_node, self._ranks)), t)
            ]
        return steps[t][source], steps[t][to]


def _ring(ranks: range, t: int) -> _Steps:
    """The step of each of these ranks in which messages go t of them on."""
    size = len(ranks)
    return [Step(ranks[(i + t) % size], ranks[(i - t) % size]) for i in range(size)]


def _seen(keys: Sequence[_Held], queries: Sequence[_Held]) -> Sequence[_Held]:
    """What the queries of one rank see of the keys of another, both of one document: all of a run of keys or
    nothing of it, because each rank's runs lie between those of the others."""
    return [key for key in keys if queries[-1].run.begin >= key.run.end]


def _receive(step: Step, keys: _Held, queries: Sequence[_Held]) -> slice:
    """Add keys that queries see to what is received in a step; return where they are in the message."""
    first = step.tokens_received
    where = slice(first, first + keys.run.end - keys.run.begin)
    later = [query for query in queries if query.run.begin >= keys.run.end]
    step.received.append(Received(where, slice(later[0].first, later[-1].rows.stop)))
    return where


def _grouped(steps: dict[Any, _Steps], most: int) -> list[list[Any]]:
    """The keys of `steps` in order, together while no rank sends or receives more than `most` tokens."""
    groups: list[list[Any]] = []
    for at in sorted(steps):
        if groups and _most([steps[one] for one in (*groups[-1], at)]) <= most:
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups


def _most(steps: Sequence[_Steps]) -> int:
    """Tokens that the rank with most sends or receives in steps that are sent together."""
    return max(
        max(sum(step.tokens_sent for step in mine), sum(step.tokens_received for step in mine))
        for mine in zip(*steps, strict=True)
    )


def _rounds(steps: Sequence[_Steps], kind: Kind) -> list[Round]:
    """The round of each rank that has these steps."""
    return [_round(list(mine), kind) for mine in zip(*steps, strict=True)]


def _round(steps: _Steps, kind: Kind) -> Round:
    by_queries: dict[tuple[int, int], list[slice]] = {}
    first = 0
    for step in steps:
        for keys, queries in step.received:
            part = slice(first + keys.start, first + keys.stop)
            by_queries.setdefault((queries.start, queries.stop), []).append(part)
        first += step.tokens_received
    parts, blocks, first = list[slice](), [], 0
    for (begin, end), seen in by_queries.items():
        blocks.append(AttentionBlock(slice(begin, end), slice(first, first + _tokens(seen)), False))
        parts, first = parts + seen, first + _tokens(seen)
    return Round(steps, parts, blocks, kind)


def _find(parts: Sequence[slice], start: int, length: int) -> slice:
    """Where what arrives at `start` is in the order of its round."""
    first = 0
    for part in parts:
        if part.start == start:
            break
        first += _length(part)
    return slice(first, first + length)


def _merged(rows: Sequence[slice]) -> list[slice]:
    """Those that follow each other as one."""
    found: list[slice] = []
    for one in rows:
        if found and found[-1].stop == one.start:
            found[-1] = slice(found[-1].start, one.stop)
        else:
            found.append(one)
    return found


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _tokens(rows: Sequence[slice]) -> int:
    return sum(map(_length, rows))
