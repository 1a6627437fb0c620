"""Items of different lengths into as few bins of one capacity as a good rule of thumb finds: best fit,
longest first."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray


def best_fit(lengths: NDArray[Any], capacity: int) -> NDArray[numpy.int64]:
    """The bin of each item, int64 [items]; bins are numbered from 0 in the order they are opened.

    lengths: int [items], each 1 to `capacity`. Longest item first (of equal ones the earlier), each into the
    bin with the least room that still holds it, a new one where none does: at most 11/9 of the fewest
    possible bins, and a few. The result depends on nothing but the arguments. A million items take seconds,
    whatever the capacity.
    """
    assert len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= capacity
    of_item = numpy.empty(len(lengths), numpy.int64)
    room = _Rooms(capacity)
    opened = 0
    order = numpy.argsort(-lengths.astype(numpy.int64), kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        found = room.take(length)
        if found is None:
            found = (opened, capacity)
            opened += 1
        which, left = found
        of_item[item] = which
        if left > length:
            room.put(which, left - length)
    return of_item


def contents(of_item: NDArray[numpy.int64]) -> list[NDArray[numpy.int64]]:
    """The items of each bin, in their own order: for every bin its item numbers, int64."""
    if not len(of_item):
        return []
    order = numpy.argsort(of_item, kind="stable")
    return numpy.split(order, numpy.flatnonzero(numpy.diff(of_item[order])) + 1)


class _Rooms:
    """Bins by the room that is left in them.

    Which rooms occur is kept as a bit set of two levels, each word a Python integer of about sqrt(capacity)
    bits: the next larger room is two shifts away, where a tree over 4M rooms would take twenty-two steps.
    """

    def __init__(self, capacity: int) -> None:
        self._bits = max(int(capacity**0.5), 64)
        self._words = [0] * (capacity // self._bits + 1)
        self._used = 0
        """Bit k is set where word k is not 0."""
        self._bins: dict[int, list[int]] = {}

    def put(self, which: int, room: int) -> None:
        """A bin that is not in yet."""
        same = self._bins.setdefault(room, [])
        if not same:
            word, bit = divmod(room, self._bits)
            self._words[word] |= 1 << bit
            self._used |= 1 << word
        same.append(which)

    def take(self, least: int) -> tuple[int, int] | None:
        """(bin, room) of a bin with the smallest room of at least `least`, which is out from now on; None
        where there is none."""
        word, bit = divmod(least, self._bits)
        found = self._words[word] >> bit
        if found:
            bit += _lowest(found)
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
    """Place of the lowest bit set."""
    return (bits & -bits).bit_length() - 1
