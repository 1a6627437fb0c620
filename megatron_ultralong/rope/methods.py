"""The RoPE methods by `rope.type`, and their settings as plain values.

To add a method: a file with its dataclass, and a line in `_CLASSES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope, ScaledRope
from megatron_ultralong.rope.clex import CLEX
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.llama3 import Llama3
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.ntk import NTK, DynamicNTK
from megatron_ultralong.rope.plain import ChangedBase, Unscaled
from megatron_ultralong.rope.yarn import YaRN

_CLASSES: tuple[type[Rope], ...] = (
    Unscaled,
    ChangedBase,
    Linear,
    NTK,
    DynamicNTK,
    Llama3,
    YaRN,
    LongRoPE,
    CLEX,
)
METHODS: dict[str, type[Rope]] = {kind.type: kind for kind in _CLASSES}
HF_METHODS: dict[str, type[Rope]] = {kind.hf_type: kind for kind in _CLASSES if kind.hf_type}
"""By `rope_type` of config.json."""


def settings_of(kind: type[Rope]) -> tuple[str, ...]:
    """Names of a method's settings, without `type`."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.name != "type")


def from_values(values: Mapping[str, Any], ignore_others: bool = False) -> Rope:
    """Build a method from plain values, `type` among them: JSON, or settings of the command line.

    ignore_others: ignore settings of other methods, which run.json of format 1 states for every method.
    UserError for an unknown type or a setting that the method does not have.
    """
    values = dict(values)
    kind = values.pop("type", "")
    if kind not in METHODS:
        raise UserError(f"rope.type={kind}: choose one of {', '.join(METHODS)}")
    for name in values:
        if name not in settings_of(METHODS[kind]):
            owners = [other for other in METHODS if name in settings_of(METHODS[other])]
            if not owners:
                raise UserError(f"rope.{name}: no method has this setting")
            if not ignore_others:
                raise UserError(
                    f"rope.{name} is a setting of rope.type={' or '.join(owners)}; rope.type={kind} has "
                    f"{', '.join(settings_of(METHODS[kind]))}"
                )
    own: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in settings_of(METHODS[kind])
    }
    return METHODS[kind](**own)


def differences(stated: Rope, stored: Rope) -> list[str]:
    """Settings of `stated` that `stored` does not have, apart from those that `stated` leaves open (None)."""
    if type(stated) is not type(stored):
        return ["type"]
    return [
        f.name
        for f in dataclasses.fields(stated)
        if f.compare and getattr(stated, f.name) not in (None, getattr(stored, f.name))
    ]


def follow_run(stored: Rope, stated: Rope | None) -> Rope:
    """Return a stored RoPE with those settings of the run that trains it further that any run may change:
    those that `differences` leaves out."""
    if type(stated) is not type(stored):
        return stored
    free = {f.name: getattr(stated, f.name) for f in dataclasses.fields(stored) if not f.compare}
    return dataclasses.replace(stored, **free)


def resolve(stated: Rope | None, loaded: Rope, loaded_length: int, length: int) -> Rope:
    """Choose the RoPE of a run on sequences of `length` tokens from a loaded model.

    stated: the run's own; None = none stated. loaded_length: tokens that the loaded weights can read, by
    their RoPE or by their training. Where no factor is stated, the loaded RoPE is kept if it reaches
    `length`; otherwise the factor is length / original length, which replaces the loaded model's scaling (the
    method too, if one is stated, or the paper's YaRN for an unscaled model). UserError where a stated method
    would be ignored.
    """
    if stated is None:
        if length <= loaded_length or loaded.depends_on_length():
            return loaded
        if loaded.type == "theta":
            raise UserError(
                f"train.seq_length={length} is longer than the {loaded_length:,} tokens of the loaded model, whose base "
                f"was chosen for them ({loaded.describe()}); set rope.type and its settings"
            )
        if isinstance(loaded, ScaledRope):
            return dataclasses.replace(loaded, factor=length / loaded.original())
        theta, original = loaded.base()
        return YaRN(theta=theta, original_length=original, factor=length / original)
    if isinstance(stated, ScaledRope) and stated.factor is None and length <= loaded_length:
        if not differences(stated, loaded):
            return follow_run(loaded, stated)
        raise UserError(
            f"rope.type={stated.type} without rope.factor: train.seq_length={length} is within the "
            f"{loaded_length:,} tokens of the loaded model ({loaded.describe()}); set rope.factor, or leave out "
            "rope.type to keep its RoPE"
        )
    return stated.for_length(loaded, length)


def same_maths(a: Rope, b: Rope, head_dim: int) -> bool:
    """Whether two settings rotate identically, to the last bit: for example `llama3`, and `yarn` over
    rotations without temperature."""
    import torch

    original = max(a.original(), b.original())
    lengths = [1]
    if a.depends_on_length() or b.depends_on_length():
        lengths = [1, original, original + 1, 4 * original]
    for length in lengths:
        (frequencies_a, factor_a), (frequencies_b, factor_b) = (
            rope.inverse_frequencies(head_dim, length) for rope in (a, b)
        )
        if not torch.equal(frequencies_a, frequencies_b) or factor_a != factor_b:
            return False
    return True


def report(rope: Rope, head_dim: int, length: int) -> str:
    """One line with the frequencies that are really used in sequences of `length` tokens: the first, those
    that are neither unscaled nor the last one's ratio, the last, and the attention factor."""
    frequencies, multiplier = rope.inverse_frequencies(head_dim, length)
    theta = rope.base()[0]
    plain = Unscaled(theta=theta).inverse_frequencies(head_dim)[0]
    ratios = [round(x, 4) for x in (plain.double() / frequencies.double()).tolist()]
    ramp = [i for i, ratio in enumerate(ratios) if ratio not in (1.0, ratios[-1])]
    parts = [f"index 0: {frequencies[0]:.6g} rad/position (unscaled / {ratios[0]:g})"]
    if ramp:
        first, last = ramp[0], ramp[-1]
        parts.append(f"ramp {first}-{last}: / {ratios[first]:g} to / {ratios[last]:g}")
    parts.append(f"index {len(ratios) - 1}: {frequencies[-1]:.6g} (/ {ratios[-1]:g})")
    return f"{rope.describe()}; {', '.join(parts)}; attention factor {multiplier:.6g}"
