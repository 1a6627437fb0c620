"""Settings of the preparation of instruction data."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_ultralong.data.sft.chat_template import DATE
from megatron_ultralong.data.special_tokens import SpecialTokenMode
from megatron_ultralong.errors import UserError

MAX_TOKENS = 8192
"""Longest example, as in the paper (arXiv 2504.06214): all have fewer than 8K tokens."""


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Which examples are taken and how they are packed into rows. UserError for values that contradict each
    other."""

    seq_length: int = 8192
    """S; must be divisible by 2 x cp. A row has one more token, the target of the last one."""
    cp: int = 1
    """Context parallel size of the training."""
    max_tokens: int | None = None
    """Tokens of the longest example; None = 8192, or S + 1 if that is less."""
    long: Literal["drop", "cut"] = "drop"
    """Longer examples: dropped, or cut after the last answer that fits."""
    examples: int | None = None
    """Examples in total; None = all that are available."""
    mix: dict[str, Fraction] | None = None
    """Share of each domain; None = as available."""
    fit: Literal["best", "single"] = "best"
    """Several conversations per row, by best fit; or one per row, the rest padded."""
    template: str = "auto"
    date: str = DATE
    special_tokens: SpecialTokenMode = "text"
    """What special tokens spelled out in contents become."""
    seed: int = 0
    workers: int = 1
    """Processes that encode; the output does not depend on it."""

    def __post_init__(self) -> None:
        for name, value in (
            ("--seq-length", self.seq_length),
            ("--cp", self.cp),
            ("--max-tokens", self.longest),
            ("--workers", self.workers),
            ("--examples", self.examples),
        ):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        multiple = 2 * self.cp
        if self.seq_length % multiple:
            below = self.seq_length // multiple * multiple
            raise UserError(
                f"--seq-length {self.seq_length}: must be divisible by 2 x CP = {multiple}; use {below or multiple}"
            )
        if self.longest > self.seq_length + 1:
            raise UserError(
                f"--max-tokens {self.longest}: a row has {self.seq_length} + 1 tokens; use fewer, or a longer --seq-length"
            )
        if self.mix is not None and self.examples is None:
            raise UserError("--mix requires --examples, the total number of examples")

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return min(MAX_TOKENS, self.seq_length + 1) if self.max_tokens is None else self.max_tokens
