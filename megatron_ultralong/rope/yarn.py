"""YaRN (rope.type=yarn; arXiv 2309.00071): both ramps and the attention factor.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, ScaledRope, powers, unscaled
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ramp(ScaledRope):
    """Scaling of the low frequencies only, with a ramp between them and the unchanged high ones."""

    alpha: float = 1.0
    """Frequencies that turn at most this often within `original_length` are divided by s (llama3:
    low_freq_factor, yarn: beta_slow)."""
    beta: float = 4.0
    """Frequencies that turn at least this often within `original_length` are unchanged (llama3:
    high_freq_factor, yarn: beta_fast)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < self.beta:
            raise UserError(f"rope.alpha={self.alpha} must be positive and below rope.beta={self.beta}")

    def ramp_over_rotations(self, frequencies: Tensor) -> Tensor:
        """Scale unscaled frequencies, float32 [D/2], along the ramp in rotations."""
        import torch

        original, scale = self.original(), self.scale()
        wavelengths = 2 * math.pi / frequencies  # positions
        kept = (original / wavelengths - self.alpha) / (self.beta - self.alpha)
        between = (1 - kept) * frequencies / scale + kept * frequencies
        scaled = torch.where(wavelengths > original / self.alpha, frequencies / scale, between)
        return torch.where(wavelengths < original / self.beta, frequencies, scaled)

    def llama3_block(self) -> dict[str, Any]:
        """The ramp over rotations as config.json's rope_scaling."""
        return {
            "rope_type": "llama3",
            "factor": float(self.scale()),
            ORIGINAL: self.original(),
            "low_freq_factor": float(self.alpha),
            "high_freq_factor": float(self.beta),
        }

    def _describe_ramp(self) -> str:
        theta, original = self.base()
        return (
            f"theta {theta:,.10g}, factor {self.scale():g} over {original:,} positions, "
            f"alpha {self.alpha:g}, beta {self.beta:g}"
        )


@dataclass(frozen=True, kw_only=True)
class YaRN(Ramp):
    """The default is the method of the UltraLong paper: ramp over rotations, no temperature."""

    type: Literal["yarn"] = "yarn"
    ramp: Literal["rotation", "dimension"] = "rotation"
    """Whether the ramp between alpha and beta is linear in the number of rotations (YaRN paper eq. 17-20) or
    in the dimension index (transformers' yarn)."""
    temperature: bool = False
    """Multiply cos and sin by the attention factor."""
    attention_factor: float | None = None
    """With temperature: the attention factor; None = 0.1 ln s + 1."""
    truncate: bool = True
    """With ramp=dimension: round the ends of the ramp to integer dimensions (transformers' default)."""

    hf_type = "yarn"
    hf_keys = (
        "factor",
        ORIGINAL,
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is not None:
            if not self.temperature:
                raise UserError("rope.attention_factor requires rope.temperature=true")
            if not 0 < self.attention_factor < math.inf:
                raise UserError(f"rope.attention_factor={self.attention_factor} must be a positive number")

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        theta = self.base()[0]
        if self.ramp == "dimension":
            return self._ramp_over_dimensions(powers(theta, head_dim), head_dim)
        return self.ramp_over_rotations(unscaled(theta, head_dim))

    def _ramp_over_dimensions(self, periods: Tensor, head_dim: int) -> Tensor:
        """Scale the frequencies 1 / `periods`, float32 [D/2], along the ramp in the dimension index."""
        import torch

        theta, original = self.base()

        def index(rotations: float) -> float:
            """The real-valued index i whose frequency turns `rotations` times within the original length."""
            return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

        first, last = index(self.beta), index(self.alpha)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper bound is twice the largest index, as in transformers.
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first if last != first else 0.001  # avoid division by zero
        indices = torch.arange(len(periods), dtype=torch.float32, device="cpu")
        kept = 1 - torch.clamp((indices - first) / width, 0, 1)
        return 1.0 / (self.scale() * periods) * (1 - kept) + 1.0 / periods * kept

    def multiplier(self) -> float:
        if not self.temperature:
            return 1.0
        return mscale(self.scale()) if self.attention_factor is None else self.attention_factor

    def describe(self) -> str:
        temperature = "with" if self.temperature else "without"
        return f"yarn, {self._describe_ramp()}, ramp over {self.ramp}s, {temperature} attention temperature"

    # ---- config.json ---------------------------------------------------------------------------

    def exact_max_position(self) -> int | None:
        # transformers 4.51 to 4.55 take max_position_embeddings / original length as the factor.
        return self.covered_length() if self.ramp == "dimension" else None

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        return {"rope_theta": float(self.base()[0]), "rope_scaling": self._block()}

    def _block(self) -> dict[str, Any]:
        if self.ramp == "rotation":
            if self.multiplier() != 1.0:
                raise UserError(
                    "Hugging Face's config.json cannot express YaRN over rotations with attention temperature; "
                    "train with rope.temperature=false or rope.ramp=dimension to export"
                )
            return self.llama3_block()
        block: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": float(self.scale()),
            ORIGINAL: self.original(),
            "beta_fast": float(self.beta),
            "beta_slow": float(self.alpha),
        }
        if self.multiplier() != mscale(self.scale()):
            block["attention_factor"] = float(self.multiplier())
        if not self.truncate:
            block["truncate"] = False
        return block

    @classmethod
    def from_hf(cls, block: HFBlock) -> Rope:
        original = block.original_length()
        factor = block.factor_or_ratio(original)
        alpha, beta = block.ramp(("beta_slow", 1.0), ("beta_fast", 32.0))
        truncate = block.flag("truncate", True)
        attention_factor = _read_attention_factor(block, factor)
        is_default = attention_factor in (1.0, mscale(factor))
        return cls(
            theta=block.theta,
            factor=factor,
            original_length=original,
            ramp="dimension",
            alpha=alpha,
            beta=beta,
            truncate=truncate,
            temperature=attention_factor != 1.0,
            attention_factor=None if is_default else attention_factor,
        )


def mscale(factor: float, weight: float = 1.0) -> float:
    """The default attention factor of a scaling factor: 0.1 x weight x ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_attention_factor(block: HFBlock, factor: float) -> float:
    if block.has("attention_factor"):
        return block.number("attention_factor")
    # As DeepSeek uses them; one without the other is ignored, as in transformers.
    if block.values.get("mscale") and block.values.get("mscale_all_dim"):
        numerator, denominator = (block.number(key) for key in ("mscale", "mscale_all_dim"))
        return mscale(factor, numerator) / mscale(factor, denominator)
    return mscale(factor)
