"""The n-grams of the benchmarks, and where a text has any of them: found by hash, and then compared word by
word.

Words have ids (normalise.py), so an n-gram is a row of ids. The hash of a row w of L ids is sum of code(w[i])
B^(L-1-i) plus a term for L, modulo 2^64; it is computed for all places of a text at once. A text of fewer
than n words is searched for whole. A word of the benchmarks takes some 22 bytes, in files that processes
share, and 16 to 32 in each process; while the index is built, some 120.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.decontaminate.normalise import Ids, Normalise, Vocabulary

_BASE = numpy.uint64(0x9E3779B97F4A7C15)
_LENGTH = 0xD1B54A32D192ED03
_SLOTS = 16  # places of a coarse table for each n-gram, at least
_STRIDE = 1 << 15  # words looked at in one go: what this takes fits a core's cache


@dataclass(frozen=True)
class Hit:
    """Words of a text that a benchmark's text has too."""

    start: int
    """First word, counted in the text."""
    length: int
    """Words."""
    text: int
    """Number of the benchmark's text."""


@dataclass
class Index:
    """What is searched for. Arrays of one entry an n-gram of an example are sorted by hash."""

    normalise: Normalise
    vocabulary: dict[str, int]
    """Word to id, from 1."""
    flat: Ids
    """Ids of all texts, one after another."""
    owners: list[tuple[str, str, str, str]]
    """Of each text: benchmark, task, id of the example, and which part of it the text is."""
    hashes: NDArray[numpy.uint64]
    positions: NDArray[numpy.int64]
    """Where in `flat` the n-gram starts."""
    lengths: NDArray[numpy.uint16]
    """Its words."""
    texts: NDArray[numpy.int32]
    """Number of its text."""
    statistics: dict[str, dict[str, Any]]
    """Of each benchmark: examples, texts, too_short, unsearchable examples, ngrams, common, and examples of
    each task."""

    def __post_init__(self) -> None:
        self._codes = codes(len(self.vocabulary))
        self._sizes = numpy.unique(self.lengths).tolist()
        self._coarse = {size: _coarse(self.hashes[self.lengths == size]) for size in self._sizes}

    def words(self) -> Vocabulary:
        """What turns text into the ids that `find` takes."""
        return Vocabulary(self.normalise, self.vocabulary)

    def find(self, ids: Ids) -> Iterator[Hit]:
        """Every n-gram of the benchmarks in a row of ids, once for each example that has it. Ids of 0 are in
        none."""
        if not self._sizes:
            return
        overlap = self._sizes[-1] - 1
        for begin in range(0, max(len(ids) - self._sizes[0] + 1, 0), _STRIDE):
            part = ids[begin : begin + _STRIDE + overlap]
            for length, hashes in rolling(self._codes[part], self._sizes):
                hashes, (slots, shift) = hashes[:_STRIDE], self._coarse[length]
                places = numpy.flatnonzero(slots[hashes >> shift])
                if len(places):
                    for place, entry in self._compared(part, hashes[places], places, length):
                        yield Hit(begin + place, length, int(self.texts[entry]))

    def _compared(
        self, ids: Ids, hashes: NDArray[Any], places: NDArray[Any], length: int
    ) -> Iterator[tuple[int, int]]:
        first = numpy.searchsorted(self.hashes, hashes, side="left")
        last = numpy.searchsorted(self.hashes, hashes, side="right")
        for i in numpy.flatnonzero(last > first):
            place = int(places[i])
            for entry in range(first[i], last[i]):
                position = self.positions[entry]
                if self.lengths[entry] == length and numpy.array_equal(
                    self.flat[position : position + length], ids[place : place + length]
                ):
                    yield place, entry

    def digest(self) -> str:
        """Changes with whatever is searched for."""
        made = hashlib.sha256(json.dumps([self.normalise.steps, list(self.vocabulary), self.owners]).encode())
        for array in (self.flat, self.hashes, self.positions, self.lengths, self.texts):
            made.update(numpy.ascontiguousarray(array).tobytes())
        return made.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            numpy.save(folder / f"{name}.npy", getattr(self, name))
        rest = {
            "steps": self.normalise.steps,
            "words": list(self.vocabulary),
            "owners": self.owners,
            "statistics": self.statistics,
        }
        (folder / "rest.json").write_text(json.dumps(rest), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Index:
        """A saved one; its arrays stay on disk, in memory that all processes share."""
        rest = json.loads((folder / "rest.json").read_text(encoding="utf-8"))
        arrays = {name: numpy.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return Index(
            Normalise(tuple(rest["steps"])),
            {word: i for i, word in enumerate(rest["words"], 1)},
            owners=[tuple(owner) for owner in rest["owners"]],
            statistics=rest["statistics"],
            **arrays,
        )


_ARRAYS = ("flat", "hashes", "positions", "lengths", "texts")


def codes(words: int) -> NDArray[numpy.uint64]:
    """A number of 64 mixed bits for each id from 0 to `words` (splitmix64)."""
    code = numpy.arange(1, words + 2, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return code ^ (code >> numpy.uint64(31))


def _coarse(hashes: NDArray[numpy.uint64]) -> tuple[NDArray[numpy.bool_], numpy.uint64]:
    """(slots, shift): slots[h >> shift] is set for each h of `hashes`, and for few other numbers. Most places
    of a text end here."""
    bits = max((len(hashes) * _SLOTS).bit_length(), 10)
    shift = numpy.uint64(64 - bits)
    slots = numpy.zeros(1 << bits, dtype=bool)
    slots[hashes >> shift] = True
    return slots, shift


def rolling(codes: NDArray[numpy.uint64], sizes: list[int]) -> Iterator[tuple[int, NDArray[numpy.uint64]]]:
    """(L, hashes of the L words from each place on) for each L of `sizes`, which rise."""
    hashes = codes.copy()
    for length in range(1, sizes[-1] + 1):
        if length > len(codes):
            return
        if length > 1:
            hashes = hashes[:-1]
            hashes *= _BASE
            hashes += codes[length - 1 :]
        if length in sizes:
            mixed = hashes + numpy.uint64(length * _LENGTH % 2**64)
            mixed ^= mixed >> numpy.uint64(32)  # the coarse table goes by the upper bits
            mixed *= _BASE
            yield length, mixed


def spans(hits: Iterable[Hit], owners: list[tuple[str, str, str, str]]) -> list[Hit]:
    """Hits of one text joined where they touch or overlap, separately for each example; in order."""
    of_example: dict[tuple[str, str, str], list[Hit]] = defaultdict(list)
    for hit in sorted(hits, key=lambda hit: (hit.start, -hit.length)):
        row = of_example[owners[hit.text][:3]]
        if row and hit.start <= row[-1].start + row[-1].length:
            end = max(row[-1].start + row[-1].length, hit.start + hit.length)
            row[-1] = Hit(row[-1].start, end - row[-1].start, row[-1].text)
        else:
            row.append(hit)
    return sorted((hit for row in of_example.values() for hit in row), key=lambda hit: (hit.start, hit.text))
