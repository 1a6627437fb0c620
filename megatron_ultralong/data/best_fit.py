"""Items of different lengths in nearly as few bins of one capacity as possible: best fit decreasing, and the
same with even work."""

from __future__ import annotations

import heapq
from typing import Any

import numpy
from numpy.typing import NDArray


def best_fit(lengths: NDArray[Any], capacity: int) -> NDArray[numpy.int64]:
    """The bin of each item, int64 [items]; bins are numbered from 0 in the order in which they are opened.

    lengths: int [items], each 1 to `capacity`. The longest item comes first (of equal ones the earlier), and
    each goes into the bin with the least room that suffices, or into a new one: at most 11/9 of the fewest
    possible bins, plus a few. The result depends on the arguments alone. A million items take seconds at any
    capacity.
    """
    assert len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= capacity
    of_item = numpy.empty(len(lengths), numpy.int64)
    room = _Rooms(capacity)
    opened = 0
    order = numpy.argsort(-lengths.astype(numpy.int64), kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        taken = room.take(length)
        if taken is None:
            taken = (opened, capacity)
            opened += 1
        which, left = taken
        of_item[item] = which
        if left > length:
            room.put(which, left - length)
    return of_item


def even_fit(lengths: NDArray[Any], capacity: int) -> NDArray[numpy.int64]:
    """As `best_fit`, in as many bins, but with the sums of squared lengths, which attention inside documents
    costs, as even as a simple rule makes them.

    The longest items, with most of the total length, each go into the bin with the least work; the others by
    best fit into what room is left. Where that takes more bins, it is `best_fit`.
    """
    of_item = best_fit(lengths, capacity)
    if len(lengths):
        for share in _EVEN_SHARES:
            even = _even(lengths.astype(numpy.int64), capacity, int(of_item.max()) + 1, share)
            if even is not None:
                return even
    return of_item


_EVEN_SHARES = (0.95, 0.7)
"""Of the total length, in the items that are placed by work: the first that needs no more bins."""


def _even(
    lengths: NDArray[numpy.int64], capacity: int, bins: int, share: float
) -> NDArray[numpy.int64] | None:
    """`even_fit` into so many bins; None where an item does not fit."""
    of_item = numpy.empty(len(lengths), numpy.int64)
    left, by_work = [capacity] * bins, [(0, which) for which in range(bins)]
    order = numpy.argsort(-lengths, kind="stable")
    longest = int(numpy.searchsorted(numpy.cumsum(lengths[order]), share * lengths.sum())) + 1
    placed = 0
    for item, length in zip(order[:longest].tolist(), lengths[order[:longest]].tolist(), strict=True):
        while by_work and left[by_work[0][1]] < length:  # what follows is shorter, and may fit below
            heapq.heappop(by_work)
        if not by_work:
            break
        work, which = by_work[0]
        heapq.heapreplace(by_work, (work + length * length, which))
        of_item[item] = which
        left[which] -= length
        placed += 1
    rooms = _Rooms(capacity)
    for which, room in enumerate(left):
        if room:
            rooms.put(which, room)
    for item, length in zip(order[placed:].tolist(), lengths[order[placed:]].tolist(), strict=True):
        taken = rooms.take(length)
        if taken is None:
            return None
        of_item[item], room = taken
        if room > length:
            rooms.put(taken[0], room - length)
    return numpy.unique(of_item, return_inverse=True)[1]


def contents(of_item: NDArray[numpy.int64]) -> list[NDArray[numpy.int64]]:
    """The items of each bin, ascending: for every bin its item numbers, int64."""
    if not len(of_item):
        return []
    order = numpy.argsort(of_item, kind="stable")
    return numpy.split(order, numpy.flatnonzero(numpy.diff(of_item[order])) + 1)


class _Rooms:
    """Bins by the room left in them.

    The rooms that occur are a bit set of two levels, whose words are Python integers of about sqrt(capacity)
    bits: the next larger room is found by two shifts, where a tree over 4M rooms would take 22 steps.
    """

    def __init__(self, capacity: int) -> None:
        self._bits = max(int(capacity**0.5), 64)
        self._words = [0] * (capacity // self._bits + 1)
        self._used = 0
        """Bit k is set where word k is not 0."""
        self._bins: dict[int, list[int]] = {}

    def put(self, which: int, room: int) -> None:
        """Add a bin."""
        same = self._bins.setdefault(room, [])
        if not same:
            word, bit = divmod(room, self._bits)
            self._words[word] |= 1 << bit
            self._used |= 1 << word
        same.append(which)

    def take(self, least: int) -> tuple[int, int] | None:
        """Remove a bin with the smallest room of at least `least`, and return (bin, room); None if there is
        no such bin."""
        word, bit = divmod(least, self._bits)
        same_word = self._words[word] >> bit
        if same_word:
            bit += _lowest(same_word)
        else:
            later = self._used >> (word + 1)
            if not later:
                return None
            word += 1 + _lowest(later)
            bit = _lowest(self._words[word])
        room = word * self._bits + bit
        same = self._bins[room]
        which = same.pop()
        if not same:
            self._words[word] ^= 1 << bit
            if not self._words[word]:
                self._used ^= 1 << word
        return which, room


def _lowest(bits: int) -> int:
    """Position of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
