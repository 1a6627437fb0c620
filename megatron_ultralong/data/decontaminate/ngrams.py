"""The index of the benchmarks' n-grams, and the search for them: found by hash, then compared word by word.

Words have ids (normalise.py), so an n-gram is a sequence of ids. The hash of L ids w is the polynomial sum of
h(w[i]) B^(L-1-i), mixed with L, modulo 2^64; it is computed for all positions of a text at once. A text of
fewer than n words is searched for as a complete text. Each word of the benchmarks takes about 22 bytes in
files that processes share, and 16 to 32 bytes in each process; about 120 while the index is built.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.decontaminate.normalise import Normalisation, Vocabulary, WordIds

_BASE = numpy.uint64(0x9E3779B97F4A7C15)
_LENGTH = 0xD1B54A32D192ED03
_FILTER_SLOTS = 16
"""Slots of the hash filter for each n-gram, at least."""
_STRIDE = 1 << 15
"""Words searched at a time: their hashes fit a core's cache."""


class BenchmarkText(NamedTuple):
    """Where a text that is searched for comes from."""

    benchmark: str
    task: str
    example: str
    """Id of the example."""
    part: str
    """Which part of the example: question, answer, context, or several together."""


@dataclass(frozen=True)
class NgramMatch:
    """Words that a text shares with a text of a benchmark."""

    start: int
    """First word, counted in the text."""
    length: int
    """Words."""
    text_number: int
    """Number of the benchmark's text in `NgramIndex.texts`."""


