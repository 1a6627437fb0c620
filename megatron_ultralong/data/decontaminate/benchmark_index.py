"""From the examples of benchmarks to the index of their n-grams (ngrams.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.decontaminate.ngrams import (
    BenchmarkText,
    NgramIndex,
    rolling_hashes,
    word_hashes,
)
from megatron_ultralong.data.decontaminate.normalise import Normalisation, Vocabulary, WordIds
from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import BenchmarkExample

COUNTS = ("examples", "texts", "too_short", "unsearchable", "ngrams", "common")
"""What the report counts of each benchmark."""


@dataclass(frozen=True, kw_only=True)
class NgramRules:
    """Which n-grams of the benchmarks are searched for."""

    ngram: int = 13
    """Consecutive words that make a match."""
    min_words: int = 8
    """A text with fewer words than `ngram` is searched for as a complete text if it has at least this
    many."""
    common: int = 10
    """An n-gram that more than this many examples of a benchmark share belongs to its template and is
    ignored."""
    contexts: bool = False
    """Search for the long contexts too, not only questions, choices and answers."""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram <= 1000:
            raise UserError(f"--ngram {self.ngram}: must be from 2 to 1000")
        if not 1 <= self.min_words <= self.ngram:
            raise UserError(f"--min-words {self.min_words}: must be from 1 to --ngram, {self.ngram}")
        if self.common < 1:
            raise UserError(f"--common {self.common}: must be at least 1")


def build_index(
    examples: Iterable[BenchmarkExample], rules: NgramRules, normalisation: Normalisation
) -> NgramIndex:
    """Build the index of those examples. Texts of a benchmark with the same words count once, for the first
    example that has them."""
    word_to_id: dict[str, int] = {}
    vocabulary = Vocabulary(normalisation, word_to_id, learn=True)
    seen: set[tuple[str, bytes]] = set()
    statistics: dict[str, dict[str, Any]] = {}
    texts: list[BenchmarkText] = []
    ids_of_texts: list[WordIds] = []
    example_of_text: list[int] = []
    benchmark_of_example: list[int] = []
    for number, example in enumerate(examples):
        counts = statistics.setdefault(example.benchmark, {**dict.fromkeys(COUNTS, 0), "tasks": Counter()})
        counts["examples"] += 1
        counts["tasks"][example.task] += 1
        benchmark_of_example.append(list(statistics).index(example.benchmark))
        searchable = False
        for part, text in searched_texts(example, rules.contexts):
            ids = vocabulary.encode(text)
            if len(ids) < rules.min_words:
                counts["too_short"] += 1
                continue
            searchable = True
            if (example.benchmark, ids.tobytes()) in seen:
                continue
            seen.add((example.benchmark, ids.tobytes()))
            counts["texts"] += 1
            ids_of_texts.append(ids)
            texts.append(BenchmarkText(example.benchmark, example.task, example.id, part))
            example_of_text.append(number)
        counts["unsearchable"] += not searchable
    word_ids = numpy.concatenate(ids_of_texts) if ids_of_texts else numpy.zeros(0, dtype=numpy.int32)
    sizes = numpy.array([len(ids) for ids in ids_of_texts], dtype=numpy.int64)
    entries = _all_ngrams(word_ids, sizes, rules.ngram, len(word_to_id))
    kept = _select_ngrams(
        entries,
        numpy.array(example_of_text, dtype=numpy.int64),
        numpy.array(benchmark_of_example, dtype=numpy.int64),
        rules.common,
        list(statistics.values()),
    )
    hashes, positions, lengths, text_numbers = (column[kept] for column in entries)
    return NgramIndex(
        normalisation,
        word_to_id,
        texts,
        word_ids,
        hashes,
        positions,
        lengths.astype(numpy.uint16),
        text_numbers.astype(numpy.int32),
        statistics,
    )


def searched_texts(example: BenchmarkExample, contexts: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (part, text) of all that is searched for of an example: the question, each answer, and the parts
    together, as they appear in a prompt."""
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


def _all_ngrams(
    word_ids: WordIds, sizes: NDArray[numpy.int64], ngram: int, words: int
) -> tuple[NDArray[Any], ...]:
    """Return (hash, position in word_ids, words, text number) of each n-gram of each text, and of each
    shorter text as a whole; sorted by hash and position. sizes: words of each text. words: size of the
    vocabulary."""
    starts = numpy.concatenate([[0], numpy.cumsum(sizes)[:-1]]).astype(numpy.int64) if len(sizes) else sizes
    lengths = numpy.minimum(sizes, ngram)
    counts = sizes - lengths + 1
    text_numbers = numpy.repeat(numpy.arange(len(sizes)), counts)
    offsets = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    positions, length = starts[text_numbers] + offsets, lengths[text_numbers]
    hashes = numpy.zeros(len(text_numbers), dtype=numpy.uint64)
    if len(text_numbers):
        for size, hashes_of_size in rolling_hashes(
            word_hashes(words)[word_ids], sorted(set(lengths.tolist()))
        ):
            of_size = length == size
            hashes[of_size] = hashes_of_size[positions[of_size]]
    order = numpy.lexsort((positions, hashes))
    return hashes[order], positions[order], length[order], text_numbers[order]


def _select_ngrams(
    entries: tuple[NDArray[Any], ...],
    example_of_text: NDArray[numpy.int64],
    benchmark_of_example: NDArray[numpy.int64],
    common: int,
    statistics: list[dict[str, Any]],
) -> NDArray[numpy.bool_]:
    """Return which entries to keep, bool [entries]: one for an example and n-gram, none where more than
    `common` examples of a benchmark share the n-gram. Counts both in `statistics`, one dictionary per
    benchmark."""
    hashes, _, _, text_numbers = entries
    example = example_of_text[text_numbers]
    # A stable sort: of equal n-grams of an example, the first position comes first.
    order = numpy.lexsort((example, hashes))
    repeated = (hashes[order][1:] == hashes[order][:-1]) & (example[order][1:] == example[order][:-1])
    kept = numpy.ones(len(hashes), dtype=bool)
    kept[order[1:][repeated]] = False
    unique = numpy.flatnonzero(kept)
    benchmark = benchmark_of_example[example[unique]]
    order = unique[numpy.lexsort((benchmark, hashes[unique]))]
    group_hash, group_benchmark = hashes[order], benchmark_of_example[example[order]]
    first = numpy.ones(len(order), dtype=bool)
    first[1:] = (group_hash[1:] != group_hash[:-1]) | (group_benchmark[1:] != group_benchmark[:-1])
    group = numpy.cumsum(first) - 1
    examples_of_group = numpy.bincount(group) if len(group) else group
    kept[order[examples_of_group[group] > common]] = False
    for i, counts in enumerate(statistics):
        of_benchmark = group_benchmark[first] == i
        counts["ngrams"] = int((of_benchmark & (examples_of_group <= common)).sum())
        counts["common"] = int((of_benchmark & (examples_of_group > common)).sum())
    return kept
