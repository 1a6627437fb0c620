"""RoPE of a GGUF file, as llama.cpp computes it for the architectures of the supported families.

Unless rope.scaling.type says otherwise, frequencies are divided by rope.scaling.factor and by the tensor
rope_freqs.weight (float32 [D/2]), in which converters write Llama-3.1's scaling. llama.cpp multiplies angles
up in float32, so its last bits differ from those here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ultralong.checkpoint.rope_sources.source import RopeSource
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.client_notes import LLAMA_CPP_RAMP
from megatron_ultralong.rope.hf_block import checked_number
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.plain import Unscaled
from megatron_ultralong.rope.yarn import YaRN, mscale

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""The prefix of a file's keys; Mistral's is llama."""

_ORIGINAL = "rope.scaling.original_context_length"
_KEYS = (
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.key_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",  # older name of rope.scaling.factor
    "rope.scaling.type",
    "rope.scaling.factor",
    _ORIGINAL,
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)
_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read(file: Path) -> RopeSource:
    """Read the RoPE of a GGUF file. UserError where it cannot be read, or is of another architecture."""
    reader = _open(file)
    try:
        return _read(reader, file)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _open(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file}: reading a GGUF file needs package {error.name}; pip install -c constraints.txt -e '.[gguf]'"
        ) from None
    try:
        return GGUFReader(file)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{file} cannot be read as GGUF: {type(error).__name__}: {error}") from None


def _read(reader: GGUFReader, file: Path) -> RopeSource:
    architecture = _value(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"general.architecture={architecture} is not supported (supported: {', '.join(_ARCHITECTURES)})"
        )
    keys = {key: _value(reader, f"{architecture}.{key}") for key in _KEYS}
    tables = {
        tensor.name: tuple(float(x) for x in tensor.data)
        for tensor in reader.tensors
        if tensor.name in _TENSORS
    }
    context = int(checked_number(keys, "context_length", "GGUF"))
    rope, method = _rope(keys, tables, context)
    divided = "rope_freqs.weight" in tables
    return RopeSource(
        name=str(file),
        kind="GGUF",
        rope=rope,
        head_dim=_head_dim(keys),
        max_position=context,
        method=method,
        original_stated=not divided or keys[_ORIGINAL] is not None,
    )


def _rope(keys: dict[str, Any], tables: dict[str, tuple[float, ...]], context: int) -> tuple[Rope, str]:
    """(RoPE, its description where the method has no name of its own). context: tokens."""
    theta = checked_number(keys, "rope.freq_base", "GGUF", 10000.0)
    original = int(checked_number(keys, _ORIGINAL, "GGUF", context))
    kind = keys["rope.scaling.type"] or "linear"
    old_factor = keys["rope.scale_linear"] or None
    factor = checked_number({"factor": keys["rope.scaling.factor"] or old_factor}, "factor", "GGUF", 1.0)
    attention_factor = checked_number(keys, "rope.scaling.attn_factor", "GGUF", 1.0)
    divisors = tables.get("rope_freqs.weight")
    long, short = (tables.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UserError(
            f"rope.scaling.type={kind} is not supported (supported: none, linear, yarn, longrope)"
        )
    if kind == "yarn":
        if divisors or long:
            raise UserError("rope.scaling.type=yarn together with a table of factors is not supported")
        return _yarn(keys, theta, original, factor), ""
    factor = 1.0 if kind == "none" else factor
    if divisors or (long and short):
        table, short_table = (divisors, ()) if divisors else (long or (), short or ())
        rope = LongRoPE(
            theta=theta,
            original_length=original,
            factors=tuple(x * factor for x in table),
            short_factors=tuple(x * factor for x in short_table),
            attention_factor=attention_factor,
        )
        name = "rope_freqs.weight" if divisors else "rope_factors_long.weight"
        scaled = f", all of them times {factor:g}" if factor != 1 else ""
        return rope, (
            f"divisors in {name}, theta {theta:,.10g}, {len(table)} numbers from {min(table):g} to {max(table):g}{scaled}"
        )
    if attention_factor != 1:
        raise UserError(f"rope.scaling.attn_factor={attention_factor:g} with type {kind} is not supported")
    if kind == "longrope":  # without the tables, as convert_hf_to_gguf.py writes it: no scaling
        return Unscaled(
            theta=theta, original_length=context
        ), "no scaling: rope_factors_long.weight is missing"
    if factor == 1:
        return Unscaled(theta=theta, original_length=context), ""
    return Linear(theta=theta, factor=factor, original_length=original), ""


def _yarn(keys: dict[str, Any], theta: float, original: int, factor: float) -> Rope:
    if keys["rope.scaling.yarn_ext_factor"] not in (None, 1.0) or keys["rope.scaling.yarn_log_multiplier"]:
        raise UserError("rope.scaling.yarn_ext_factor and yarn_log_multiplier are not supported")
    # yarn_attn_factor, in which convert_hf_to_gguf.py writes an attention_factor, has no effect in llama.cpp.
    attention_factor = mscale(factor) * checked_number(keys, "rope.scaling.attn_factor", "GGUF", 1.0)
    is_default = attention_factor in (1.0, mscale(factor))
    return YaRN(
        theta=theta,
        factor=factor,
        original_length=original,
        ramp="dimension",
        # llama.cpp reads yarn_beta_slow and _fast for other architectures only.
        alpha=LLAMA_CPP_RAMP["alpha"],
        beta=LLAMA_CPP_RAMP["beta"],
        temperature=attention_factor != 1.0,
        attention_factor=None if is_default else attention_factor,
    )


def _head_dim(keys: dict[str, Any]) -> int | None:
    for key in ("rope.dimension_count", "attention.key_length"):
        if keys[key] is not None:
            return int(checked_number(keys, key, "GGUF"))
    if keys["embedding_length"] and keys["attention.head_count"]:
        return int(keys["embedding_length"] // keys["attention.head_count"])
    return None


def _value(reader: GGUFReader, key: str) -> Any:
    """The value of a key; None where the file does not have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
