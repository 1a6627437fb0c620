"""RoPE as Megatron-LM's arguments: the inverse of rope_sources/megatron_arguments.py, which reads back what
is written here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint.rope_sources import megatron_arguments
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.llama3 import Llama3
from megatron_ultralong.rope.plain import ChangedBase, Unscaled
from megatron_ultralong.rope.yarn import YaRN, mscale

_EXPRESSED = (
    "Megatron-LM's arguments can state: unscaled, with a whole theta; llama3 (YaRN over rotations without "
    "temperature) over 8192 positions with alpha 1 and beta 4; linear with a whole factor; yarn over dimensions"
)
_YARN_IS_NEW = (
    "--position-embedding-type yarn needs Megatron-LM of core 0.19 or newer; older releases do not hand its "
    "arguments to the model and stop"
)


def arguments(rope: Rope, head_dim: int, max_position: int) -> tuple[dict[str, Any], list[str]]:
    """Return Megatron-LM's RoPE arguments by their names in Python, all of them, and what their user should
    know, in lines. UserError where they cannot state `rope`."""
    stated = _stated(rope)
    values = {**megatron_arguments.NUMBERS, **megatron_arguments.FLAGS, "rotary_percent": 1.0, **stated}
    sizes = {"kv_channels": head_dim, "max_position_embeddings": max_position}
    source = megatron_arguments.read({**values, **sizes}, Path("Megatron-LM"))[0]
    if not _same(source.rope, rope, head_dim):
        raise _refused(rope)
    notes = list(source.notes)
    if values["position_embedding_type"] == "yarn":
        notes.append(_YARN_IS_NEW)
    return values, notes


def _stated(rope: Rope) -> dict[str, Any]:
    """The arguments that do not have their defaults."""
    theta = rope.base()[0]
    if theta != int(theta):  # an int for argparse
        raise _refused(rope)
    values: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(theta)}
    if isinstance(rope, (Unscaled, ChangedBase)):
        return values
    if isinstance(rope, Linear) and rope.scale() == int(rope.scale()):  # an int for argparse
        return {**values, "rotary_seq_len_interpolation_factor": int(rope.scale())}
    if isinstance(rope, YaRN) and rope.ramp == "dimension":
        return values | _yarn(rope)
    if isinstance(rope, (Llama3, YaRN)) and rope.multiplier() == 1:
        return {**values, "use_rope_scaling": True, "rope_scaling_factor": float(rope.scale())}
    raise _refused(rope)


def _yarn(rope: YaRN) -> dict[str, Any]:
    numerator, denominator = _mscales(rope)
    return {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": float(rope.scale()),
        "yarn_original_max_position_embeddings": rope.original(),
        "yarn_beta_fast": float(rope.beta),
        "yarn_beta_slow": float(rope.alpha),
        "mscale": numerator,
        "mscale_all_dim": denominator,
        "yarn_correction_range_round_to_int": rope.truncate,
    }


def _mscales(rope: YaRN) -> tuple[float, float]:
    """(mscale, mscale_all_dim): the attention factor is the quotient of 0.1 x each x ln(factor) + 1."""
    wanted, unit = rope.multiplier(), mscale(rope.scale()) - 1
    if wanted == 1:
        return 1.0, 1.0
    if wanted == 1 + unit:
        return 1.0, 0.0
    if unit == 0:  # factor 1, at which it is always 1
        raise _refused(rope)
    return ((wanted - 1) / unit, 0.0) if wanted > 1 else (0.0, (1 / wanted - 1) / unit)


def _same(a: Rope, b: Rope, head_dim: int) -> bool:
    """Whether both rotate alike: frequencies to the last bit, the attention factor but for its rounding."""
    import torch

    (frequencies_a, factor_a), (frequencies_b, factor_b) = (
        rope.inverse_frequencies(head_dim) for rope in (a, b)
    )
    return torch.equal(frequencies_a, frequencies_b) and math.isclose(factor_a, factor_b, rel_tol=1e-12)


def _refused(rope: Rope) -> UserError:
    return UserError(f"Megatron-LM cannot express this model's RoPE ({rope.describe()}); {_EXPRESSED}")
