"""Position Interpolation (rope.type=linear; arXiv 2306.15595): every frequency divided by the factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.rope.base import Rope, ScaledRope, unscaled
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Linear(ScaledRope):
    """Frequency i is theta^(-2i/D) / s."""

    type: Literal["linear"] = "linear"

    hf_type = "linear"
    hf_keys = ("factor", ORIGINAL)

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return unscaled(self.base()[0], head_dim) / self.scale()

    def describe(self) -> str:
        theta, original = self.base()
        return f"linear, theta {theta:,.10g}, factor {self.scale():g} over {original:,} positions"

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        theta, original = self.base()
        block = {"rope_type": "linear", "factor": float(self.scale())}
        # No client reads the original length here; it keeps the factor's meaning for a later extension.
        return {"rope_theta": float(theta), "rope_scaling": block, ORIGINAL: original}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        # Most published configs have max_position_embeddings at its value before scaling.
        return cls(theta=block.theta, factor=block.factor(), original_length=block.original_length())
