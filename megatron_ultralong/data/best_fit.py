"""Best fit decreasing: items of different lengths in nearly as few bins of one capacity as possible."""

from __future__ import annotations

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
