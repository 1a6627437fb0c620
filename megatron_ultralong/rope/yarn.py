"""YaRN (arXiv 2309.00071): both ramps and the attention factor.

With f the unscaled frequency of index i, L = original_length and s = factor, the scaled frequency is
f' = (1 - g) f / s + g f, where g rises from 0 to 1:

- ramp=rotation (eq. 17-20): g = clip((r - alpha) / (beta - alpha), 0, 1), with r = L f / 2 pi rotations
  within L.
- ramp=dimension: linear in i between the indices that turn beta and alpha times within L, as transformers'
  `rope_type: yarn` computes it.
- temperature: cos and sin are multiplied by the attention factor, by default 0.1 ln s + 1 (eq. 22).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope import plain
from megatron_ultralong.rope.settings import Rope

if TYPE_CHECKING:
    from torch import Tensor


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, float32 [D/2]. UserError for theta <= 1 with ramp=dimension."""
    if rope.ramp == "dimension":
        return ramp_over_dimensions(rope, plain.periods(rope.theta, head_dim), head_dim)
    return ramp_over_rotations(rope, plain.frequencies(rope, head_dim))


def ramp_over_rotations(rope: Rope, frequencies: Tensor) -> Tensor:
    """Scale unscaled frequencies, float32 [D/2], along the ramp in rotations."""
    import torch

    wavelengths = 2 * math.pi / frequencies  # positions
    kept = (rope.original_length / wavelengths - rope.alpha) / (rope.beta - rope.alpha)
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    scaled = torch.where(wavelengths > rope.original_length / rope.alpha, frequencies / rope.factor, between)
    return torch.where(wavelengths < rope.original_length / rope.beta, frequencies, scaled)


def ramp_over_dimensions(rope: Rope, periods: Tensor, head_dim: int) -> Tensor:
    """Scale the frequencies 1 / `periods`, float32 [D/2], along the ramp in the dimension index."""
    import torch

    if rope.theta <= 1:
        raise UserError(f"rope.theta={rope.theta} must be above 1 for rope.ramp=dimension")

    def index(rotations: float) -> float:
        """The real-valued index i whose frequency turns `rotations` times within the original length."""
        turns_once = rope.original_length / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns_once)) / (2 * math.log(rope.theta))

    first, last = index(rope.beta), index(rope.alpha)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is twice the largest index, as in transformers.
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001  # avoid division by zero
    indices = torch.arange(len(periods), dtype=torch.float32, device="cpu")
    kept = 1 - torch.clamp((indices - first) / width, 0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def attention_factor(rope: Rope) -> float:
    """The multiplier of cos and sin; 1 without temperature. UserError for a factor that is not positive."""
    if not rope.temperature:
        return 1.0
    if rope.attention_factor is None:
        return mscale(rope.factor)
    if not 0 < rope.attention_factor < math.inf:
        raise UserError(f"rope.attention_factor={rope.attention_factor} must be a positive number")
    return rope.attention_factor


def mscale(factor: float, weight: float = 1.0) -> float:
    """The default attention factor of a scaling factor: 0.1 x weight x ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def describe(rope: Rope) -> str:
    return (
        f"yarn, theta {rope.theta:,.10g}, factor {rope.factor:g} over {rope.original_length:,} positions, "
        f"alpha {rope.alpha:g}, beta {rope.beta:g}, ramp over {rope.ramp}s, "
        f"{'with' if rope.temperature else 'without'} attention temperature"
    )
