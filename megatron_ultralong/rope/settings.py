"""The settings of rotary position embedding, one dataclass for all methods: what a recipe and run.json
say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding. `rope/methods.py` lists the methods and their files."""

    type: Literal["none", "llama3", "yarn"] = "none"
    """none = unscaled RoPE; llama3 = the scaling of Llama-3.1; yarn = YaRN, with the ramp given by `ramp`."""
    theta: float = 500000.0
    """RoPE base."""
    factor: float = 1.0
    """Scaling factor s relative to `original_length`; it replaces the base model's own factor."""
    original_length: int = 8192
    """Context length before any scaling, tokens."""
    alpha: float = 1.0
    """Frequencies that turn at most this often within `original_length` are divided by s (llama3:
    low_freq_factor, yarn: beta_slow)."""
    beta: float = 4.0
    """Frequencies that turn at least this often within `original_length` are unchanged (llama3:
    high_freq_factor, yarn: beta_fast)."""
    ramp: Literal["rotation", "dimension"] = "rotation"
    """yarn only: the ramp between alpha and beta is linear in the number of rotations (YaRN paper eq. 17-20)
    or in the dimension index (transformers' yarn)."""
    temperature: bool = False
    """yarn only: multiply cos and sin by the attention factor (default 0.1 ln s + 1)."""
    attention_factor: float | None = None
    """yarn with temperature only: the attention factor; None = the default."""
    truncate: bool = True
    """yarn with ramp=dimension only: round the ends of the ramp to integer dimensions (transformers'
    default)."""

    def __post_init__(self) -> None:
        if self.theta <= 0 or not math.isfinite(self.theta):
            raise UserError(f"rope.theta={self.theta} must be a positive number")
        if self.type == "none":
            if self.factor != 1.0:
                raise UserError(
                    f"rope.factor={self.factor} has no effect with rope.type=none; set rope.type=yarn or llama3"
                )
            return
        if self.factor < 1 or not math.isfinite(self.factor):
            raise UserError(f"rope.factor={self.factor} must be at least 1")
        if self.original_length < 1:
            raise UserError(f"rope.original_length={self.original_length} must be at least 1")
        if not 0 < self.alpha < self.beta:
            raise UserError(f"rope.alpha={self.alpha} must be positive and below rope.beta={self.beta}")
        if self.attention_factor is not None and not self.temperature:
            raise UserError("rope.attention_factor requires rope.temperature=true")
        if self.type == "llama3" and (self.temperature or self.ramp != "rotation"):
            raise UserError("rope.temperature and rope.ramp=dimension require rope.type=yarn")
