"""RoPE without scaling (rope.type=none; RoFormer, arXiv 2104.09864): frequency i is theta^(-2i/D)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ultralong.rope.settings import Rope

if TYPE_CHECKING:
    from torch import Tensor


def periods(theta: float, head_dim: int) -> Tensor:
    """theta^(2i/D), the inverse of each frequency: float32 [D/2] on the CPU."""
    import torch

    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, float32 [D/2]."""
    return 1.0 / periods(rope.theta, head_dim)


def describe(rope: Rope) -> str:
    return f"unscaled, theta {rope.theta:,.10g}"
