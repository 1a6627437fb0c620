"""Text to the words whose n-grams are compared, and back to the characters of the text.

Benchmarks and documents pass through the same function, `Vocabulary.encode`. A text is split at white space
and each part is normalised alone, so that a part seen before costs one look-up. Only a word that is
hyphenated at the end of a line has two parts, which are joined before.
"""

from __future__ import annotations

import html
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy
import regex
from numpy.typing import NDArray

from megatron_ultralong.errors import UserError

STEPS = ("entities", "invisible", "hyphenation", "nfkc", "lower", "punctuation", "cjk")
PRESETS = {"words": STEPS, "exact": ()}

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts written without spaces between words."""
_BLOCK = 1 << 20
"""Characters split into parts at a time; the list of parts takes about fifty bytes per character."""
_MAX_CACHED_LENGTH = 48
"""Characters; longer parts are unlikely to occur again and are not cached."""
_MAX_CACHED_PARTS = 1 << 18
"""Some 40 MB."""

_ENTITY = re.compile(r"&(?:amp;)*(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
"""A character reference of HTML, also one that was escaped again: &amp;#39;"""
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
"""Soft hyphen, zero-width space, joiner and non-joiner, byte-order mark, marks of direction and the like."""
_LINE_END_HYPHENS = tuple(re.compile(rf"{hyphen}[ \t]*\r?\n[ \t]*") for hyphen in ("-", "[-\u2010\u00ad]"))
"""The hyphen of ASCII, which is found eight times as fast, and all of them."""

_CLUSTER = regex.compile(rf"{_ENTITY.pattern}|\X")
"""What is normalised alone to find where a word comes from."""
_SPACE = regex.compile(r"[\s\x1c-\x1f]")  # what str.split() splits at
_PART = regex.compile(r"[^\s\x1c-\x1f]+")

WordIds = NDArray[numpy.int32]


@dataclass(frozen=True)
class Normalisation:
    """Which differences between two texts are ignored.

    entities: character references of HTML (&amp; &#39; &nbsp;). invisible: characters that are not
    displayed, such as a soft hyphen inside a word. hyphenation: a word hyphenated at the end of a line
    (`Vocabulary.join_hyphenated`). nfkc: Unicode compatibility forms. lower: case (folded). punctuation:
    everything but letters, digits and marks separates words; without it only white space does. cjk: each
    character of a script written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) is a word.
    """

    steps: tuple[str, ...] = STEPS

    @staticmethod
    def parse(text: str) -> Normalisation:
        """Parse the name of a preset, or steps separated by commas. UserError for anything else."""
        if text in PRESETS:
            return Normalisation(PRESETS[text])
        steps = tuple(step.strip() for step in text.split(","))
        for step in steps:
            if step not in STEPS:
                raise UserError(
                    f"--normalise {text}: unknown step {step!r}; use {' or '.join(PRESETS)}, or some of {','.join(STEPS)}"
                )
        return Normalisation(tuple(step for step in STEPS if step in steps))

    @cached_property
    def _word_pattern(self) -> Any:
        other = r"\p{L}\p{N}\p{M}" if "punctuation" in self.steps else r"\S"
        pattern = (
            rf"[{_UNSPACED}]\p{{M}}*|[[{other}]--[{_UNSPACED}]]+" if "cjk" in self.steps else rf"[{other}]+"
        )
        return regex.compile(pattern, regex.V1)

    def _normalise(self, part: str) -> str:
        if "&" in part and "entities" in self.steps:
            part = _ENTITY.sub(_unescape, part)
        if "invisible" in self.steps and not part.isascii():
            part = _INVISIBLE.sub("", part)
        if "nfkc" in self.steps:
            part = unicodedata.normalize("NFKC", part)
        if "lower" in self.steps:
            part = part.casefold()
        return part

    def words(self, part: str) -> list[str]:
        """Return the normalised words of a text, or of a part of it between white space."""
        return self._word_pattern.findall(self._normalise(part))

    def word_spans(self, text: str) -> list[tuple[int, int]]:
        """Return for each word of a text the characters of `text` it came from: start, and end
        (exclusive)."""
        return list(
            chain.from_iterable(self._part_spans(part[0], part.start()) for part in _PART.finditer(text))
        )

    def _part_spans(self, part: str, start: int) -> Iterator[tuple[int, int]]:
        normalised = self._normalise(part)
        spans = [match.span() for match in self._word_pattern.finditer(normalised)]
        if normalised == part or (len(normalised) == len(part) and part.isascii()):
            yield from ((start + a, start + b) for a, b in spans)
            return
        origin: list[tuple[int, int]] = []  # for each normalised character, the characters of `part`
        for cluster in _CLUSTER.finditer(part):
            origin += [cluster.span()] * len(self._normalise(cluster[0]))
        if len(origin) != len(
            normalised
        ):  # clusters that only together have this form: the complete part then
            origin = [(0, len(part))] * len(normalised)
        yield from ((start + origin[a][0], start + origin[b - 1][1]) for a, b in spans)


