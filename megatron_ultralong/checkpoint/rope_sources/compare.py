"""Frequencies of several sources, and which of them agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from megatron_ultralong.checkpoint.rope_sources.source import RopeSource
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.plain import Unscaled

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-6
"""Relative difference up to which frequencies and attention factors agree: some programs compute the same
formula in another order."""


@dataclass(frozen=True)
class Computed:
    """What a source's RoPE amounts to."""

    source: RopeSource
    head_dim: int
    length: int
    """Tokens of the sequence that the frequencies are for."""
    frequencies: Tensor
    """Radians per position, float32 [D/2]."""
    ratios: tuple[float, ...]
    """Unscaled / actual frequency by index, with the source's own theta; rounded to 4 digits."""
    attention_factor: float

    def ramp(self) -> list[int]:
        """Indices whose ratio is neither 1 nor that of the last index."""
        return [i for i, ratio in enumerate(self.ratios) if ratio not in (1.0, self.ratios[-1])]


@dataclass(frozen=True)
class Difference:
    """How a group of sources differs from the first group with the same head dimension."""

    first: int
    other: int
    """Positions of one source of each group."""
    index: int | None
    """First index whose frequencies differ; None = only the attention factors do."""


@dataclass(frozen=True)
class Agreement:
    """Which sources of one head dimension agree. Sources are given by position; every group is sorted."""

    head_dim: int
    identical: list[list[int]]
    """Groups that agree bit for bit."""
    close: list[list[int]]
    """Groups that agree to TOLERANCE."""
    differences: list[Difference]


def compute(source: RopeSource, head_dim: int | None, length: int | None) -> Computed:
    """Compute a source's frequencies.

    head_dim: used where the source does not state one. length: tokens; None = its original length. UserError,
    naming the source, where the head dimension is missing or does not fit the RoPE.
    """
    own = source.head_dim or head_dim
    if own is None:
        raise UserError(f"{source.name}: the head dimension is not stated; set it with --head-dim")
    try:
        frequencies, attention_factor = source.rope.inverse_frequencies(own, length)
        plain = Unscaled(theta=source.rope.theta).inverse_frequencies(own)[0]
        original = source.rope.original()
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    return Computed(
        source=source,
        head_dim=own,
        length=original if length is None else length,
        frequencies=frequencies,
        ratios=tuple(round(x, 4) for x in (plain.double() / frequencies.double()).tolist()),
        attention_factor=attention_factor,
    )


def compare(computed: Sequence[Computed]) -> list[Agreement]:
    """Compare the sources of each head dimension."""
    by_head_dim = sorted(range(len(computed)), key=lambda i: computed[i].head_dim)
    return [
        _agreement(computed, head_dim, list(members))
        for head_dim, members in groupby(by_head_dim, key=lambda i: computed[i].head_dim)
    ]


def _agreement(computed: Sequence[Computed], head_dim: int, members: list[int]) -> Agreement:
    close = _groups(members, lambda a, b: _agree(computed[a], computed[b], TOLERANCE))
    return Agreement(
        head_dim=head_dim,
        identical=_groups(members, lambda a, b: _agree(computed[a], computed[b], 0.0)),
        close=close,
        differences=[
            Difference(
                close[0][0],
                group[0],
                first_difference(computed[close[0][0]], computed[group[0]], TOLERANCE),
            )
            for group in close[1:]
        ],
    )


def _groups(members: list[int], agree: Callable[[int, int], bool]) -> list[list[int]]:
    """Put each member into the first group whose first member it agrees with."""
    groups: list[list[int]] = []
    for member in members:
        group = next((group for group in groups if agree(group[0], member)), None)
        if group is None:
            groups.append([member])
        else:
            group.append(member)
    return groups


def _agree(a: Computed, b: Computed, tolerance: float) -> bool:
    factors = (a.attention_factor, b.attention_factor)
    return first_difference(a, b, tolerance) is None and (
        abs(factors[0] - factors[1]) <= tolerance * max(factors)
    )


def first_difference(a: Computed, b: Computed, tolerance: float) -> int | None:
    """First index whose frequencies differ by more than `tolerance`, relative to the larger one; None where
    none does. Both have the same head dimension."""
    x, y = a.frequencies.double(), b.frequencies.double()
    differs = ((x - y).abs() > tolerance * x.maximum(y)).nonzero()
    return int(differs[0]) if len(differs) else None
