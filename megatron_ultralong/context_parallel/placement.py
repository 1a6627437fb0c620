"""Which context-parallel rank holds which tokens of a row of documents, where attention stays inside them.

A row has S tokens, and each of CP ranks holds T = S / CP of them. A token attends to itself and the tokens
before it in its document, so that a document of n tokens costs n (n + 1) / 2 pairs of a query and a key. The
zigzag order (zigzag.py), in which rows of one document are, would cut the row without regard to documents.
`place` makes placements of two kinds and returns the best:

    whole   Documents stay on one rank, where they send nothing, the longest first, each on the rank that has
            least work for its tokens; one with more than a rank's tokens or share of the work is cut zigzag
            over as few ranks as that takes. Those that do not fit at the end are cut in two. Ranks that send
            keys have less work than others, within `BALANCED`. Best where documents are many.
    mixed   Rank after rank is filled to T tokens and to its share of the work from both ends of the documents
            sorted by length: tokens of long documents have more work than the mean, those of short ones less.
            A part of a document is taken from both ends of what is left of it, which leaves the mean work of
            a token as it was. Work then differs by a few tokens' pairs, also where documents are few.

Of those whose largest rank has at most `BALANCED` times the mean work, the one whose slowest rank takes
least time is used, by an estimate. All are functions of the arguments alone, and so the same on all ranks.
The tokens of a row of one document are in the zigzag order.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.schedule import Run, Schedule, schedules
from megatron_ultralong.errors import UserError

BALANCED = 1.05
"""Work of the largest rank over the mean that is accepted for fewer keys."""
PAIRS = {"merged": 390, "copied": 110, "received": 70, "sent": 28}
"""How many pairs of a query and a key take as long, forward and backward, as a query token of a partial
result that is merged, or a token whose keys and values are copied, received or sent (their gradients go back
and are added): for Llama-3.1-8B in bf16 on an H100, by the formulas of planning/time.py."""
_FEW_TOKENS = 300
"""Whose keys take as long to send over InfiniBand as a message takes to start, of the same model."""
_WHOLE = ((1.0, True), (0.8, True), (1.0, False), (0.8, False), (0.6, True), (0.6, False))
"""Placements of whole documents: the share of a rank's mean work above which documents are cut, and whether
ranks that send have less work than others. The first two are compared; others follow until one is
balanced."""
_MOST_LESS = 0.04
"""Of all work, what ranks that send may have less: others have as much more, within `BALANCED`."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The tokens of each rank. One row has one object, which is compared by identity."""

    starts: tuple[int, ...]
    """Positions in the row at which documents start, the first 0."""
    seq_length: int
    """S."""
    runs: tuple[tuple[Run, ...], ...]
    """Of each rank, by position; at most two of a document."""
    work: tuple[int, ...]
    """Pairs of a query and a key, of each rank."""
    holders: dict[int, tuple[int, ...]]
    """The ranks of each document that is on more than one, in order."""
    passed: int
    """Tokens whose keys and values would be sent, over all ranks, if those of each cut document were passed
    along a ring of its ranks; schedule.py sends fewer."""
    ranks_per_node: int = 1
    """Adjacent ranks that are in one node."""

    @functools.cached_property
    def schedules(self) -> list[Schedule]:
        """What each rank computes and sends. The loader asks first, so that it is prepared ahead."""
        return schedules(self.runs, self.holders, self.ranks_per_node)

    @property
    def rank_pairs(self) -> int:
        """Pairs of a rank and another that has a part of one of its documents: at least as many as
        messages."""
        pairs_of = itertools.chain.from_iterable(
            itertools.permutations(ranks, 2) for ranks in self.holders.values()
        )
        return len(set(pairs_of))

    @property
    def imbalance(self) -> float:
        """Work of the largest rank over the mean."""
        return max(self.work) * len(self.work) / sum(self.work)

    def positions(self, rank: int, ulysses: int = 1) -> Tensor:
        """Return the positions in the row of the tokens of `rank`, in local order: int64 [s], ascending.

        With all-to-all inside groups of `ulysses` ranks, the row is placed on these groups, and the tokens of
        one are cut zigzag.
        """
        begins, ends = numpy.array([run[:2] for run in self.runs[rank // ulysses]]).T
        lengths = ends - begins
        # Of each token, how far its run is from where it would be without gaps.
        held = numpy.arange(lengths.sum()) + numpy.repeat(begins - lengths.cumsum() + lengths, lengths)
        return zigzag.shard(torch.from_numpy(held), rank % ulysses, ulysses, 0)

    def document_positions(self, rank: int, ulysses: int = 1) -> Tensor:
        """As `positions`, counted from the start of each token's document."""
        held = self.positions(rank, ulysses)
        starts = torch.tensor(self.starts)
        return held - starts[torch.bucketize(held, starts, right=True) - 1]


def place(document_starts: Sequence[int], seq_length: int, cp: int, ranks_per_node: int = 1) -> Placement:
    """Place the documents of a row on `cp` ranks, seq_length / cp tokens on each.

    ranks_per_node: adjacent ranks that are in one node; those that share a document are where they can be.
    document_starts: positions in the row, ascending, the first 0. UserError for other starts, and where the
    row cannot be divided by the ranks.
    """
    if cp < 1 or seq_length < 1 or seq_length % cp:
        raise UserError(f"a row of {seq_length} tokens cannot be divided by {cp} context-parallel ranks")
    starts = tuple(document_starts)
    bounds = [*starts, seq_length]
    if bounds[0] != 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
        shown = ", ".join(map(str, starts[:5])) + (", ..." if len(starts) > 5 else "")
        raise UserError(
            f"document starts [{shown}] are not 0 followed by ascending positions below the sequence length "
            f"{seq_length}; prepare the data again"
        )
    if cp == 1:
        return _InOrder(bounds, cp).placement()
    placements = [_Mixed(bounds, cp).placement()]
    for number, (share, weigh) in enumerate(_WHOLE):
        if number >= 2 and any(one.imbalance <= BALANCED for one in placements[1:]):
            break
        with contextlib.suppress(_Unbalanced):
            placements.append(_Whole(bounds, cp, share, weigh=weigh).placement())
    balanced = [one for one in placements if one.imbalance <= BALANCED]
    best = min(balanced, key=_slowest) if balanced else min(placements, key=lambda one: one.imbalance)
    best = replace(best, ranks_per_node=min(ranks_per_node, cp))
    if best.ranks_per_node in (1, cp):
        return best
    return min(best, _in_nodes(best), key=_far)


def pairs(begin: int, end: int) -> int:
    """Pairs of a query and a key of the queries `begin` to `end` - 1, counted from their document's start."""
    return (end * (end + 1) - begin * (begin + 1)) // 2


def _slowest(placement: Placement) -> float:
    """The pairs that take as long as the work of the slowest rank and what it sends, by an estimate."""
    bounds = [*placement.starts, placement.seq_length]
    time = [float(work) for work in placement.work]
    for document, ranks in placement.holders.items():
        for rank in ranks:
            time[rank] += _sending(bounds[document + 1] - bounds[document], len(ranks))
    return max(time)


def _far(placement: Placement) -> int:
    """Tokens whose keys go from one node to another, if all nodes with a part of a document need all of
    it."""
    bounds = [*placement.starts, placement.seq_length]
    return sum(
        (bounds[document + 1] - bounds[document])
        * (len({rank // placement.ranks_per_node for rank in ranks}) - 1)
        for document, ranks in placement.holders.items()
    )


def _in_nodes(placement: Placement) -> Placement:
    """The same with ranks in another order: those that share the documents with most keys to send are next to
    each other, in groups of at most a node."""
    ranks, ranks_per_node = len(placement.runs), placement.ranks_per_node
    groups, of_rank = {rank: [rank] for rank in range(ranks)}, list(range(ranks))
    bounds = [*placement.starts, placement.seq_length]
    sent = {i: (len(r) - 1) * (bounds[i + 1] - bounds[i]) for i, r in placement.holders.items()}
    # Those with few keys would join groups that then do not fit into nodes.
    for document in sorted((i for i in sent if sent[i] > _FEW_TOKENS), key=lambda i: (-sent[i], i)):
        first, *others = sorted({of_rank[rank] for rank in placement.holders[document]})
        if others and sum(len(groups[group]) for group in (first, *others)) <= ranks_per_node:
            for group in others:
                groups[first] += groups.pop(group)
            for rank in groups[first]:
                of_rank[rank] = first
    # The largest group that fits into what is left of a node; if none does, a part of the smallest.
    left, order = sorted(groups.values(), key=lambda group: (-len(group), group)), list[int]()
    while left:
        room = ranks_per_node - len(order) % ranks_per_node
        at = next((i for i, group in enumerate(left) if len(group) <= room), None)
        if at is None:
            order += left[-1][:room]
            left[-1] = left[-1][room:]
        else:
            order += left.pop(at)
    place_of = {rank: place for place, rank in enumerate(order)}
    return replace(
        placement,
        runs=tuple(placement.runs[rank] for rank in order),
        work=tuple(placement.work[rank] for rank in order),
        holders={
            i: tuple(sorted(place_of[rank] for rank in holders)) for i, holders in placement.holders.items()
        },
    )


class _Row:
    """A row while its documents are being placed."""

    def __init__(self, bounds: list[int], cp: int) -> None:
        self.starts, self.cp = bounds[:-1], cp
        self.lengths = [b - a for a, b in itertools.pairwise(bounds)]
        self.size = bounds[-1] // cp
        self.total = sum(pairs(0, n) for n in self.lengths)
        self.runs: list[list[Run]] = [[] for _ in range(cp)]
        self.room, self.work = [self.size] * cp, [0] * cp
        self.holders: dict[int, set[int]] = {}

    def add(self, rank: int, document: int, begin: int, end: int) -> None:
        """begin, end: counted from the document's start."""
        if begin == end:
            return
        start = self.starts[document]
        self.runs[rank].append(Run(start + begin, start + end, document))
        self.room[rank] -= end - begin
        self.work[rank] += pairs(begin, end)
        self.holders.setdefault(document, set()).add(rank)

    def finished(self) -> Placement:
        holders = {i: tuple(sorted(ranks)) for i, ranks in sorted(self.holders.items()) if len(ranks) > 1}
        return Placement(
            tuple(self.starts),
            self.size * self.cp,
            tuple(tuple(sorted(runs)) for runs in self.runs),
            tuple(self.work),
            holders,
            sum((len(ranks) - 1) * self.lengths[i] for i, ranks in holders.items()),
        )


class _InOrder(_Row):
    """On one rank."""

    def placement(self) -> Placement:
        for document, length in enumerate(self.lengths):
            self.add(0, document, 0, length)
        return self.finished()


class _Whole(_Row):
    def __init__(self, bounds: list[int], cp: int, share: float, *, weigh: bool) -> None:
        """share: of a rank's mean work, above which a document is cut. weigh: whether ranks that send have
        less work than others."""
        super().__init__(bounds, cp)
        self.most, self.weigh, self.weight = share * self.total / cp, weigh, 0.0

    def placement(self) -> Placement:
        self.whole: list[list[int]] = [[] for _ in range(self.cp)]
        """The documents that each rank has to itself."""
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        if self.weigh:
            sending = sum(ways * _sending(n, ways) for n in self.lengths if (ways := self._ways(n)) > 1)
            self.weight = min(1.0, _MOST_LESS * self.total / sending) if sending else 0.0
        ways_of = {i: self._ways(self.lengths[i]) for i in order}
        self.sending, self.mean = [0.0] * self.cp, self.total / self.cp
        self._fill([i for i in order if ways_of[i] > 1 and not self._zigzag(i, ways_of[i])])
        for document, ranks in self.holders.items():
            for rank in ranks:
                self.sending[rank] += self.weight * _sending(self.lengths[document], len(ranks))
        self.mean = (self.total + sum(self.sending)) / self.cp
        self._level(self._on_one_rank([i for i in order if ways_of[i] == 1]))
        for rank, documents in enumerate(self.whole):
            for document in documents:
                self._keep(rank, document, -1)
                self.add(rank, document, 0, self.lengths[document])
        return self.finished()

    def _ways(self, n: int) -> int:
        """Ranks for a document of n tokens."""
        work = pairs(0, n)
        ways, most = max(1, -(-n // self.size), math.ceil(work / self.most)), min(self.cp, n // 2)
        while 1 < ways < most and work / ways + self.weight * _sending(n, ways) > self.most:
            ways += 1
        return max(1, min(ways, most))

    def _zigzag(self, document: int, ways: int) -> bool:
        """Cut a document over the ranks with the least work that have room; False where too few have."""
        n = self.lengths[document]
        edges = [n * i // (2 * ways) for i in range(2 * ways + 1)]
        parts = [[(edges[c], edges[c + 1]) for c in zigzag.chunk_ids(j, ways)] for j in range(ways)]
        largest = max(sum(end - begin for begin, end in part) for part in parts)
        free = sorted((self.work[rank], rank) for rank in range(self.cp) if self.room[rank] >= largest)
        if len(free) < ways:
            return False
        for rank, part in zip(sorted(rank for _, rank in free[:ways]), parts, strict=True):
            for begin, end in part:
                self.add(rank, document, begin, end)
        return True

    def _fill(self, documents: list[int]) -> None:
        """Fill ranks with these documents, one after the other, in contiguous runs."""
        ranks = deque(sorted((r for r in range(self.cp) if self.room[r]), key=lambda r: (self._need(r), r)))
        for document in documents:
            taken, left = [], self.lengths[document]
            while left:
                tokens = min(left, self.room[ranks[0]])
                taken.append((ranks[0], tokens))
                left -= tokens
                if tokens == self.room[ranks[0]]:
                    ranks.popleft()
            begin = 0
            for rank, tokens in reversed(taken):  # later tokens have more work
                self.add(rank, document, begin, begin + tokens)
                begin += tokens

    def _on_one_rank(self, documents: list[int]) -> list[int]:
        """Place documents, longest first; return those that fit nowhere."""
        queue = [(self._need(rank), rank) for rank in range(self.cp) if self.room[rank]]
        heapq.heapify(queue)
        left = []
        for document in documents:
            passed = []
            while queue and self.room[queue[0][1]] < self.lengths[document]:
                passed.append(heapq.heappop(queue))
            if queue:
                _, rank = heapq.heappop(queue)
                self._keep(rank, document)
                if self.room[rank]:
                    passed.append((self._need(rank), rank))
            else:
                left.append(document)
            for entry in passed:
                heapq.heappush(queue, entry)
        return left

    def _need(self, rank: int) -> float:
        """Work above the mean, per free token; ranks with the lowest are filled first."""
        return (self.work[rank] + self.sending[rank] - self.mean) / self.room[rank]

    def _keep(self, rank: int, document: int, count: int = 1) -> None:
        """Give a rank a document to itself, or with count = -1 take it away."""
        length = self.lengths[document]
        if count > 0:
            self.whole[rank].append(document)
        self.room[rank] -= count * length
        self.work[rank] += count * pairs(0, length)

    def _level(self, documents: list[int]) -> None:
        """Give these documents, which are longer than the room of any rank, to some, and pass tokens from
        rank to rank until none has too many: a document that is cut is on two adjacent ranks."""
        left = deque(documents)
        for rank in range(self.cp):
            # Its room is below zero by the tokens that it has too many.
            while left and (rank == self.cp - 1 or self.lengths[left[0]] <= 2 * self.room[rank]):
                self._keep(rank, left.popleft())
            if self.room[rank] < 0:
                self._pass(rank, rank + 1, -self.room[rank])
            elif self.room[rank] > 0:
                self._pass(rank + 1, rank, self.room[rank])

    def _pass(self, source: int, target: int, tokens: int) -> None:
        """Pass so many tokens on: the first ones of the shortest document that has them, whose keys the
        other rank then needs, after whole ones where none has."""
        while tokens:
            documents = self.whole[source]
            longer = [i for i in documents if self.lengths[i] > tokens]
            if not longer and not documents:
                raise _Unbalanced
            chosen = min(
                longer or documents, key=lambda i: (self.lengths[i] if longer else -self.lengths[i], i)
            )
            documents.remove(chosen)
            self._keep(source, chosen, -1)
            if longer:
                self.add(target, chosen, 0, tokens)
                self.add(source, chosen, tokens, self.lengths[chosen])
                return
            self._keep(target, chosen)
            tokens -= self.lengths[chosen]


def _sending(length: int, ways: int) -> float:
    """The pairs that take as long as what each of `ways` ranks sends, receives and merges for a document."""
    keys = 0.75 * length * (ways - 1) / ways  # of the others, as far as they come before its queries
    merged = 2 * length / ways
    return PAIRS["merged"] * merged + (PAIRS["sent"] + PAIRS["received"] + 2 * PAIRS["copied"]) * keys


class _Unbalanced(Exception):
    """A rank has no whole document to pass on."""


class _Mixed(_Row):
    def placement(self) -> Placement:
        lengths = numpy.array(self.lengths)
        self.order = numpy.lexsort((numpy.arange(len(lengths)), lengths)).tolist()
        # What is left: documents `short` to `long` - 1 in this order, each from begin to end.
        self.short, self.long = 0, len(lengths)
        self.begins, self.ends = numpy.zeros(len(lengths)), lengths[self.order].astype(numpy.float64)
        work = self.total
        for rank in range(self.cp):
            tokens = self._from_long(work / (self.cp - rank))
            self._take(rank, self.size - tokens, at_short=True)
            self._take(rank, tokens, at_short=False)
            work -= self.work[rank]
        return self.finished()

    def _from_long(self, work: float) -> int:
        """Tokens to take from the long end of what is left, so that those and the others that a rank holds,
        from the short end, have this much work."""
        begins, ends = (x[self.short : self.long] for x in (self.begins, self.ends))
        tokens = numpy.concatenate([[0.0], numpy.cumsum(ends - begins)])
        works = numpy.concatenate([[0.0], numpy.cumsum((ends - begins) * (begins + ends + 1) / 2)])

        def excess(n: int) -> float:
            """Work beyond the wanted with n tokens of the long end."""
            short, long = numpy.interp([self.size - n, tokens[-1] - n], tokens, works)
            return short + works[-1] - long - work

        return bisect.bisect_left(range(self.size), 0.0, key=excess)

    def _take(self, rank: int, tokens: int, *, at_short: bool) -> None:
        """Take tokens from the short or the long end of what is left."""
        while tokens:
            at = self.short if at_short else self.long - 1
            document, begin, end = self.order[at], int(self.begins[at]), int(self.ends[at])
            if tokens >= end - begin:
                self.add(rank, document, begin, end)
                self.short, self.long = self.short + at_short, self.long - (not at_short)
                tokens -= end - begin
            else:
                first, last = begin + tokens // 2, end - (tokens - tokens // 2)
                self.add(rank, document, begin, first)
                self.add(rank, document, last, end)
                self.begins[at], self.ends[at] = first, last
                return
