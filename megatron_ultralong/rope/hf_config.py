"""RoPE in a Hugging Face config.json, read and written: rope_parameters (transformers 5), rope_theta and
rope_scaling (4). Each method has its own keys (`Rope.to_hf`, `Rope.from_hf`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_block import HFBlock
from megatron_ultralong.rope.methods import HF_METHODS
from megatron_ultralong.rope.plain import Unscaled


def to_hf(rope: Rope, max_position: int, head_dim: int) -> dict[str, Any]:
    """Return the keys of config.json for `rope`: max_position_embeddings (`max_position`, tokens), rope_theta
    and rope_scaling.

    They are written in the style of transformers 4, which transformers 5 reads identically; writing
    `rope_parameters` as well would let the two diverge when edited. llama3 is read correctly since
    transformers 4.43, yarn since 4.51 (earlier versions ignore its original length), yarn with truncate=false
    since 4.55. UserError for settings that config.json cannot express.
    """
    if max_position < 1:
        raise UserError(f"max_position_embeddings={max_position} must be at least 1")
    exact = rope.exact_max_position()
    if exact is not None and max_position != exact:
        of = "rope.original_length"
        if exact != rope.original():
            of = f"rope.factor x {of}"
        raise UserError(
            f"max_position_embeddings={max_position} must be {of} = {exact} to export rope.type={rope.type}"
        )
    return {"max_position_embeddings": max_position, **rope.to_hf(max_position, head_dim)}


def from_hf(config: Mapping[str, Any]) -> Rope:
    """Read the RoPE settings of a Llama's config.json, as transformers 5 does.

    Accepts `rope_theta` + `rope_scaling` (transformers 4; `type` or `rope_type`) and `rope_parameters` (5).
    UserError for types other than those of `HF_METHODS`, for unknown keys (they may change the maths), for
    partial rotation, and where the config contradicts itself, because versions of transformers then differ.
    """
    for key in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"):
        _refuse_partial_rotation(config, key, key)
    blocks = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if not blocks:
        return Unscaled.from_hf(HFBlock(config, {}, ""))
    ropes = [_read_block(config, key) for key in blocks]
    if ropes[0] != ropes[-1]:
        raise UserError(
            "rope_scaling and rope_parameters contradict each other; remove the one that is wrong"
        )
    return ropes[0]


def _read_block(config: Mapping[str, Any], where: str) -> Rope:
    """Read config[where], that is, rope_scaling or rope_parameters."""
    values = config[where]
    return HF_METHODS[_checked_type(values, where)].from_hf(HFBlock(config, values, where))


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
    if not isinstance(kind, str) or kind not in HF_METHODS:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported (supported: {', '.join(HF_METHODS)})")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *HF_METHODS[kind].hf_keys)
    for key, value in block.items():
        if key not in known and value is not None:
            raise UserError(
                f"{where}: unknown key {key!r} for RoPE type {kind}; remove it if it has no effect"
            )
    _refuse_partial_rotation(block, "partial_rotary_factor", f"{where}.partial_rotary_factor")
    return kind


def _refuse_partial_rotation(values: Mapping[str, Any], key: str, name: str) -> None:
    if values.get(key) not in (None, 1):
        raise UserError(f"{name}={values[key]}: partial rotation is not supported (only 1.0)")