def _unescape(entity: re.Match[str]) -> str:
    text, before = entity[0], ""
    while text != before:
        text, before = html.unescape(text), text
    return text


class Vocabulary(dict[str, tuple[int, ...]]):
    """Text to ids of words: from 1 for the words it was made with, 0 for any other. As a dict it caches the
    ids of parts of text."""

    def __init__(self, normalisation: Normalisation, word_to_id: dict[str, int], learn: bool = False) -> None:
        """learn: give new words the next id, in `word_to_id`."""
        super().__init__()
        self.normalisation, self.word_to_id, self.learn = normalisation, word_to_id, learn

    def __missing__(self, part: str) -> tuple[int, ...]:
        words = self.normalisation.words(part)
        if self.learn:
            ids = tuple(self.word_to_id.setdefault(word, len(self.word_to_id) + 1) for word in words)
        else:
            ids = tuple(self.word_to_id.get(word, 0) for word in words)
        if len(part) <= _MAX_CACHED_LENGTH:
            if len(self) >= _MAX_CACHED_PARTS:
                self.clear()
            self[part] = ids
        return ids

    def join_hyphenated(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Join words that are hyphenated at the end of a line; return the text, and the characters that were
        left out, begin and end of each.

        In a document, they are joined where that makes a word of the benchmarks (exam-/ple), and otherwise
        stay two words, as those of a compound (well-/known): only words of the benchmarks can match. In a
        benchmark's own text, they are joined if the second line begins with a small letter.
        """
        pattern = _LINE_END_HYPHENS["\u2010" in text or "\u00ad" in text]
        cuts = [match.span() for match in pattern.finditer(text) if self._joins(text, *match.span())]
        if not cuts:
            return text, cuts
        begins = [0, *(end for _, end in cuts)]
        ends = [*(begin for begin, _ in cuts), len(text)]
        return "".join(text[begin:end] for begin, end in zip(begins, ends, strict=True)), cuts

    def _joins(self, text: str, begin: int, end: int) -> bool:
        before = text[max(begin - _MAX_CACHED_LENGTH, 0) : begin].split()
        after = text[end : end + _MAX_CACHED_LENGTH].split()
        if not before or not after or not (text[begin - 1 : begin] + text[end : end + 1]).isalpha():
            return False
        if self.learn:
            return after[0][0].islower()
        words = self.normalisation.words(before[-1] + after[0])
        place = len(self.normalisation.words(before[-1])) - 1
        return 0 <= place < len(words) and words[place] in self.word_to_id

    def encode(self, text: str) -> WordIds:
        """Return the ids of a text's words, int32 [words]."""
        if "hyphenation" in self.normalisation.steps:
            text, _ = self.join_hyphenated(text)
        blocks = [
            numpy.fromiter(chain.from_iterable(map(self.__getitem__, block.split())), dtype=numpy.int32)
            for block in _blocks(text)
        ]
        return blocks[0] if len(blocks) == 1 else numpy.concatenate(blocks)

    def word_spans(self, text: str) -> list[tuple[int, int]]:
        """Return for each word that `encode` finds the characters of `text` it came from: start, and end
        (exclusive)."""
        if "hyphenation" not in self.normalisation.steps:
            return self.normalisation.word_spans(text)
        joined, cuts = self.join_hyphenated(text)
        sizes = [0, *accumulate(end - begin for begin, end in cuts)]
        places = [begin - size for (begin, _), size in zip(cuts, sizes, strict=False)]  # in `joined`
        return [
            (start + sizes[bisect_right(places, start)], end + sizes[bisect_left(places, end)])
            for start, end in self.normalisation.word_spans(joined)
        ]


def _blocks(text: str) -> Iterator[str]:
    """Split the text into blocks of about _BLOCK characters that end at white space."""
    start = 0
    while len(text) - start > _BLOCK:
        space = _SPACE.search(text, start + _BLOCK)
        if space is None:
            break
        yield text[start : space.start()]
        start = space.start()
    yield text[start:] if start else text
