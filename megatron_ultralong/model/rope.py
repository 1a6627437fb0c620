"""Rotary position embedding: frequencies, angles right at millions of positions, rotation, and its words in config.json.

D head dimension, s positions of this rank (cos_sin, apply_rope). Formulas, with b = theta, L = original_length, f_i = b^(-2i/D):

- llama3, and yarn with ramp=rotation: r_i = L f_i / 2 pi rotations within L, g = clip((r - alpha) / (beta - alpha), 0, 1),
  f' = (1 - g) f / factor + g f. YaRN paper (arXiv 2309.00071) eq. 17-20, and `rope_type: llama3` of Llama-3.1: the same maths.
- yarn with ramp=dimension: g falls linearly over the index i between the indices that turn beta and alpha times within L, as
  `rope_type: yarn` of transformers has it.
- temperature: cos and sin times the attention factor, by default 0.1 ln(factor) + 1 (YaRN paper eq. 22).

Frequencies are bit-equal to those of transformers (same float32 operations in the same order): at 4M positions a last bit of
a frequency is worth up to 0.17 rad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import Rope
from megatron_ultralong.errors import UserError

_CHUNK = 2**20  # angles computed at a time: 8 MiB for each float64 temporary

# Keys that may stand beside rope_type, rope_theta and a partial_rotary_factor of 1.
_ORIGINAL = "original_max_position_embeddings"
_KEYS = {
    "default": (),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        _ORIGINAL,
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    ),
}


# ---- frequencies and angles --------------------------------------------------------------------


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """(float32 [D/2] on the CPU, in radians a position; what cos and sin are to be multiplied with).

    Always computed on the CPU, so that every rank and device has the same bits. UserError for settings
    without meaning.
    """
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"model.head_dim={head_dim} must be even for RoPE")
    periods = rope.theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    )  # radians^-1 [D/2]
    if rope.type == "none":
        frequencies = 1.0 / periods
    elif rope.type == "yarn" and rope.ramp == "dimension":
        frequencies = _ramp_over_dimensions(rope, periods, head_dim)
    else:
        frequencies = _ramp_over_rotations(rope, 1.0 / periods)
    return frequencies, _attention_factor(rope)


def same_maths(a: Rope, b: Rope, head_dim: int) -> bool:
    """Whether two settings rotate alike, to the last bit: `llama3`, say, and `yarn` over rotations without
    temperature."""
    (frequencies_a, factor_a), (frequencies_b, factor_b) = (
        inverse_frequencies(a, head_dim),
        inverse_frequencies(b, head_dim),
    )
    return torch.equal(frequencies_a, frequencies_b) and factor_a == factor_b


@torch.no_grad()
def cos_sin(positions: Tensor, inverse_frequencies: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, times the attention factor: each float32 [s, D/2] on the
    positions' device.

    positions: int64 [s], in any order. The product and its cosine are float64: in float32 the product alone
    would be off by 0.125 rad at 4M positions.
    """
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions must be int64 [s], not {positions.dtype} {list(positions.shape)}")
    frequencies = inverse_frequencies.to(device=positions.device, dtype=torch.float64)
    cos = torch.empty(len(positions), len(frequencies), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    rows = max(1, _CHUNK // len(frequencies))
    for start in range(0, len(positions), rows):
        angles = torch.outer(positions[start : start + rows].double(), frequencies)  # float64 [rows, D/2]
        cos[start : start + rows] = torch.cos(angles).mul_(attention_factor)
        sin[start : start + rows] = angles.sin_().mul_(attention_factor)
    return cos, sin


def _ramp_over_rotations(rope: Rope, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies  # positions
    kept = (rope.original_length / wavelengths - rope.alpha) / (rope.beta - rope.alpha)
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    scaled = torch.where(wavelengths > rope.original_length / rope.alpha, frequencies / rope.factor, between)
    return torch.where(wavelengths < rope.original_length / rope.beta, frequencies, scaled)


def _ramp_over_dimensions(rope: Rope, periods: Tensor, head_dim: int) -> Tensor:
    if rope.theta <= 1:
        raise UserError(f"rope.theta={rope.theta} must be above 1 for rope.ramp=dimension")

    def index(rotations: float) -> float:
        """The index i, as a real number, whose frequency turns `rotations` times within the original length."""
        return (head_dim * math.log(rope.original_length / (rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    first, last = index(rope.beta), index(rope.alpha)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = (
        max(first, 0),
        min(last, head_dim - 1),
    )  # the upper bound is twice the last index, in transformers too
    width = last - first if last != first else 0.001  # a step, without dividing by zero
    kept = 1 - torch.clamp(
        (torch.arange(len(periods), dtype=torch.float32, device="cpu") - first) / width, 0, 1
    )
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _attention_factor(rope: Rope) -> float:
    if rope.type != "yarn" or not rope.temperature:
        return 1.0
    if rope.attention_factor is None:
        return _mscale(rope.factor)
    if not 0 < rope.attention_factor < math.inf:
        raise UserError(f"rope.attention_factor={rope.attention_factor} must be a positive number")
    return rope.attention_factor


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


# ---- rotation ----------------------------------------------------------------------------------


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by its angle (rotate-half order, as Hugging Face stores q and k).

    x: [..., s, d], any float dtype and strides; cos and sin: float32 [s, d/2] of `cos_sin`, which get no
    gradient. Computed in float32 (float64 for float64 x), returned in x's dtype. The backward rotates the
    other way and needs cos and sin only.
    """
    if x.shape[-2:] != (cos.shape[-2], 2 * cos.shape[-1]) or sin.shape != cos.shape:
        raise ValueError(f"x {list(x.shape)} does not fit cos {list(cos.shape)} and sin {list(sin.shape)}")
    return _Rotation.apply(x, cos, sin, 1)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.direction = direction
        first, second = x.chunk(2, dim=-1)  # [..., s, d/2] each
        out = torch.empty_like(x)
        half = x.shape[-1] // 2
        # Type promotion computes bf16 x float32 in float32 without a float32 copy of x; the result is rounded
        # once.
        out[..., :half] = torch.mul(first, cos).addcmul_(second, sin, value=-direction)
        out[..., half:] = torch.mul(second, cos).addcmul_(first, sin, value=direction)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grads[0], cos, sin, -ctx.direction), None, None, None


# ---- config.json -------------------------------------------------------------------------------


def from_hf(config: Mapping[str, Any]) -> Rope:
    """What a Llama's config.json says about RoPE, read as transformers 5 reads it.

    Takes both styles: `rope_theta` + `rope_scaling` (transformers 4; `type` or `rope_type`), and
    `rope_parameters` (5). UserError for other types than default, llama3 and yarn, for keys that are not
    known (they may change the maths), for partial rotation, and where the config contradicts itself, because
    then the versions of transformers differ.
    """
    for key in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"):
        _refuse_partial_rotation(config, key, key)
    blocks = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if not blocks:
        return Rope(theta=_theta(config, {}, ""))
    ropes = [_read_block(config, key) for key in blocks]
    if ropes[0] != ropes[-1]:
        raise UserError(
            "rope_scaling and rope_parameters contradict each other; remove the one that is wrong"
        )
    return ropes[0]


def to_hf(rope: Rope, max_position: int) -> dict[str, Any]:
    """The keys of config.json for `rope`: max_position_embeddings (`max_position`, tokens), rope_theta and
    rope_scaling.

    They are written in the style of transformers 4, which transformers 5 reads alike; saying it in
    `rope_parameters` too would only let the two drift apart when edited. llama3 is read alike since
    transformers 4.44, yarn since 4.51 (before, its original length was ignored), yarn with truncate=false
    since 4.55. UserError for what config.json has no words for.
    """
    if max_position < 1:
        raise UserError(f"max_position_embeddings={max_position} must be at least 1")
    return {
        "max_position_embeddings": max_position,
        "rope_theta": float(rope.theta),
        "rope_scaling": _block(rope, max_position),
    }


def _block(rope: Rope, max_position: int) -> dict[str, Any] | None:
    if rope.type == "none":
        return None
    factor, attention_factor = float(rope.factor), _attention_factor(rope)
    common = {"factor": factor, _ORIGINAL: rope.original_length}
    if rope.type == "llama3" or rope.ramp == "rotation":
        if attention_factor != 1.0:
            raise UserError(
                "Hugging Face's config.json cannot say YaRN over rotations with attention temperature; train with "
                "rope.temperature=false or rope.ramp=dimension to export"
            )
        return {
            "rope_type": "llama3",
            **common,
            "low_freq_factor": float(rope.alpha),
            "high_freq_factor": float(rope.beta),
        }
    reach = round(rope.factor * rope.original_length)
    if max_position != reach:
        # transformers 4.51-4.55 take max_position_embeddings / original length as the factor.
        raise UserError(
            f"max_position_embeddings={max_position} must be rope.factor x rope.original_length = {reach} "
            "to export rope.type=yarn with rope.ramp=dimension"
        )
    block = {"rope_type": "yarn", **common, "beta_fast": float(rope.beta), "beta_slow": float(rope.alpha)}
    if attention_factor != _mscale(rope.factor):
        block["attention_factor"] = float(attention_factor)
    if not rope.truncate:
        block["truncate"] = False
    return block


def _read_block(config: Mapping[str, Any], where: str) -> Rope:
    block = config[where]
    if not isinstance(block, Mapping):
        raise UserError(f"{where}={block!r} should be an object")
    if any(isinstance(value, Mapping) for value in block.values()):
        raise UserError(f"{where}: a RoPE that differs between layers is not supported")
    kind = block.get("rope_type") or block.get("type") or "default"
    if block.get("type") not in (None, kind):
        raise UserError(
            f"{where}: rope_type={kind} and type={block['type']} contradict each other; remove type"
        )
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported; supported are {', '.join(_KEYS)}")
    for key, value in block.items():
        if (
            key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind])
            and value is not None
        ):
            raise UserError(
                f"{where}: key {key!r} is not known for RoPE type {kind}; remove it if it has no effect"
            )
    _refuse_partial_rotation(block, "partial_rotary_factor", f"{where}.partial_rotary_factor")
    theta = _theta(config, block, where)
    if kind == "default":
        return Rope(theta=theta)

    original = _original_length(config, block, where)
    if kind == "yarn" and block.get("factor", 0) is None:  # null, as transformers takes it
        factor = _number(config, "max_position_embeddings", "", 2048) / original
    else:
        factor = _number(block, "factor", where)
    if factor < 1:
        raise UserError(f"{where}: factor={factor:g} must be at least 1")
    if kind == "llama3":
        alpha, beta = _ramp(block, where, ("low_freq_factor", None), ("high_freq_factor", None))
        return Rope(
            type="llama3", theta=theta, factor=factor, original_length=original, alpha=alpha, beta=beta
        )
    alpha, beta = _ramp(block, where, ("beta_slow", 1.0), ("beta_fast", 32.0))
    truncate = block.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{where}: truncate={truncate!r} should be true or false")
    attention_factor, default = _read_attention_factor(block, where, factor), _mscale(factor)
    return Rope(
        type="yarn",
        ramp="dimension",
        theta=theta,
        factor=factor,
        original_length=original,
        alpha=alpha,
        beta=beta,
        truncate=truncate,
        temperature=attention_factor != 1.0,
        attention_factor=None if attention_factor in (1.0, default) else attention_factor,
    )


def _ramp(block: Mapping[str, Any], where: str, *ends: tuple[str, float | None]) -> tuple[float, float]:
    """(alpha, beta), from two keys and their defaults."""
    alpha, beta = (_number(block, key, where, default) for key, default in ends)
    if alpha >= beta:
        raise UserError(f"{where}: {ends[0][0]}={alpha:g} must be below {ends[1][0]}={beta:g}")
    return alpha, beta


def _read_attention_factor(block: Mapping[str, Any], where: str, factor: float) -> float:
    if block.get("attention_factor") is not None:
        return _number(block, "attention_factor", where)
    if block.get("mscale") and block.get(
        "mscale_all_dim"
    ):  # as DeepSeek has it; one alone is ignored, as in transformers
        return _mscale(factor, _number(block, "mscale", where)) / _mscale(
            factor, _number(block, "mscale_all_dim", where)
        )
    return _mscale(factor)


def _original_length(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> int:
    inner, outer = block.get(_ORIGINAL), config.get(_ORIGINAL)
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"{where}: {_ORIGINAL}={inner} contradicts {_ORIGINAL}={outer} outside; remove the one that is wrong"
        )
    if inner is None and outer is None:
        length = _number(config, "max_position_embeddings", "", 2048)
    else:
        length = _number(block if inner is not None else config, _ORIGINAL, where)
    if length != int(length):
        raise UserError(f"{where}: {_ORIGINAL}={length} should be a whole number")
    return int(length)


def _theta(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> float:
    inner, outer = block.get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"rope_theta={outer} and {where}.rope_theta={inner} contradict each other; remove the one that is wrong"
        )
    return _number(
        block if inner is not None else config, "rope_theta", where if inner is not None else "", 10000.0
    )


def _refuse_partial_rotation(values: Mapping[str, Any], key: str, name: str) -> None:
    if values.get(key) not in (None, 1):
        raise UserError(f"{name}={values[key]}: partial rotation is not supported, only 1.0")


def _number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive number; null counts as missing. UserError where it is neither there nor has a default."""
    value = values.get(key)
    if value is None:
        value = default
    name = f"{where}: {key}" if where else key
    if value is None:
        raise UserError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r} should be a positive number")
    return float(value)
