"""What all RULER prompts of a run are made from: encoder, wording, filler, questions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

from megatron_ultralong.evaluate.prompts.encode import PromptEncoder
from megatron_ultralong.evaluate.tasks.ruler import filler_text
from megatron_ultralong.evaluate.tasks.ruler.fill_length import FillerText
from megatron_ultralong.evaluate.tasks.ruler.qa_files import QAData
from megatron_ultralong.evaluate.tasks.ruler.wording import RulerWording


class PromptMaterial:
    """What all prompts of a run are made from."""

    def __init__(
        self,
        encoder: PromptEncoder,
        wording: RulerWording,
        *,
        seed: int = 0,
        haystack: list[str] | None = None,
        qa_data: dict[str, QAData] | None = None,
    ) -> None:
        """haystack: sentences of the essay, repeated where they do not suffice; None = this project's
        sentences. qa_data: of `squad` and `hotpotqa`."""
        self.encoder, self.wording, self.seed, self.qa_data = encoder, wording, seed, qa_data or {}
        rng = random.Random(f"{seed}/essay")
        own = (filler_text.sentence(rng) for _ in itertools.count())
        self.essay = FillerText(encoder.counts, itertools.cycle(haystack) if haystack else own)
        self.noise = FillerText(encoder.counts, itertools.repeat(wording.noise), before="\n")
        self.document_tokens: dict[str, dict[int, int]] = {}
        """Tokens of the documents of each data set that were needed so far."""

    def number_tokens(self, n: int) -> float:
        """Approximate number of tokens of ` 1.`, ` 2.` ... ` n.` together."""
        return sum(
            max(0, min(n, 10**d - 1) - 10 ** (d - 1) + 1) * tokens
            for d, tokens in enumerate(self._tokens_by_digits, 1)
        )

    @cached_property
    def _tokens_by_digits(self) -> list[float]:
        """Tokens of ` 1.`, ` 10.` ... by number of digits, from 1 on: the mean of a sample."""
        groups = [[f" {10**d + i * 9 * 10**d // 16}." for i in range(16 if d else 9)] for d in range(8)]
        return [sum(self.encoder.counts(group)) / len(group) for group in groups]


def distinct(make: Callable[[], Any], count: int) -> list[Any]:
    """Call `make` until it returned `count` distinct values; they are in the order of their first
    appearance."""
    values: dict[Any, None] = {}
    while len(values) < count:
        values[make()] = None
    return list(values)
