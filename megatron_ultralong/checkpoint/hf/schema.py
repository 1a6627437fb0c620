"""The fields of config.json that this program reads: their types, checked before any is used.

Files of other programs have numbers as text, floats for whole numbers, "false" as text, and null for what has
a default: Python would read some of these as something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files


def _whole(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value if type(value) is int else None


def _number(value: Any) -> Any:
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _flag(value: Any) -> Any:
    return value if isinstance(value, bool) else None


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else None


def _object(value: Any) -> Any:
    return value if isinstance(value, dict) else None


def _texts(value: Any) -> Any:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _token_ids(value: Any) -> Any:
    if isinstance(value, list):
        ids = [_whole(item) for item in value]
        return None if None in ids else ids
    return _whole(value)


_Check = Callable[[Any], Any]
"""Returns the value in its own type; None where it has another type."""

_WHOLE: tuple[_Check, str] = (_whole, "a whole number")
_NUMBER: tuple[_Check, str] = (_number, "a number")
_FLAG: tuple[_Check, str] = (_flag, "true or false")
_TEXT: tuple[_Check, str] = (_text, "a text")
_OBJECT: tuple[_Check, str] = (_object, "an object")
_TOKENS: tuple[_Check, str] = (_token_ids, "a token id or a list of them")

FIELDS: dict[str, tuple[_Check, str]] = {
    "model_type": _TEXT,
    "architectures": (_texts, "a list of names"),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "max_window_layers",
        ),
        _WHOLE,
    ),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG),
    **dict.fromkeys(("hidden_act", "torch_dtype", "dtype"), _TEXT),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "quantization_config", "compression_config", "auto_map"), _OBJECT
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
}


def read(file: Path) -> dict[str, Any]:
    """Read a config.json whose fields have the types of `FIELDS`. Whole numbers may be written as floats, and
    null counts as missing: such fields are left out. Fields of other names come back as they are. UserError,
    with the file's name, where it is missing, broken, or a field has another type."""
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file} is a link to {file.readlink()}, which does not exist; download the model again"
        )
    try:
        return checked(atomic_files.read_json(file))
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """As `read`, for a config.json that has been read."""
    values = {}
    for key, value in raw.items():
        if key in FIELDS:
            if value is None:
                continue
            check, what = FIELDS[key]
            typed = check(value)
            if typed is None:
                hint = "; write it without quotes" if isinstance(value, str) and what != "an object" else ""
                raise UserError(f"{key}={value!r} must be {what}{hint}")
            value = typed
        values[key] = value
    return values
