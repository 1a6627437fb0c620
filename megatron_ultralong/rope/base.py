"""Rotary position embedding (RoFormer, arXiv 2104.09864): what every method has in common.

A method is one frozen dataclass with its settings, its frequencies, its keys of config.json and its checks;
`methods.py` lists them. Frequencies are radians per position, float32 [D/2] for head dimension D, computed on
the CPU so that all ranks and devices have the same bits, with the float32 operations of transformers in the
same order: at 4M positions the last bit of a frequency is worth up to 0.17 rad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ultralong.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.rope.hf_block import HFBlock


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Settings that all methods share. The defaults are those of Llama-3.1."""

    type: str = ""
    """Name of the method, which selects the class."""
    theta: float | None = 500000.0
    """RoPE base; None = that of the loaded model."""
    original_length: int | None = 8192
    """Context length before any scaling, tokens; None = that of the loaded model."""
    allow_short: bool = field(default=False, compare=False)
    """Train on sequences longer than the RoPE covers (`covered_length`), which is refused otherwise."""

    draws_positions: ClassVar[bool] = False
    """Training draws the positions of a row's tokens."""
    reaches_further: ClassVar[bool] = True
    """Frequencies exist beyond `covered_length`, so that `allow_short` is possible."""
    hf_type: ClassVar[str] = ""
    """`rope_type` of config.json; empty where the method has none."""
    hf_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of its block in config.json, in addition to rope_type and rope_theta."""

    def __post_init__(self) -> None:
        if self.theta is not None and not 1 < self.theta < math.inf:
            raise UserError(f"rope.theta={self.theta} must be above 1")
        if self.original_length is not None and self.original_length < 1:
            raise UserError(f"rope.original_length={self.original_length} must be at least 1")

    # ---- maths ---------------------------------------------------------------------------------

    def inverse_frequencies(self, head_dim: int, length: int | None = None) -> tuple[Tensor, float]:
        """Compute (frequencies, float32 [D/2] on the CPU; attention factor, which cos and sin are multiplied
        by).

        length: tokens of the sequence, for methods that depend on it; None = the original length. UserError
        for settings that do not fit `head_dim`.
        """
        if head_dim < 2 or head_dim % 2:
            raise UserError(f"model.head_dim={head_dim} must be even for RoPE")
        return self.frequencies(head_dim, self.original() if length is None else length), self.multiplier()

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        """Radians per position, float32 [D/2], in a sequence of `length` tokens."""
        raise NotImplementedError

    def multiplier(self) -> float:
        """The attention factor."""
        return 1.0

    def depends_on_length(self) -> bool:
        """Whether sequences of different lengths have different frequencies."""
        return False

    def covered_length(self) -> int | None:
        """Positions that the settings are made for, tokens; None = any number."""
        return self.original()

    def readable_length(self, trained_length: int) -> int:
        """Tokens that a model can read whose longest sequence in training had `trained_length` tokens."""
        return trained_length

    def original(self) -> int:
        """The original length. UserError where it is that of a model which is not known yet."""
        if self.original_length is None:
            raise UserError(
                "rope.original_length is not set, and no model is loaded that states it; set rope.original_length"
            )
        return self.original_length

    def base(self) -> tuple[float, int]:
        """(theta, original length). UserError where one is that of a model which is not known yet."""
        if self.theta is None:
            raise UserError("rope.theta is not set, and no model is loaded that states it; set rope.theta")
        return self.theta, self.original()

    def for_length(self, loaded: Rope | None, length: int) -> Rope:
        """Fill in what the settings leave to the loaded model's RoPE, for sequences of `length` tokens.
        UserError where something is left open."""
        filled = self
        if loaded is not None:
            filled = replace(
                self,
                theta=loaded.theta if self.theta is None else self.theta,
                original_length=loaded.original_length
                if self.original_length is None
                else self.original_length,
            )
        filled.base()
        return filled

    def describe(self) -> str:
        """One line for people: model cards and messages."""
        raise NotImplementedError

    # ---- config.json ---------------------------------------------------------------------------

    def exact_max_position(self) -> int | None:
        """The only max_position_embeddings with which clients compute these frequencies; None = any."""
        return None

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        """Return rope_theta, rope_scaling and further top-level keys of config.json. UserError where they
        cannot express the settings."""
        raise NotImplementedError

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        """Read the settings from a block of config.json whose rope_type is `hf_type`. UserError for values
        without meaning."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScaledRope(Rope):
    """A method with a scaling factor relative to the original length."""

    factor: float | None = None
    """Scaling factor s relative to `original_length`; it replaces the loaded model's own factor. None =
    train.seq_length / original_length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and not 1 <= self.factor < math.inf:
            raise UserError(f"rope.factor={self.factor} must be at least 1")

    def scale(self) -> float:
        """The factor. UserError where it is left to the sequence length."""
        if self.factor is None:
            raise UserError(f"rope.factor is not set for rope.type={self.type}")
        return self.factor

    def covered_length(self) -> int | None:
        return round(self.scale() * self.original())

    def possible_factor(self, factor: float) -> float:
        """The smallest factor of this method that is not below `factor`."""
        return factor

    def for_length(self, loaded: Rope | None, length: int) -> Rope:
        filled = super().for_length(loaded, length)
        assert isinstance(filled, ScaledRope)
        if filled.factor is not None:
            return filled
        original = filled.original()
        if length < original:
            raise UserError(
                f"train.seq_length={length} is below rope.original_length={original}: rope.type={self.type} has "
                "nothing to extend; set rope.factor, or rope.type=none"
            )
        return replace(filled, factor=filled.possible_factor(length / original))


# ---- frequencies without scaling ----------------------------------------------------------------


def powers(theta: float | Tensor, head_dim: int) -> Tensor:
    """theta^(2i/D), the inverse of each unscaled frequency: float32 [D/2] on the CPU."""
    import torch

    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def unscaled(theta: float | Tensor, head_dim: int) -> Tensor:
    """theta^(-2i/D), float32 [D/2] on the CPU."""
    return 1.0 / powers(theta, head_dim)
