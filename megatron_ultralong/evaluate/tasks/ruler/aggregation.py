"""RULER's aggregation tasks: the most common words of a list (cwe), the most frequent words of a coded text
(fwe)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from megatron_ultralong.evaluate.tasks.ruler import filler_text
from megatron_ultralong.evaluate.tasks.ruler.fill_length import FillerText, PromptDraft
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial, distinct
from megatron_ultralong.evaluate.tasks.ruler.tasks import RulerTask

COMMON_WORDS = 10
"""cwe: number of most common words that the prompt asks for."""
SHORT = 4096
"""cwe: below this length words are repeated less often, as in RULER."""
CODED_LETTERS, ALPHA, ZETA = 6, 2.0, math.pi**2 / 6
"""fwe: letters of a word; word k (from 1) has the frequency k^-ALPHA / ZETA, where ZETA = zeta(ALPHA)."""


def cwe_draft(material: PromptMaterial, length: int, rng: random.Random) -> PromptDraft:
    """cwe: find the 10 words that occur most often in a numbered list."""
    example_words, example_often, example_seldom, often, seldom = (
        (20, 3, 1, 6, 1) if length < SHORT else (40, 10, 3, 30, 3)
    )
    template, prefix, counts = material.wording.cwe, material.wording.cwe_prefix, material.encoder.counts
    first = COMMON_WORDS + example_words  # index of the first rare word of the list
    words = FillerText(counts, _cwe_words(random.Random(rng.random()), single=True))
    # Some single words are parts of others and left out.
    max_units: int | None = len(filler_text.SINGLE) - 2 * first

    def estimate(n: int) -> float:
        numbers = material.number_tokens(COMMON_WORDS * often + n * seldom)
        rare = words.tokens(first + n) - words.tokens(first)
        return words.tokens(COMMON_WORDS) * often + rare * seldom + numbers

    if max_units and estimate(max_units) < length:  # too few single words for this length: use pairs of words
        words = FillerText(counts, _cwe_words(random.Random(rng.random()), single=False))
        max_units = None
    common = words.pieces(COMMON_WORDS)
    shown = words.pieces(first)[COMMON_WORDS:]
    example = (
        template.format(context=_numbered(rng, shown, example_often, example_seldom))
        + prefix
        + " "
        + " ".join(f"{i}. {word}" for i, word in enumerate(shown[:COMMON_WORDS], 1))
    )
    seed = rng.random()

    def render(n: int) -> str:
        listed = [*common, *words.pieces(first + n)[first:]]
        return example + "\n" + template.format(context=_numbered(random.Random(seed), listed, often, seldom))

    return PromptDraft(
        render=render,
        estimate=estimate,
        prefix=prefix,
        outputs=common,
        max_units=max_units,
        is_valid=lambda text: all(text.count(word) == often for word in common),
    )


def _cwe_words(rng: random.Random, *, single: bool) -> Iterator[str]:
    """Yield distinct words; the first ones, which are the answers, are not part of any other."""
    order = iter(
        rng.sample(filler_text.SINGLE, len(filler_text.SINGLE))
        if single
        else (filler_text.word(rng.randrange(filler_text.WORDS)) for _ in itertools.count())
    )
    taken: set[str] = set()
    common: list[str] = []
    for word in order:
        if word in taken or any(word in other or other in word for other in common):
            continue
        taken.add(word)
        common += [word] if len(common) < COMMON_WORDS else []
        yield word


def _numbered(rng: random.Random, words: list[str], often: int, seldom: int) -> str:
    entries = words[:COMMON_WORDS] * often + words[COMMON_WORDS:] * seldom
    rng.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))


def fwe_draft(material: PromptMaterial, task: RulerTask, length: int, rng: random.Random) -> PromptDraft:
    """fwe: find the three words that occur most often in a coded text."""
    # RULER's vocabulary is a 50th of the tokens; words beyond the square root of the length are never drawn.
    size = max(5, min((length - task.answer_tokens) // 50, math.isqrt(length)))
    words = ["...", *distinct(lambda: filler_text.letters(rng, CODED_LETTERS), size - 1)]
    tokens = material.encoder.counts([" " + word for word in words])
    seed = rng.random()

    def frequencies(n: int) -> list[int]:
        return [int(n * k**-ALPHA / ZETA) for k in range(1, size + 1)]

    def render(n: int) -> str:
        text = [word for word, times in zip(words, frequencies(n), strict=True) for _ in range(times)]
        random.Random(seed).shuffle(text)
        return material.wording.fwe.format(context=" ".join(text))

    return PromptDraft(
        render=render,
        estimate=lambda n: sum(size * times for size, times in zip(tokens, frequencies(n), strict=True)),
        prefix=material.wording.fwe_prefix,
        outputs=words[1:4],
        min_units=80,
        is_valid=lambda text: text.count(words[3]) > text.count(words[4]),
    )
