"""Sampling of one token from its logits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits."""

    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    """Sample among the most likely tokens with this total probability."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 = all."""
    seed: int = 0
    """Determines the random numbers together with the prompt: an answer does not depend on the other
    prompts."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 or more")

    def generator(self, prompt: Sequence[int]) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_of(prompt))

    def seed_of(self, prompt: Sequence[int]) -> int:
        """The seed of one prompt: 32 bits, since torch's CPU generator uses no more of a longer one."""
        return zlib.crc32(f"{self.seed}/".encode() + numpy.asarray(prompt, dtype=numpy.int64).tobytes())

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token from float32 logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = (logits / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            values = values[: self.top_k]
        probabilities = torch.softmax(values, dim=0)
        # The token that reaches top_p is still included.
        probabilities[probabilities.cumsum(0) - probabilities >= self.top_p] = 0
        sums = probabilities.double().cumsum(0)
        point = torch.rand(1, generator=generator, dtype=torch.float64).to(sums) * sums[-1]
        rank = min(int(torch.searchsorted(sums, point, right=True)), int(probabilities.count_nonzero()) - 1)
        return int(tokens[rank])