@dataclass
class NgramIndex:
    """The n-grams that are searched for. `hashes`, `positions`, `lengths` and `text_numbers` have one entry
    for each n-gram of an example, sorted by hash."""

    normalisation: Normalisation
    word_to_id: dict[str, int]
    """Ids count from 1."""
    texts: list[BenchmarkText]
    word_ids: WordIds
    """Words of all texts, concatenated."""
    hashes: NDArray[numpy.uint64]
    positions: NDArray[numpy.int64]
    """Where in `word_ids` the n-gram starts."""
    lengths: NDArray[numpy.uint16]
    """Its words."""
    text_numbers: NDArray[numpy.int32]
    """Its text."""
    statistics: dict[str, dict[str, Any]]
    """Of each benchmark: examples, texts, too_short, unsearchable examples, ngrams, common, and examples of
    each task."""

    def __post_init__(self) -> None:
        self._word_hashes = word_hashes(len(self.word_to_id))
        self._sizes = numpy.unique(self.lengths).tolist()
        self._filters = {size: _hash_filter(self.hashes[self.lengths == size]) for size in self._sizes}

    def vocabulary(self) -> Vocabulary:
        """Return the encoder from text to the ids that `search` takes."""
        return Vocabulary(self.normalisation, self.word_to_id)

    def search(self, ids: WordIds) -> Iterator[NgramMatch]:
        """Yield every n-gram of the benchmarks in a sequence of ids, once for each example that has it. Ids
        of 0 are in none."""
        if not self._sizes:
            return
        overlap = self._sizes[-1] - 1
        for begin in range(0, max(len(ids) - self._sizes[0] + 1, 0), _STRIDE):
            window = ids[begin : begin + _STRIDE + overlap]
            for length, hashes in rolling_hashes(self._word_hashes[window], self._sizes):
                hashes, (slots, shift) = hashes[:_STRIDE], self._filters[length]
                starts = numpy.flatnonzero(slots[hashes >> shift])
                if len(starts):
                    for start, entry in self._compare(window, hashes[starts], starts, length):
                        yield NgramMatch(begin + start, length, int(self.text_numbers[entry]))

    def _compare(
        self, ids: WordIds, hashes: NDArray[Any], starts: NDArray[Any], length: int
    ) -> Iterator[tuple[int, int]]:
        """Yield (start, index entry) of those starts whose words are equal to an entry's, not only the
        hash."""
        first = numpy.searchsorted(self.hashes, hashes, side="left")
        last = numpy.searchsorted(self.hashes, hashes, side="right")
        for i in numpy.flatnonzero(last > first):
            start = int(starts[i])
            for entry in range(first[i], last[i]):
                position = self.positions[entry]
                if self.lengths[entry] == length and numpy.array_equal(
                    self.word_ids[position : position + length], ids[start : start + length]
                ):
                    yield start, entry

    def digest(self) -> str:
        """Return a SHA-256 of everything that is searched for."""
        digest = hashlib.sha256(
            json.dumps([self.normalisation.steps, list(self.word_to_id), self.texts]).encode()
        )
        for name in _ARRAYS:
            digest.update(numpy.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            numpy.save(folder / f"{name}.npy", getattr(self, name))
        rest = {
            "steps": self.normalisation.steps,
            "words": list(self.word_to_id),
            "texts": self.texts,
            "statistics": self.statistics,
        }
        (folder / "rest.json").write_text(json.dumps(rest), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> NgramIndex:
        """Load a saved index; its arrays are memory-mapped, so that all processes share them."""
        rest = json.loads((folder / "rest.json").read_text(encoding="utf-8"))
        arrays = {name: numpy.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return NgramIndex(
            Normalisation(tuple(rest["steps"])),
            {word: i for i, word in enumerate(rest["words"], 1)},
            texts=[BenchmarkText(*text) for text in rest["texts"]],
            statistics=rest["statistics"],
            **arrays,
        )


_ARRAYS = ("word_ids", "hashes", "positions", "lengths", "text_numbers")


def word_hashes(words: int) -> NDArray[numpy.uint64]:
    """Return 64 mixed bits for each id from 0 to `words` (splitmix64)."""
    bits = numpy.arange(1, words + 2, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> numpy.uint64(31))


def _hash_filter(hashes: NDArray[numpy.uint64]) -> tuple[NDArray[numpy.bool_], numpy.uint64]:
    """Return (slots, shift): slots[h >> shift] is set for each h of `hashes`, and for few other numbers. It
    rejects most positions of a text."""
    bits = max((len(hashes) * _FILTER_SLOTS).bit_length(), 10)
    shift = numpy.uint64(64 - bits)
    slots = numpy.zeros(1 << bits, dtype=bool)
    slots[hashes >> shift] = True
    return slots, shift


def rolling_hashes(
    word_hashes: NDArray[numpy.uint64], lengths: list[int]
) -> Iterator[tuple[int, NDArray[numpy.uint64]]]:
    """Yield (L, hash of the L words from each position) for each L of `lengths`, which must be ascending."""
    hashes = word_hashes.copy()
    for length in range(1, lengths[-1] + 1):
        if length > len(word_hashes):
            return
        if length > 1:
            hashes = hashes[:-1]
            hashes *= _BASE
            hashes += word_hashes[length - 1 :]
        if length in lengths:
            mixed = hashes + numpy.uint64(length * _LENGTH % 2**64)
            mixed ^= mixed >> numpy.uint64(32)  # the hash filter uses the upper bits
            mixed *= _BASE
            yield length, mixed


def merge_matches(matches: Iterable[NgramMatch], texts: list[BenchmarkText]) -> list[NgramMatch]:
    """Merge the matches of one document text that touch or overlap, separately for each example; in order."""
    by_example: dict[tuple[str, ...], list[NgramMatch]] = defaultdict(list)
    for match in sorted(matches, key=lambda match: (match.start, -match.length)):
        merged = by_example[texts[match.text_number][:3]]
        if merged and match.start <= merged[-1].start + merged[-1].length:
            last = merged[-1]
            end = max(last.start + last.length, match.start + match.length)
            merged[-1] = NgramMatch(last.start, end - last.start, last.text_number)
        else:
            merged.append(match)
    return sorted(
        (match for merged in by_example.values() for match in merged),
        key=lambda match: (match.start, match.text_number),
    )
