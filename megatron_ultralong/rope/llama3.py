"""The RoPE scaling of Llama-3.1 (rope.type=llama3): YaRN's ramp over rotations, without temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.rope.base import Rope, unscaled
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock
from megatron_ultralong.rope.yarn import Ramp

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Llama3(Ramp):
    """The frequencies of `YaRN` with ramp=rotation."""

    type: Literal["llama3"] = "llama3"

    hf_type = "llama3"
    hf_keys = ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor")

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return self.ramp_over_rotations(unscaled(self.base()[0], head_dim))

    def describe(self) -> str:
        return f"llama3, {self._describe_ramp()}"

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        return {"rope_theta": float(self.base()[0]), "rope_scaling": self.llama3_block()}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        original = block.original_length()
        factor = block.factor()
        alpha, beta = block.ramp(("low_freq_factor", None), ("high_freq_factor", None))
        return cls(theta=block.theta, factor=factor, original_length=original, alpha=alpha, beta=beta)
