"""The RoPE methods by `rope.type`: frequencies, attention factor and a one-line description of any setting.

To add a method: its type and settings in settings.py, its maths in a file of its own, a line in `_METHODS`,
and its keys of config.json in hf_config.py.

Frequencies are bit-equal to those of transformers (the same float32 operations in the same order): at 4M
positions the last bit of a frequency is worth up to 0.17 rad.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope import llama3, plain, yarn
from megatron_ultralong.rope.settings import Rope

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = {"none": plain, "llama3": llama3, "yarn": yarn}


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Compute (frequencies in radians per position, float32 [D/2] on the CPU; attention factor, which cos and
    sin are multiplied by).

    Always computed on the CPU, so that all ranks and devices have the same bits. UserError for settings that
    have no meaning.
    """
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"model.head_dim={head_dim} must be even for RoPE")
    factor = yarn.attention_factor(rope) if rope.type == "yarn" else 1.0
    return _METHODS[rope.type].frequencies(rope, head_dim), factor


def same_maths(a: Rope, b: Rope, head_dim: int) -> bool:
    """Whether two settings rotate identically, to the last bit: for example `llama3`, and `yarn` over
    rotations without temperature."""
    import torch

    (frequencies_a, factor_a), (frequencies_b, factor_b) = (
        inverse_frequencies(rope, head_dim) for rope in (a, b)
    )
    return torch.equal(frequencies_a, frequencies_b) and factor_a == factor_b


def describe(rope: Rope) -> str:
    """One line for people: model cards and messages."""
    return _METHODS[rope.type].describe(rope)


def scaled_length(rope: Rope) -> int:
    """Positions that the scaling covers, factor x original_length; 0 for unscaled RoPE."""
    return 0 if rope.type == "none" else round(rope.factor * rope.original_length)
