"""config.json of a Hugging Face directory, read and written: models of the families in families.py."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint.hf import dtypes, schema
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.families import FAMILIES, Family, supported
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_block import ORIGINAL, HFBlock, checked_number
from megatron_ultralong.rope.hf_config import from_hf, to_hf

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NOT_EXPORTED = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    ORIGINAL,
    "layer_types",  # full attention in every layer, which is the default
    "dual_chunk_attention_config",  # Qwen2.5-1M: how vLLM extends the base's length, in chunks of that length
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
    """Read config.json of an HF directory. UserError where it is missing or broken, or of a model that is not
    supported."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a directory; download the Hugging Face model first and pass its local directory"
        )
    file = folder / "config.json"
    raw = schema.read(file)
    try:
        family = _checked_family(raw)
        for key in _SIZES:
            if not isinstance(raw.get(key), int):
                raise UserError(f"{key}={raw.get(key)!r} must be a whole number")
        heads = raw["num_attention_heads"]
        values = {**family.defaults, **raw}  # missing keys have transformers' defaults
        options = dict.fromkeys(family.always, True)
        for key, together in family.stated.items():
            options |= dict.fromkeys(together, bool(values.get(key, False)))
        model = Model(
            hidden_size=values["hidden_size"],
            ffn_size=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // max(heads, 1),
            vocab_size=values["vocab_size"],
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            init_std=values.get("initializer_range", 0.02),
            family=raw["model_type"],
            **options,
        )
        rope = from_hf(values)
        max_position = HFBlock(values, {}, "").max_position()
        _refuse_sliding_window(values, family, max_position)
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
    family = FAMILIES[model.family]
    return {
        **{key: value for key, value in (base or {}).items() if key not in _NOT_EXPORTED},
        "architectures": [family.architecture],
        "model_type": model.family,
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
        **{key: getattr(model, together[0]) for key, together in family.stated.items()},
        **_NO_WINDOW[family.window],
        "max_position_embeddings": max_position,
        **to_hf(rope, max_position, model.head_dim),
        "torch_dtype": dtypes.NAMES[dtype],
        "dtype": dtypes.NAMES[dtype],
    }


_NO_WINDOW: dict[str, dict[str, Any]] = {
    "none": {},
    "all_layers": {"sliding_window": None},
    "by_layer": {"use_sliding_window": False},
}
"""Keys of an export that switch sliding windows off, by `Family.window`."""


def _checked_family(raw: dict[str, Any]) -> Family:
    """The family of a config.json. UserError for other models, and for what no family here has."""
    kind, architectures = raw.get("model_type"), raw.get("architectures")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind} is not supported (supported: {supported()})")
    family = FAMILIES[kind]
    if architectures and family.architecture not in architectures:
        raise UserError(
            f"architectures={architectures}; of model_type={kind} only {family.architecture} is supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={raw['hidden_act']}; only silu is supported")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise UserError("the weights are quantised; use the original bf16 or fp32 model")
    return family


def _refuse_sliding_window(values: dict[str, Any], family: Family, max_position: int) -> None:
    """UserError where attention of any layer is limited to a window within `max_position` tokens.

    A window that is not shorter than max_position_embeddings has never limited anything. values: the config
    with the family's defaults.
    """
    window = values.get("sliding_window")
    if family.window == "none" or (family.window == "by_layer" and not _windowed_layers(values)):
        return
    if window is None:
        return
    if checked_number(values, "sliding_window", "") >= max_position:
        return
    off = ", ".join(f"{key} to {json.dumps(value)}" for key, value in _NO_WINDOW[family.window].items())
    raise UserError(
        f"sliding_window={window} limits attention of this model, and only full attention is supported; "
        f"to train it with full attention set {off}"
    )


def _windowed_layers(values: dict[str, Any]) -> bool:
    """Whether any layer has a window, as in Qwen2Config and Qwen3Config."""
    types = values.get("layer_types")
    if types is not None:
        return any(kind != "full_attention" for kind in types)
    return (
        bool(values.get("use_sliding_window")) and values["max_window_layers"] < values["num_hidden_layers"]
    )
