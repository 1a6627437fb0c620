"""NTK-aware scaling: a larger base in place of a scaling rule, fixed (rope.type=ntk) or growing with the
sequence (rope.type=dynamic)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, ScaledRope, unscaled
from megatron_ultralong.rope.hf_block import HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NTK(ScaledRope):
    """Frequency i is theta'^(-2i/D) with theta' from the factor. Exported as rope_theta = theta', which every
    client reads alike."""

    type: Literal["ntk"] = "ntk"
    law: Literal["factor", "length"] = "factor"
    """factor = theta s^(D/(D-2)), which divides the lowest frequency by s; length = theta^(ln(T / 2 pi) /
    ln(L / 2 pi)) for the target length T = s x L, with which the frequency that turned once within L turns
    once within T (the rule behind Gradient's 1M and 4M models)."""

    def scaled_theta(self, head_dim: int) -> float:
        """theta', computed in float64. UserError for a head or a length too small for the rule, and a factor
        too large for it."""
        theta, original = self.base()
        if self.law == "length" and original <= 2 * math.pi:
            raise UserError(f"rope.original_length={original} must be above 6 for rope.law=length")
        try:
            if self.law == "length":
                target = self.scale() * original
                return float(theta ** (math.log(target / (2 * math.pi)) / math.log(original / (2 * math.pi))))
            return float(theta * self.scale() ** ntk_exponent(head_dim))
        except OverflowError:
            raise UserError(
                f"rope.factor={self.factor:g} is too large: theta would not be a number"
            ) from None

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return unscaled(self.scaled_theta(head_dim), head_dim)

    def describe(self) -> str:
        theta, original = self.base()
        rule = "" if self.law == "factor" else ", base by target length"
        return f"ntk, theta {theta:,.10g}, factor {self.scale():g} over {original:,} positions{rule}"

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        return {"rope_theta": self.scaled_theta(head_dim), "rope_scaling": None}


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(Rope):
    """Frequency i is theta'^(-2i/D) with theta' = theta ((s n / L) - (s - 1))^(D/(D-2)) for a sequence of n
    tokens, longer than the original length L; up to L, unscaled.

    In training n is train.seq_length for every document of a row. In generation n is the length of the
    request, prompt and new tokens together, from its first token on; transformers instead recomputes the
    frequencies while the sequence grows and keeps keys that were rotated with the earlier ones.
    """

    type: Literal["dynamic"] = "dynamic"
    factor: float = 1.0
    """s of the formula: how fast the base grows with the length; 1 divides the lowest frequency by n / L."""

    hf_type = "dynamic"
    hf_keys = ("factor",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is None or not 1 <= self.factor < math.inf:  # JSON may say null
            raise UserError(f"rope.factor={self.factor} must be at least 1")

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        import torch

        theta, original = self.base()
        n = torch.tensor(max(length, original), device="cpu")
        # float32, as transformers computes it for a running sequence.
        growth = self.factor * n / original - (self.factor - 1)
        return unscaled(theta * growth ** ntk_exponent(head_dim), head_dim)

    def depends_on_length(self) -> bool:
        return True

    def covered_length(self) -> int | None:
        return None

    def describe(self) -> str:
        theta, original = self.base()
        return f"dynamic NTK, theta {theta:,.10g}, factor {self.factor:g} over {original:,} positions"

    def exact_max_position(self) -> int | None:
        return self.original()  # clients take it as the original length

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        block = {"rope_type": "dynamic", "factor": float(self.factor)}
        return {"rope_theta": float(self.base()[0]), "rope_scaling": block}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        return cls(theta=block.theta, factor=block.factor(), original_length=block.max_position())


def ntk_exponent(head_dim: int) -> float:
    """D / (D - 2). UserError for a head dimension of 2."""
    if head_dim <= 2:
        raise UserError(f"model.head_dim={head_dim} must be above 2 for NTK-aware scaling")
    return head_dim / (head_dim - 2)
