"""The evolutionary search for LongRoPE's factors (arXiv 2402.13753): the divisors of RoPE's frequencies with
the lowest perplexity on long rows, before any training.

Candidates are D/2 factors between 1 and 1.25 s that do not decrease towards the low frequencies, in steps
of 0.01. The first population is Position Interpolation, NTK-aware scaling, YaRN and mutations of them. Each
round keeps the best and adds mutations and crossovers of them. The paper does not publish how a factor
mutates: here it is multiplied by exp(x), x normally distributed with standard deviation 0.1, with probability
0.3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.jsonl import AppendFile
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.methods import NTK, Linear, Unscaled, YaRN

Factors = tuple[float, ...]
_STEP = 0.01
_DEVIATION, _PROBABILITY = 0.1, 0.3


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The size of the search. The defaults are the paper's."""

    theta: float
    """RoPE base of the model."""
    original_length: int
    """Its context length before scaling, tokens."""
    length: int
    """Tokens of a row, the length that is searched for."""
    head_dim: int
    population: int = 64
    rounds: int = 40
    mutations: int = 16
    """New candidates of a round by mutation."""
    crossovers: int = 16
    """New candidates of a round by crossover."""
    parents: int = 32
    """Candidates that a round keeps."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "rounds", "parents"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.mutations < 0 or self.crossovers < 0 or not self.mutations + self.crossovers:
            raise UserError("--mutations and --crossovers must be 0 or more, and not both 0")
        if self.parents > self.population:
            raise UserError(f"--parents={self.parents} is above --population={self.population}")
        if self.length <= self.original_length:
            raise UserError(
                f"--seq-length={self.length} must be above the model's {self.original_length} tokens: nothing to search"
            )

    @property
    def factor(self) -> float:
        """The scaling factor s."""
        return self.length / self.original_length

    def rope(self, factors: Factors) -> LongRoPE:
        """The RoPE of a candidate."""
        return LongRoPE(
            theta=self.theta, original_length=self.original_length, factor=self.factor, factors=factors
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Factors and the mean loss with them."""

    factors: Factors
    nll: float
    """Nats per token."""


def starting_points(settings: SearchSettings) -> dict[str, Factors]:
    """The factors of the methods that the search starts from."""
    common: dict[str, Any] = {"theta": settings.theta, "original_length": settings.original_length}
    plain = Unscaled(**common).inverse_frequencies(settings.head_dim)[0].double()
    methods: dict[str, Rope] = {
        kind.type: kind(**common, factor=settings.factor) for kind in (Linear, NTK, YaRN)
    }
    return {
        name: _valid((plain / rope.inverse_frequencies(settings.head_dim)[0].double()).tolist(), settings)
        for name, rope in methods.items()
    }


def search(
    settings: SearchSettings,
    measure: Callable[[Factors], float],
    progress: Callable[[int, Candidate], Any] = lambda number, best: None,
) -> Candidate:
    """Run the search and return the best candidate.

    measure: the mean loss of a candidate, nats per token; called once for each different one. progress:
    called with the round (0 = the first population) and the best candidate so far. The result depends on
    settings and losses alone.
    """
    generator = random.Random(settings.seed)
    losses: dict[Factors, float] = {}

    def measured(factors: Factors) -> Candidate:
        if factors not in losses:
            losses[factors] = measure(factors)
        return Candidate(factors=factors, nll=losses[factors])

    population = list(starting_points(settings).values())
    first = list(population)
    while len(population) < settings.population:
        population.append(_mutate(generator.choice(first), settings, generator))
    ranked = _ranked(map(measured, population))
    progress(0, ranked[0])
    for number in range(1, settings.rounds + 1):
        parents = ranked[: settings.parents]
        children = [
            _mutate(generator.choice(parents).factors, settings, generator) for _ in range(settings.mutations)
        ]
        for _ in range(settings.crossovers):
            one, other = (generator.choice(parents).factors for _ in range(2))
            mixed = [generator.choice(pair) for pair in zip(one, other, strict=True)]
            children.append(_valid(mixed, settings))
        ranked = _ranked([*parents, *map(measured, children)])
        progress(number, ranked[0])
    return ranked[0]


def _ranked(candidates: Iterator[Candidate] | Sequence[Candidate]) -> list[Candidate]:
    """Different candidates, the lowest loss first; a loss that is not a number comes last."""
    different = {candidate.factors: candidate for candidate in candidates}
    return sorted(different.values(), key=lambda c: (math.isnan(c.nll), c.nll))


def _mutate(factors: Factors, settings: SearchSettings, generator: random.Random) -> Factors:
    return _valid(
        [
            x * math.exp(generator.gauss(0.0, _DEVIATION)) if generator.random() < _PROBABILITY else x
            for x in factors
        ],
        settings,
    )


def _valid(values: Sequence[float], settings: SearchSettings) -> Factors:
    """The nearest allowed factors: within the bounds, in steps, none below the one before."""
    found: list[float] = []
    for value in values:
        bounded = min(max(value, 1.0), 1.25 * settings.factor)
        found.append(max([round(round(bounded / _STEP) * _STEP, 2), *found[-1:]]))
    return tuple(found)


class Losses:
    """Measured losses in a JSON-lines file, so that a stopped search measures nothing twice."""

    def __init__(self, path: Path, measured: dict[str, Any]) -> None:
        """path: the file, created or resumed. measured: all that a loss depends on besides the factors, such
        as model, rows and length. UserError where it is not that of the file."""
        header = {"measured": measured}
        self._kept: dict[Factors, float] = {}

        def replay(number: int, span: Any, line: dict[str, Any]) -> None:
            if number == 1 and line != header:
                raise UserError(
                    f"{path} has losses of another model, length or data; choose another --output"
                )
            if number > 1:
                self._kept[tuple(line["factors"])] = line["nll"]

        self._file = AppendFile(path, replay)
        if not self._file.size:
            self._file.append(header)

    def __len__(self) -> int:
        return len(self._kept)

    def measure(self, factors: Factors, compute: Callable[[Factors], float]) -> float:
        """The loss of a candidate, computed if it is not in the file."""
        if factors not in self._kept:
            self._kept[factors] = compute(factors)
            self._file.append({"factors": factors, "nll": self._kept[factors]})
        return self._kept[factors]

    def close(self) -> None:
        """Sync and close the file."""
        self._file.close()
