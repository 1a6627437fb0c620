"""The RoPE scaling of Llama-3.1 (rope.type=llama3): the same maths as YaRN's ramp over rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ultralong.rope import plain, yarn
from megatron_ultralong.rope.settings import Rope

if TYPE_CHECKING:
    from torch import Tensor


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, float32 [D/2]."""
    return yarn.ramp_over_rotations(rope, plain.frequencies(rope, head_dim))


def describe(rope: Rope) -> str:
    return (
        f"llama3, theta {rope.theta:,.10g}, factor {rope.factor:g} over {rope.original_length:,} positions, "
        f"alpha {rope.alpha:g}, beta {rope.beta:g}"
    )
