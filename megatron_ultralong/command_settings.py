"""Settings from a command line: `--set section.name=value` applied to a run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.config import RENAMED, Run, check_reach, sections
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, ScaledRope
from megatron_ultralong.rope.methods import METHODS, from_values, settings_of


def of_stage(settings: Sequence[str], stage: str, recipe: str, stages: Sequence[str]) -> list[str]:
    """The settings of one of a recipe's stages: those without a stage, and its own (STAGE:KEY=VALUE).
    UserError for an unknown stage."""
    own = []
    for setting in settings:
        name, colon, rest = setting.partition(":")
        if not colon or "=" in name:
            own.append(setting)
            continue
        if name not in stages:
            raise UserError(f"--set {setting}: {recipe} has no stage {name}; its stages: {', '.join(stages)}")
        if name == stage:
            own.append(rest)
    return own


def override(run: Run, settings: list[str]) -> Run:
    """Apply `--set` settings (`a.b=value`) to `run`, all at once, and check the result.

    Values: numbers (integers may end in K or M, 1024-based), true/false, `none`, names. UserError for an
    unknown key, with the nearest valid one, and for a value of the wrong type.
    """
    hints = type_hints()
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"--set {setting}: expected key=value")
        _check_renamed(key, text.strip())
        if key not in hints:
            raise UserError(f"--set {key}: no such setting; did you mean {_nearest(key, sorted(hints))}?")
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = _parse(key, text.strip(), hints[key])
    new: dict[str, Any] = {}
    new_length = changes.get("train", {}).get("seq_length", run.train.seq_length)
    rope = _change_rope(run, changes.pop("rope", {}), new_length)
    if rope is not run.rope:  # equal settings may still differ in allow_short
        new["rope"] = rope
    for section, values in changes.items():
        old = getattr(run, section)
        if old is None and section == "model":
            raise UserError(
                f"--set model.{next(iter(values))}: recipe {run.name} takes its model from --load-hf or --load"
            )
        new[section] = (
            dataclasses.replace(old, **values) if old is not None else sections()[section](**values)
        )
    if settings:  # the notes describe published values, which these settings are not
        rescaled = _factor(rope) != _factor(run.rope) and not any(
            x.partition("=")[0].strip() == "rope.factor" for x in settings
        )
        shown = [*settings, f"rope.factor={_factor(rope):g}"] if rescaled and _factor(rope) else settings
        new["notes"] = f"{run.notes} Changed for this run: {', '.join(shown)}.".strip()
        keys = {setting.partition("=")[0].strip() for setting in settings}
        new["unpublished"] = tuple(key for key in run.unpublished if key not in keys)
    changed = dataclasses.replace(run, **new)
    if isinstance(rope, ScaledRope) and rope.factor and rope.original_length:
        check_reach(rope, rope.covered_length(), new_length)
    return changed


_OTHER_NAMES = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "lr_warmup_iters": "warmup",
    "clip_grad": "clip",
    "max_norm": "clip",
    "max_grad_norm": "clip",
    "adam_eps": "eps",
    "tensor_model_parallel_size": "tp",
    "tensor_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "pipeline_parallel_size": "pp",
    "context_parallel_size": "cp",
    "data_parallel_size": "dp",
    "context_parallel_degree": "cp",
    "pipeline_parallel_degree": "pp",
    "tensor_parallel_degree": "tp",
    "seq_len": "seq_length",
    "max_steps": "iterations",
    "steps": "iterations",
    "train_iters": "iterations",
    "micro_batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "global_batch_size": "global_batch",
    "save_steps": "save_every",
    "save_interval": "save_every",
    "eval_steps": "eval_every",
    "eval_interval": "eval_every",
    "rope_theta": "theta",
    "num_layers": "layers",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "num_key_value_heads": "kv_heads",
    "ffn_hidden_size": "ffn_size",
    "intermediate_size": "ffn_size",
}
"""Names that Megatron-LM, torchtitan and transformers give to settings, and ours, without the section."""


def _nearest(key: str, known: Sequence[str]) -> str:
    """The setting of `known` that `key` probably means: by another trainer's name for it, or by spelling."""
    name = key.rpartition(".")[2].replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    same = [one for one in known if one.rpartition(".")[2] == name]
    if not key.startswith("rope."):  # a method's own settings are rarely meant: clex has a learning rate
        same = [one for one in same if not one.startswith("rope.")] or same
    return difflib.get_close_matches(key, same or known, n=1, cutoff=0.0)[0]


