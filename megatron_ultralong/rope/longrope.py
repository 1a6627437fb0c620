"""LongRoPE (rope.type=longrope; arXiv 2402.13753): a factor for every frequency, found by a search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, ScaledRope, powers
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LongRoPE(ScaledRope):
    """Frequency i is theta^(-2i/D) / factors[i]."""

    type: Literal["longrope"] = "longrope"
    factors: tuple[float, ...] = ()
    """D/2 divisors, one a frequency, highest frequency first. On the command line: a JSON file with a list,
    or numbers with commas between them."""
    short_factors: tuple[float, ...] = ()
    """Those for sequences of at most `original_length` tokens; empty = `factors` for every length."""
    attention_factor: float | None = None
    """What cos and sin are multiplied by; None = sqrt(1 + ln s / ln original_length)."""

    hf_type = "longrope"
    hf_keys = (
        "factor",
        ORIGINAL,
        "short_factor",
        "long_factor",
        "attention_factor",
        "short_mscale",
        "long_mscale",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors:
            raise UserError("rope.type=longrope requires rope.factors, one per pair of head dimensions")
        for name in ("factors", "short_factors"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise UserError(f"rope.{name}: {value} must be a positive number")
        if self.short_factors and len(self.short_factors) != len(self.factors):
            raise UserError(
                f"rope.short_factors has {len(self.short_factors)} numbers, but rope.factors {len(self.factors)}"
            )
        if self.original_length == 1:
            raise UserError("rope.original_length=1 must be at least 2 for rope.type=longrope")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise UserError(f"rope.attention_factor={self.attention_factor} must be a positive number")

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        import torch

        theta, original = self.base()
        factors = self.factors if length > original or not self.short_factors else self.short_factors
        if 2 * len(factors) != head_dim:
            raise UserError(
                f"rope.factors has {len(factors)} numbers, but model.head_dim={head_dim} needs {head_dim // 2}"
            )
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers(theta, head_dim))

    def multiplier(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return default_attention_factor(self.scale(), self.original())

    def depends_on_length(self) -> bool:
        return self.short_factors not in ((), self.factors)

    def describe(self) -> str:
        theta, original = self.base()
        return (
            f"longrope, theta {theta:,.10g}, factor {self.scale():g} over {original:,} positions, "
            f"{len(self.factors)} factors from {min(self.factors):g} to {max(self.factors):g}, "
            f"attention factor {self.multiplier():g}"
        )

    # ---- config.json ---------------------------------------------------------------------------

    def exact_max_position(self) -> int | None:
        # transformers 4 takes max_position_embeddings / original length as the factor.
        return self.covered_length()

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        theta, original = self.base()
        multiplier = float(self.multiplier())
        block = {
            "rope_type": "longrope",
            "factor": float(self.scale()),
            ORIGINAL: original,
            # Both, so that clients that choose by length use the trained ones for short prompts too.
            "short_factor": list(self.short_factors or self.factors),
            "long_factor": list(self.factors),
            "attention_factor": multiplier,
            # vLLM ignores attention_factor.
            "short_mscale": multiplier,
            "long_mscale": multiplier,
        }
        # transformers 4 looks for the original length at the top level only.
        return {"rope_theta": float(theta), "rope_scaling": block, ORIGINAL: original}

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        original = block.original_length()
        factor = block.factor_or_ratio(original, optional=True)
        factors, short = block.numbers("long_factor"), block.numbers("short_factor")
        multiplier = block.number("attention_factor") if block.has("attention_factor") else None
        for key in ("short_mscale", "long_mscale"):
            used = multiplier if multiplier is not None else default_attention_factor(factor, original)
            if block.has(key) and block.number(key) != used:
                raise UserError(
                    f"{block.where}: {key}={block.number(key):g} differs from the attention factor {used:g}: "
                    "vLLM and transformers would compute different models"
                )
        return cls(
            theta=block.theta,
            factor=factor,
            original_length=original,
            factors=factors,
            short_factors=() if short == factors else short,
            attention_factor=multiplier,
        )


def default_attention_factor(factor: float, original_length: int) -> float:
    """sqrt(1 + ln s / ln L), 1 for s = 1."""
    if original_length < 2:
        raise UserError(f"the original length {original_length} must be at least 2 for longrope")
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
