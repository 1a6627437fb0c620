"""config.json of a Hugging Face Llama directory, read and written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint.hf import dtypes, schema
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock
from megatron_ultralong.rope.hf_config import from_hf, to_hf

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NOT_EXPORTED = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    ORIGINAL,
    "auto_map",  # code that is not part of the export, which is a plain model of its architecture
    "_name_or_path",
    "transformers_version",
)


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The contents of a config.json."""

    model: Model
    rope: Rope
    max_position: int
    """max_position_embeddings, tokens."""
    raw: dict[str, Any]
    """The JSON object itself, as schema.py returns it."""


def read_config(folder: Path | str) -> HFConfig:
    """Read config.json of an HF directory. UserError where it is missing or broken, or not a plain Llama."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a directory; download the Hugging Face model first and pass its local directory"
        )
    file = folder / "config.json"
    raw = schema.read(file)
    _refuse_other_models(raw, file)
    for key in _SIZES:
        if not isinstance(raw.get(key), int):
            raise UserError(f"{file}: {key}={raw.get(key)!r} must be a whole number")
    heads = raw["num_attention_heads"]
    try:
        # Missing keys have transformers' defaults.
        model = Model(
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // max(heads, 1),
            vocab_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=raw.get("initializer_range", 0.02),
        )
        rope = from_hf(raw)
        max_position = HFBlock(raw, {}, "").max_position()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return HFConfig(model=model, rope=rope, max_position=max_position, raw=raw)


def base_name(folder: Path | str, raw: dict[str, Any]) -> str:
    """Name of the model in an HF directory, for model cards: its name on the hub if config.json or the
    cache's path has it, otherwise the directory's name."""
    name = str(raw.get("_name_or_path", ""))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        return name
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{Path(folder).absolute()}/")
    return f"{cached[1]}/{cached[2]}" if cached else Path(folder).resolve().name


def export_config(
    model: Model, rope: Rope, max_position: int, dtype: torch.dtype, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the config.json of an export, for transformers 4.4x to 5.x: that of the base model, `base`, with
    shape, RoPE, length and dtype replaced.

    max_position: tokens. UserError where config.json cannot express `rope`.
    """
    return {
        **{key: value for key, value in (base or {}).items() if key not in _NOT_EXPORTED},
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_position,
        **to_hf(rope, max_position, model.head_dim),
        "torch_dtype": dtypes.NAMES[dtype],
        "dtype": dtypes.NAMES[dtype],
    }


def _refuse_other_models(raw: dict[str, Any], file: Path) -> None:
    kind, architectures = raw.get("model_type"), raw.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "LlamaForCausalLM" not in architectures:
        raise UserError(
            f"{file}: model_type={kind}, architectures={architectures}; only LlamaForCausalLM is supported"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{file}: {key}=true; only a Llama without biases is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act={raw['hidden_act']}; only silu is supported")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise UserError(f"{file}: the weights are quantised; use the original bf16 or fp32 model")