def _change_rope(run: Run, values: dict[str, Any], seq_length: int) -> Rope | None:
    """The RoPE of `run` with settings changed, for sequences of `seq_length` tokens. A new method keeps what
    it shares with the recipe's; a factor that is not set follows the length."""
    old = run.rope
    if old is None and not values:
        return None
    kind = values.get("type", old.type if old is not None else "")
    if not kind:
        raise UserError(
            f"--set rope.{next(iter(values))}: recipe {run.name} keeps the RoPE of the loaded model; set rope.type too"
        )
    kept: dict[str, Any] = {"theta": None, "original_length": None}
    if old is not None:
        kept = {f.name: getattr(old, f.name) for f in dataclasses.fields(old) if f.name != "type"}
    if old is None or kind != old.type:
        # A changed base is always stated, and the factor of dynamic scaling is another quantity.
        apart = {"theta": ("theta",), "dynamic": ("factor",)}
        dropped = {*apart.get(kind, ()), *(("factor",) if old is not None and old.type == "dynamic" else ())}
        if old is not None and old.type == "theta":
            kept["theta"] = None  # that of the loaded model, which the new method scales
        kept = {
            name: value
            for name, value in kept.items()
            if name in settings_of(METHODS[kind]) and name not in dropped
        }
    rope = from_values({**kept, **values, "type": kind})
    if isinstance(rope, ScaledRope) and rope.factor and "factor" not in values:
        factor = rope.factor * seq_length / run.train.seq_length
        if factor < 1:
            raise UserError(
                f"--set train.seq_length={seq_length}: shorter than the {rope.original_length} tokens before scaling, "
                f"so that rope.factor={rope.factor:g} cannot follow it; set rope.factor too"
            )
        rope = dataclasses.replace(rope, factor=rope.possible_factor(factor))
    return rope


def _factor(rope: Rope | None) -> float | None:
    return rope.factor if isinstance(rope, ScaledRope) else None


def _check_renamed(key: str, text: str) -> None:
    """UserError with the new form of an old setting."""
    if key not in RENAMED:
        return
    name, values = RENAMED[key]
    if name != key or text in values:
        raise UserError(f"--set {key}={text}: this setting is now {name}={values.get(text, text)}")


# ---- values ------------------------------------------------------------------------------------


def type_hints() -> dict[str, Any]:
    """The type of every setting of the command line, by `section.name`."""
    hints = {
        f"{section}.{f.name}": typing.get_type_hints(kind)[f.name]
        for section, kind in sections().items()
        for f in dataclasses.fields(kind)
    }
    for kind in METHODS.values():
        of_kind = typing.get_type_hints(kind)
        hints |= {f"rope.{name}": of_kind[name] for name in settings_of(kind)}
    return {**hints, "rope.type": Literal[tuple(METHODS)]}


def _parse(key: str, text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if text.lower() in ("none", "null") else _parse(key, text, kinds[0])
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            raise UserError(f"--set {key}={text}: choose one of {', '.join(choices)}")
        return text
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if typing.get_origin(kind) is Literal:
            return tuple(_parse(key, one.strip(), kind) for one in text.split(","))
        return _parse_numbers(key, text)
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--set {key}={text}: expected true or false")
        return text.lower() in ("true", "1", "yes")
    if hint is int:
        return parse_count(text, f"--set {key}")
    if hint is float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"--set {key}={text}: expected a number") from None
    return text


def _parse_numbers(key: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them, or the list in a JSON file."""
    found: Any = text.split(",")
    if text.endswith(".json"):
        try:
            found = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--set {key}={text}: cannot read the file ({error})") from None
        if not isinstance(found, list):
            raise UserError(f"--set {key}={text}: the file must hold a list of numbers")
    try:
        return tuple(float(x) for x in found)
    except (TypeError, ValueError):
        raise UserError(
            f"--set {key}={text}: expected numbers with commas, or a JSON file with a list"
        ) from None


def parse_count(text: str, what: str) -> int:
    """Parse a whole number with an optional K or M (x 1024, x 1024^2): "4096", "128K", "1M"."""
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    if not re.fullmatch(r"[0-9]+(_[0-9]+)*", digits):
        raise UserError(f"{what}={text}: expected a whole number, like 4096 or 128K")
    return int(digits) * scale
