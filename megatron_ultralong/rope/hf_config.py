"""RoPE in a Hugging Face config.json, read and written: rope_parameters (transformers 5), rope_theta and
rope_scaling (4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope import yarn
from megatron_ultralong.rope.methods import scaled_length
from megatron_ultralong.rope.settings import Rope

_ORIGINAL = "original_max_position_embeddings"
# Keys allowed in a block in addition to rope_type, rope_theta and a partial_rotary_factor of 1.
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


# ---- writing -----------------------------------------------------------------------------------


def to_hf(rope: Rope, max_position: int) -> dict[str, Any]:
    """Return the keys of config.json for `rope`: max_position_embeddings (`max_position`, tokens), rope_theta
    and rope_scaling.

    They are written in the style of transformers 4, which transformers 5 reads identically; writing
    `rope_parameters` as well would let the two diverge when edited. llama3 is read correctly since
    transformers 4.44, yarn since 4.51 (earlier versions ignore its original length), yarn with truncate=false
    since 4.55. UserError for settings that config.json cannot express.
    """
    if max_position < 1:
        raise UserError(f"max_position_embeddings={max_position} must be at least 1")
    return {
        "max_position_embeddings": max_position,
        "rope_theta": float(rope.theta),
        "rope_scaling": _write_block(rope, max_position),
    }


def exact_max_position(rope: Rope) -> int | None:
    """The only max_position_embeddings that `to_hf` accepts for `rope`; None = any."""
    # transformers 4.51 to 4.55 take max_position_embeddings / original length as the factor.
    return scaled_length(rope) if rope.type == "yarn" and rope.ramp == "dimension" else None


def _write_block(rope: Rope, max_position: int) -> dict[str, Any] | None:
    if rope.type == "none":
        return None
    common = {"factor": float(rope.factor), _ORIGINAL: rope.original_length}
    if rope.type == "llama3" or rope.ramp == "rotation":
        if rope.type == "yarn" and yarn.attention_factor(rope) != 1.0:
            raise UserError(
                "Hugging Face's config.json cannot express YaRN over rotations with attention temperature; train "
                "with rope.temperature=false or rope.ramp=dimension to export"
            )
        return {
            "rope_type": "llama3",
            **common,
            "low_freq_factor": float(rope.alpha),
            "high_freq_factor": float(rope.beta),
        }
    if max_position != exact_max_position(rope):
        raise UserError(
            f"max_position_embeddings={max_position} must be rope.factor x rope.original_length = "
            f"{exact_max_position(rope)} to export rope.type=yarn with rope.ramp=dimension"
        )
    block = {"rope_type": "yarn", **common, "beta_fast": float(rope.beta), "beta_slow": float(rope.alpha)}
    attention_factor = yarn.attention_factor(rope)
    if attention_factor != yarn.mscale(rope.factor):
        block["attention_factor"] = float(attention_factor)
    if not rope.truncate:
        block["truncate"] = False
    return block


# ---- reading -----------------------------------------------------------------------------------


def from_hf(config: Mapping[str, Any]) -> Rope:
    """Read the RoPE settings of a Llama's config.json, as transformers 5 does.

    Accepts `rope_theta` + `rope_scaling` (transformers 4; `type` or `rope_type`) and `rope_parameters` (5).
    UserError for types other than default, llama3 and yarn, for unknown keys (they may change the maths), for
    partial rotation, and where the config contradicts itself, because versions of transformers then differ.
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


