"""Position Interpolation (rope.type=linear; arXiv 2306.15595): every frequency divided by the factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.rope.base import Rope, ScaledRope, unscaled
from megatron_ultralong.rope.hf_block import HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Linear(ScaledRope):
    """Frequency i is theta^(-2i/D) / s."""

    type: Literal["linear"] = "linear"

    hf_type = "linear"
    hf_keys = ("factor",)

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return unscaled(self.base()[0], head_dim) / self.scale()

    def describe(self) -> str:
        theta, original = self.base()
        return f"linear, theta {theta:,.10g}, factor {self.scale():g} over {original:,} positions"

    def exact_max_position(self) -> int | None:
        return self.original()  # the block has no original length, and vLLM multiplies this one by the factor

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        block = {"rope_type": "linear", "factor": float(self.scale())}
        return {"rope_theta": float(self.base()[0]), "rope_scaling": block}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        return cls(theta=block.theta, factor=block.factor(), original_length=block.max_position())
