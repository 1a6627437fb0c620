"""RoPE from Megatron-LM's arguments, with the defaults of its megatron/training/arguments.py.

`--position-embedding-type rope`: unscaled; with `--use-rope-scaling` Llama-3.1's scaling over 8192 positions
(alpha 1, beta 4; these have no argument); or positions divided by `--rotary-seq-len-interpolation-factor`.
`yarn`: the ramp over dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint.rope_sources.source import RopeSource
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.llama3 import Llama3
from megatron_ultralong.rope.plain import Unscaled
from megatron_ultralong.rope.yarn import YaRN, mscale

NUMBERS: dict[str, float | None] = {
    "rotary_base": 10000,
    "rotary_percent": 1,
    "rope_scaling_factor": 8,
    "rotary_seq_len_interpolation_factor": None,
    "rotary_scaling_factor": 1,
    "mscale": 1,
    "mscale_all_dim": 0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
    "max_position_embeddings": None,
    "seq_length": None,
    "kv_channels": None,
    "hidden_size": None,
    "num_attention_heads": None,
}
"""Arguments that are numbers, with their defaults."""
_WHOLE = (
    "yarn_original_max_position_embeddings",
    "max_position_embeddings",
    "seq_length",
    "kv_channels",
    "hidden_size",
    "num_attention_heads",
)
FLAGS = {
    "use_rope_scaling": False,
    "use_rotary_position_embeddings": False,
    "rotary_interleaved": False,
    "multi_latent_attention": False,
    "yarn_correction_range_round_to_int": True,
}
"""Arguments that are true or false, with their defaults."""
_WORDS = ("position_embedding_type", "no_rope_freq")
_STATE_ROPE = ("rotary_base", "use_rope_scaling", "position_embedding_type", "use_rotary_position_embeddings")

_FACTOR_IGNORED = (
    "Megatron-LM before the fix of NVIDIA/Megatron-LM#6305 does not hand --rope-scaling-factor to the model: every "
    "GPT of its pretrain_gpt.py trains with factor 8, whatever the arguments state"
)
_INTERPOLATION_IGNORED = (
    "releases of Megatron-LM whose pretrain_gpt.py calls gpt_builder or GPTModel itself do not hand "
    "--rotary-seq-len-interpolation-factor to the model and train unscaled"
)


def parse(text: str) -> dict[str, Any]:
    """The RoPE arguments on a command line, in a shell script or in one argument a line; comments and other
    arguments are skipped. As in argparse, the last value of an argument counts."""
    text = re.sub(r"(^|\s)#.*", r"\1", text).replace("\\\n", " ")
    values: dict[str, Any] = {}
    for name, value in re.findall(
        r"""(?<![\w-])--([a-z][\w-]*)(?:(?:=|[ \t]+|\s*\n\s*)(?!--)["']?([^\s"'()\\]+))?""", text
    ):
        name = name.replace("-", "_")
        if name == "no_yarn_correction_range_round_to_int":
            values["yarn_correction_range_round_to_int"] = False
        elif name in FLAGS:
            values[name] = True
        elif name in NUMBERS or name in _WORDS:
            values[name] = value
    return values


def read(values: Mapping[str, Any], path: Path) -> list[RopeSource]:
    """Read RoPE from arguments by name, `rotary_base` or `--rotary-base`, also inside nested mappings.

    Two sources where releases of Megatron-LM differ: what the arguments state, and what is trained if they
    are ignored. UserError, naming `path`, where they state no RoPE, or one that is not supported.
    """
    try:
        return _read(_checked(_flat(values)), str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(arguments: dict[str, Any], name: str) -> list[RopeSource]:
    notes = list(_refuse_or_note(arguments))
    stated, ignored, why = _ropes(arguments, notes)
    kv_channels, hidden, heads = (
        arguments[key] for key in ("kv_channels", "hidden_size", "num_attention_heads")
    )
    source = RopeSource(
        name=name,
        kind="Megatron-LM arguments",
        rope=stated,
        head_dim=hidden // heads if kv_channels is None and hidden and heads else kv_channels,
        max_position=arguments["max_position_embeddings"],
        notes=tuple(notes),
    )
    if ignored is None:
        return [source]
    return [
        replace(source, name=f"{name} (as stated)", notes=(*source.notes, why)),
        replace(source, name=f"{name} (argument ignored)", rope=ignored),
    ]


def _ropes(arguments: dict[str, Any], notes: list[str]) -> tuple[Rope, Rope | None, str]:
    """(RoPE as stated; RoPE of the releases that ignore an argument, or None; that in words)."""
    theta, factor = float(arguments["rotary_base"]), arguments["rope_scaling_factor"]
    interpolation = arguments["rotary_seq_len_interpolation_factor"]
    if arguments["position_embedding_type"] == "yarn":
        for name in ("use_rope_scaling", "rotary_seq_len_interpolation_factor"):
            if arguments[name]:
                notes.append(f"--{name.replace('_', '-')} has no effect with --position-embedding-type yarn")
        return _yarn(arguments, theta), None, ""
    if arguments["use_rope_scaling"]:
        if interpolation is not None:
            raise UserError(
                "--use-rope-scaling together with --rotary-seq-len-interpolation-factor is not supported"
            )
        llama3 = Llama3(theta=theta, factor=factor, original_length=8192, alpha=1.0, beta=4.0)
        return llama3, None if factor == 8 else replace(llama3, factor=8.0), _FACTOR_IGNORED
    length = arguments["max_position_embeddings"] or arguments["seq_length"]
    if length is None:
        raise UserError("states neither --max-position-embeddings nor --seq-length; add one")
    unscaled = Unscaled(theta=theta, original_length=length)
    if interpolation is None:
        return unscaled, None, ""
    linear = Linear(theta=theta, factor=interpolation, original_length=length)
    return linear, unscaled, _INTERPOLATION_IGNORED


def _yarn(arguments: dict[str, Any], theta: float) -> Rope:
    factor = arguments["rotary_scaling_factor"]
    attention_factor = mscale(factor, arguments["mscale"]) / mscale(factor, arguments["mscale_all_dim"])
    is_default = attention_factor in (1.0, mscale(factor))
    return YaRN(
        theta=theta,
        factor=factor,
        original_length=arguments["yarn_original_max_position_embeddings"],
        ramp="dimension",
        alpha=arguments["yarn_beta_slow"],
        beta=arguments["yarn_beta_fast"],
        truncate=arguments["yarn_correction_range_round_to_int"],
        temperature=attention_factor != 1.0,
        attention_factor=None if is_default else attention_factor,
    )


def _refuse_or_note(arguments: dict[str, Any]) -> list[str]:
    """UserError for what is not compared here; notes on what does not change frequencies."""
    notes = []
    if arguments["use_rotary_position_embeddings"]:
        arguments["position_embedding_type"] = "rope"
    if arguments["position_embedding_type"] is None:
        arguments["position_embedding_type"] = "rope"
        notes.append("--position-embedding-type is not stated; rope is assumed")
    kind = arguments["position_embedding_type"]
    if kind not in ("rope", "yarn"):
        raise UserError(f"--position-embedding-type {kind} is not supported (supported: rope, yarn)")
    if arguments["multi_latent_attention"]:
        raise UserError("--multi-latent-attention rotates a part of each head, which is not supported")
    if arguments["rotary_percent"] != 1:
        raise UserError(f"--rotary-percent {arguments['rotary_percent']:g} is not supported (only 1.0)")
    if arguments["rotary_interleaved"]:
        notes.append("--rotary-interleaved pairs neighbouring dimensions; frequencies are the same")
    if arguments["no_rope_freq"]:
        notes.append(f"--no-rope-freq {arguments['no_rope_freq']}: some layers have no RoPE")
    return notes


# ---- values ------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE arguments by their names in Python. UserError where nested mappings contradict each other."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).removeprefix("--").replace("-", "_")
        inner = _flat(value) if isinstance(value, Mapping) else {name: value}
        for known in inner.keys() & {*NUMBERS, *FLAGS, *_WORDS}:
            if known in flat and flat[known] != inner[known]:
                raise UserError(f"{known} is stated as {flat[known]} and as {inner[known]}; remove one")
            flat[known] = inner[known]
    return flat


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Every argument with a value of its type; None where it is not stated and has no default."""
    if not any(values.get(name) not in (None, False) for name in _STATE_ROPE):
        raise UserError(
            "states no RoPE of Megatron-LM; it must have --rotary-base, --use-rope-scaling or "
            "--position-embedding-type"
        )
    checked: dict[str, Any] = dict.fromkeys(_WORDS)
    checked.update({name: values[name] for name in _WORDS if values.get(name)})
    for name, default in NUMBERS.items():
        stated = values.get(name)
        checked[name] = default if stated is None else _number(name, stated)
    for name, flag in FLAGS.items():
        stated = values.get(name)
        checked[name] = flag if stated is None else stated
        if not isinstance(checked[name], bool):
            raise UserError(f"{name}={stated!r} must be true or false")
    return checked


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name}={value!r} is not a number; write its value") from None
    zero = name in ("mscale", "mscale_all_dim")
    if isinstance(value, bool) or not (number >= 0 if zero else number > 0) or number == math.inf:
        raise UserError(f"{name}={value!r} must be a positive number")
    if name in _WHOLE:
        if number != int(number):
            raise UserError(f"{name}={value!r} must be a whole number")
        return int(number)
    return number