def _read_block(config: Mapping[str, Any], where: str) -> Rope:
    """Read config[where], that is, rope_scaling or rope_parameters."""
    block = config[where]
    kind = _checked_type(block, where)
    theta = _theta(config, block, where)
    if kind == "default":
        return Rope(theta=theta)

    original = _original_length(config, block, where)
    if kind == "yarn" and block.get("factor", 0) is None:  # null, as in transformers
        factor = _number(config, "max_position_embeddings", "", 2048) / original
    else:
        factor = _number(block, "factor", where)
    if factor < 1:
        raise UserError(f"{where}: factor={factor:g} must be at least 1")
    common: dict[str, Any] = {"type": kind, "theta": theta, "factor": factor, "original_length": original}
    if kind == "llama3":
        alpha, beta = _ramp(block, where, ("low_freq_factor", None), ("high_freq_factor", None))
        return Rope(**common, alpha=alpha, beta=beta)
    alpha, beta = _ramp(block, where, ("beta_slow", 1.0), ("beta_fast", 32.0))
    truncate = block.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{where}: truncate={truncate!r} must be true or false")
    attention_factor = _read_attention_factor(block, where, factor)
    is_default = attention_factor in (1.0, yarn.mscale(factor))
    return Rope(
        **common,
        ramp="dimension",
        alpha=alpha,
        beta=beta,
        truncate=truncate,
        temperature=attention_factor != 1.0,
        attention_factor=None if is_default else attention_factor,
    )


def _checked_type(block: Any, where: str) -> str:
    """The RoPE type of a block whose keys are all known for it."""
    if not isinstance(block, Mapping):
        raise UserError(f"{where}={block!r} must be an object")
    if any(isinstance(value, Mapping) for value in block.values()):
        raise UserError(f"{where}: a RoPE that differs between layers is not supported")
    kind = block.get("rope_type") or block.get("type") or "default"
    if block.get("type") not in (None, kind):
        raise UserError(
            f"{where}: rope_type={kind} and type={block['type']} contradict each other; remove type"
        )
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported (supported: {', '.join(_KEYS)})")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind])
    for key, value in block.items():
        if key not in known and value is not None:
            raise UserError(
                f"{where}: unknown key {key!r} for RoPE type {kind}; remove it if it has no effect"
            )
    _refuse_partial_rotation(block, "partial_rotary_factor", f"{where}.partial_rotary_factor")
    return kind


def _ramp(block: Mapping[str, Any], where: str, *ends: tuple[str, float | None]) -> tuple[float, float]:
    """(alpha, beta), from two (key, default) pairs."""
    alpha, beta = (_number(block, key, where, default) for key, default in ends)
    if alpha >= beta:
        raise UserError(f"{where}: {ends[0][0]}={alpha:g} must be below {ends[1][0]}={beta:g}")
    return alpha, beta


def _read_attention_factor(block: Mapping[str, Any], where: str, factor: float) -> float:
    if block.get("attention_factor") is not None:
        return _number(block, "attention_factor", where)
    # As DeepSeek uses them; one without the other is ignored, as in transformers.
    if block.get("mscale") and block.get("mscale_all_dim"):
        numerator, denominator = (_number(block, key, where) for key in ("mscale", "mscale_all_dim"))
        return yarn.mscale(factor, numerator) / yarn.mscale(factor, denominator)
    return yarn.mscale(factor)


def _original_length(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> int:
    inner, outer = block.get(_ORIGINAL), config.get(_ORIGINAL)
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"{where}: {_ORIGINAL}={inner} contradicts the top-level {_ORIGINAL}={outer}; remove the wrong one"
        )
    if inner is None and outer is None:
        length = _number(config, "max_position_embeddings", "", 2048)
    else:
        length = _number(block if inner is not None else config, _ORIGINAL, where)
    if length != int(length):
        raise UserError(f"{where}: {_ORIGINAL}={length} must be a whole number")
    return int(length)


def _theta(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> float:
    inner, outer = block.get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"rope_theta={outer} and {where}.rope_theta={inner} contradict each other; remove the wrong one"
        )
    if inner is not None:
        return _number(block, "rope_theta", where)
    return _number(config, "rope_theta", "", 10000.0)


def _refuse_partial_rotation(values: Mapping[str, Any], key: str, name: str) -> None:
    if values.get(key) not in (None, 1):
        raise UserError(f"{name}={values[key]}: partial rotation is not supported (only 1.0)")


def _number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive number; null counts as missing. UserError where it is missing and has no default."""
    value = values.get(key)
    if value is None:
        value = default
    name = f"{where}: {key}" if where else key
    if value is None:
        raise UserError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r} must be a positive number")
    return float(value)
