"""From a benchmark's examples to the index of their n-grams (ngrams.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.decontaminate.ngrams import Index, codes, rolling
from megatron_ultralong.data.decontaminate.normalise import Ids, Normalise, Vocabulary
from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import Example


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What of the benchmarks is searched for."""

    ngram: int = 13
    """Words that must be the same one after another."""
    min_words: int = 8
    """A text of the benchmark with fewer words than `ngram` is searched for whole if it has at least these."""
    common: int = 10
    """An n-gram that more than this many examples of a benchmark share is its template's, and left out."""
    contexts: bool = False
    """Search for the long contexts too, not only questions, choices and answers."""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram <= 1000:
            raise UserError(f"--ngram {self.ngram}: must be from 2 to 1000")
        if not 1 <= self.min_words <= self.ngram:
            raise UserError(f"--min-words {self.min_words}: must be from 1 to --ngram, {self.ngram}")
        if self.common < 1:
            raise UserError(f"--common {self.common}: must be at least 1")


def build(examples: Iterable[Example], rules: Rules, normalise: Normalise) -> Index:
    """The index of those examples. Texts of a benchmark with the same words count once, for the first example
    that has them."""
    known: dict[str, int] = {}
    vocabulary = Vocabulary(normalise, known, learn=True)
    seen: set[tuple[str, bytes]] = set()
    statistics: dict[str, dict[str, Any]] = {}
    owners: list[tuple[str, str, str, str]] = []
    numbers: list[int] = []  # of each text: its example
    benchmarks: list[int] = []  # of each example: its benchmark
    found: list[Ids] = []
    for number, example in enumerate(examples):
        counts = statistics.setdefault(
            example.benchmark,
            {
                "examples": 0,
                "texts": 0,
                "too_short": 0,
                "unsearchable": 0,
                "ngrams": 0,
                "common": 0,
                "tasks": Counter(),
            },
        )
        counts["examples"] += 1
        counts["tasks"][example.task] += 1
        benchmarks.append(list(statistics).index(example.benchmark))
        searchable = False
        for part, text in texts(example, rules.contexts):
            ids = vocabulary.ids(text)
            counts["too_short"] += len(ids) < rules.min_words
            searchable |= len(ids) >= rules.min_words
            if len(ids) < rules.min_words or (example.benchmark, ids.tobytes()) in seen:
                continue
            seen.add((example.benchmark, ids.tobytes()))
            counts["texts"] += 1
            found.append(ids)
            owners.append((example.benchmark, example.task, example.id, part))
            numbers.append(number)
        counts["unsearchable"] += not searchable
    flat = numpy.concatenate(found) if found else numpy.zeros(0, dtype=numpy.int32)
    entries = _entries(
        flat, numpy.array([len(ids) for ids in found], dtype=numpy.int64), rules.ngram, len(known)
    )
    kept = _own(
        entries,
        numpy.array(numbers, dtype=numpy.int64),
        numpy.array(benchmarks, dtype=numpy.int64),
        rules.common,
        list(statistics.values()),
    )
    hashes, positions, lengths, owner = (column[kept] for column in entries)
    return Index(
        normalise,
        known,
        flat,
        owners,
        hashes,
        positions,
        lengths.astype(numpy.uint16),
        owner.astype(numpy.int32),
        statistics,
    )


def texts(example: Example, contexts: bool = False) -> Iterator[tuple[str, str]]:
    """(which part, text) of all that is searched for of an example: the question, each answer, and the parts
    as they stand together."""
    yield "question", example.question
    for answer in example.answers:
        yield "answer", answer
    answers = " ".join(example.answers)
    if example.choices:
        lettered = " ".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(example.choices))
        yield "together, lettered", f"{example.question} {lettered} {answers}"
    yield "together", " ".join([example.question, *example.choices, answers])
    if contexts and example.context:
        yield "context", example.context


def _entries(flat: Ids, sizes: NDArray[numpy.int64], ngram: int, words: int) -> tuple[NDArray[Any], ...]:
    """(hash, place in flat, words, text) of each n-gram of each text, and of each shorter text as a whole;
    sorted by hash and place."""
    starts = numpy.concatenate([[0], numpy.cumsum(sizes)[:-1]]).astype(numpy.int64) if len(sizes) else sizes
    lengths = numpy.minimum(sizes, ngram)
    counts = sizes - lengths + 1
    owner = numpy.repeat(numpy.arange(len(sizes)), counts)
    offsets = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    positions, length = starts[owner] + offsets, lengths[owner]
    hashes = numpy.zeros(len(owner), dtype=numpy.uint64)
    if len(owner):
        for size, all_of_size in rolling(codes(words)[flat], sorted(set(lengths.tolist()))):
            of_size = length == size
            hashes[of_size] = all_of_size[positions[of_size]]
    order = numpy.lexsort((positions, hashes))
    return hashes[order], positions[order], length[order], owner[order]


def _own(
    entries: tuple[NDArray[Any], ...],
    numbers: NDArray[numpy.int64],
    benchmarks: NDArray[numpy.int64],
    common: int,
    statistics: list[dict[str, Any]],
) -> NDArray[numpy.bool_]:
    """Which entries to keep: one for an example and n-gram, none where more than `common` examples of a
    benchmark share the n-gram."""
    hashes, _, _, owner = entries
    example = numbers[owner]
    order = numpy.lexsort(
        (example, hashes)
    )  # stable: of an example's same n-grams, the first place comes first
    again = (hashes[order][1:] == hashes[order][:-1]) & (example[order][1:] == example[order][:-1])
    kept = numpy.ones(len(hashes), dtype=bool)
    kept[order[1:][again]] = False
    chosen = numpy.flatnonzero(kept)
    benchmark = benchmarks[example[chosen]]
    order = chosen[numpy.lexsort((benchmark, hashes[chosen]))]
    key_hash, key_benchmark = hashes[order], benchmarks[example[order]]
    new = numpy.ones(len(order), dtype=bool)
    new[1:] = (key_hash[1:] != key_hash[:-1]) | (key_benchmark[1:] != key_benchmark[:-1])
    group = numpy.cumsum(new) - 1
    shared = numpy.bincount(group) if len(group) else group
    kept[order[shared[group] > common]] = False
    for i, counts in enumerate(statistics):
        of_benchmark = key_benchmark[new] == i
        counts["ngrams"] = int((of_benchmark & (shared <= common)).sum())
        counts["common"] = int((of_benchmark & (shared > common)).sum())
    return kept
