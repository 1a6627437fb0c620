"""Text to the words that contamination is counted in, and back to where they stand in the text.

A text is split at white space, and each part is normalised alone, so that a part seen before costs one
look-up.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy
import regex
from numpy.typing import NDArray

from megatron_ultralong.errors import UserError

STEPS = ("nfkc", "lower", "punctuation", "cjk")
PRESETS = {"words": STEPS, "exact": ()}

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts written without spaces between words
_BLOCK = 1 << 20
"""Characters split into parts at a time: their list takes some fifty times that, in bytes."""
_LONG = 48  # characters; a part of more is unlikely to come again, and is not remembered
_MOST = 1 << 18  # parts remembered at a time: some 40 MB

_SPACE = regex.compile(r"[\s\x1c-\x1f]")  # what str.split() splits at
_PART = regex.compile(r"[^\s\x1c-\x1f]+")

Ids = NDArray[numpy.int32]


@dataclass(frozen=True)
class Normalise:
    """What two texts may differ in and still have the same words.

    nfkc: Unicode's compatibility forms. lower: case (folded). punctuation: all but letters, digits and marks
    separates words, white space alone otherwise. cjk: each character of a script written without spaces (Han,
    kana, Thai, Lao, Khmer, Myanmar) is a word.
    """

    steps: tuple[str, ...] = STEPS

    @staticmethod
    def parse(text: str) -> Normalise:
        """A preset's name, or steps joined by commas. UserError for others."""
        if text in PRESETS:
            return Normalise(PRESETS[text])
        steps = tuple(step.strip() for step in text.split(","))
        for step in steps:
            if step not in STEPS:
                raise UserError(
                    f"--normalise {text}: {step!r} is not known; give {' or '.join(PRESETS)}, or some of {','.join(STEPS)}"
                )
        return Normalise(tuple(step for step in STEPS if step in steps))

    @cached_property
    def _pattern(self) -> Any:
        other = r"\p{L}\p{N}\p{M}" if "punctuation" in self.steps else r"\S"
        pattern = (
            rf"[{_UNSPACED}]\p{{M}}*|[[{other}]--[{_UNSPACED}]]+" if "cjk" in self.steps else rf"[{other}]+"
        )
        return regex.compile(pattern, regex.V1)

    def _form(self, part: str) -> str:
        if "nfkc" in self.steps:
            part = unicodedata.normalize("NFKC", part)
        if "lower" in self.steps:
            part = part.casefold()
        return part

    def words(self, part: str) -> list[str]:
        """The words of a text, or of a part of it between white space."""
        return self._pattern.findall(self._form(part))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each word of a text, the characters of `text` that made it: start, and end (exclusive)."""
        return list(
            chain.from_iterable(self._part_spans(found[0], found.start()) for found in _PART.finditer(text))
        )

    def _part_spans(self, part: str, start: int) -> Iterator[tuple[int, int]]:
        form = self._form(part)
        found = [match.span() for match in self._pattern.finditer(form)]
        if form == part or (len(form) == len(part) and part.isascii()):
            yield from ((start + a, start + b) for a, b in found)
            return
        origin: list[
            tuple[int, int]
        ] = []  # for each character of `form`, the piece of `part` that it comes from
        for cluster in regex.finditer(r"\X", part):
            origin += [cluster.span()] * len(self._form(cluster[0]))
        if len(origin) != len(form):  # pieces that only together have this form: all of the part then
            origin = [(0, len(part))] * len(form)
        yield from ((start + origin[a][0], start + origin[b - 1][1]) for a, b in found)


class Vocabulary(dict[str, tuple[int, ...]]):
    """Text to ids of words: 1 and more for the words it was made with, 0 for any other. What it has seen of a
    text, it remembers."""

    def __init__(self, normalise: Normalise, known: dict[str, int], learn: bool = False) -> None:
        super().__init__()
        self.normalise, self.known, self.learn = normalise, known, learn

    def __missing__(self, part: str) -> tuple[int, ...]:
        words = self.normalise.words(part)
        ids = tuple(
            self.known.setdefault(word, len(self.known) + 1) if self.learn else self.known.get(word, 0)
            for word in words
        )
        if len(part) <= _LONG:
            if len(self) >= _MOST:
                self.clear()
            self[part] = ids
        return ids

    def ids(self, text: str) -> Ids:
        """The ids of a text's words."""
        blocks = [
            numpy.fromiter(chain.from_iterable(map(self.__getitem__, block.split())), dtype=numpy.int32)
            for block in _blocks(text)
        ]
        return blocks[0] if len(blocks) == 1 else numpy.concatenate(blocks)


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces of about _BLOCK characters that end at white space."""
    start = 0
    while len(text) - start > _BLOCK:
        found = _SPACE.search(text, start + _BLOCK)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text
