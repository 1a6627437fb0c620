"""RoPE without a scaling rule: the loaded model's base (rope.type=none), or a stated one (rope.type=theta,
"adjusted base frequency", arXiv 2309.16039)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, unscaled
from megatron_ultralong.rope.hf_block import HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Unscaled(Rope):
    """Frequency i is theta^(-2i/D)."""

    type: Literal["none"] = "none"

    hf_type = "default"

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return unscaled(self.base()[0], head_dim)

    def describe(self) -> str:
        return f"unscaled, theta {self.base()[0]:,.10g}"

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        return {"rope_theta": float(self.base()[0]), "rope_scaling": None}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        return cls(theta=block.theta, original_length=block.max_position())


@dataclass(frozen=True, kw_only=True)
class ChangedBase(Rope):
    """Frequency i is theta^(-2i/D) with a theta chosen for the new length. It is exported as rope_theta."""

    type: Literal["theta"] = "theta"
    theta: float | None = None
    """The new RoPE base; it must be set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is None:
            raise UserError("rope.type=theta requires rope.theta, the new base")

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return unscaled(self.base()[0], head_dim)

    def covered_length(self) -> int | None:
        return None  # the base is whatever was chosen for the new length

    def describe(self) -> str:
        return f"unscaled, changed theta {self.base()[0]:,.10g}"

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        return {"rope_theta": float(self.base()[0]), "rope_scaling": None}
