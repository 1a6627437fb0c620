"""max_position_embeddings of an export: the number of tokens that clients let the model read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import ScaledRope
from megatron_ultralong.rope.hf_block import LLAMA_MAX_POSITION, HFBlock
from megatron_ultralong.rope.hf_config import from_hf
from megatron_ultralong.rope.methods import same_maths
from megatron_ultralong.rope.ntk import NTK


def max_position(state: TrainingState, base: Mapping[str, Any]) -> int:
    """max_position_embeddings of an export, tokens. base: config.json of the base model; empty = unknown.

    - Where clients compute the trained frequencies with one value only, that one.
    - RoPE of the base model: the base model's value, or the trained length if that is larger.
    - Another RoPE: factor x original length where it has a factor (or the length of a run that was allowed to
      train past that), even below the base model's value; otherwise, and for ntk, the trained length.
    """
    rope, stated, run = state.rope, _base_length(base), state.stored_run()
    exact = rope.exact_max_position()
    if exact is not None:
        return exact
    covered = 0
    if isinstance(rope, ScaledRope) and not isinstance(rope, NTK):
        covered = rope.covered_length() or 0
    if run is None:  # imported, not trained
        return stated or max(covered, state.max_length) or LLAMA_MAX_POSITION
    if has_rope_of(state, base):
        return max(stated, state.max_length, run.train.seq_length)
    if covered:
        return max(covered, run.train.seq_length)
    return max(state.max_length, run.train.seq_length)


def note(value: int, base: Mapping[str, Any]) -> list[str]:
    """A line for an export whose max_position_embeddings, `value`, is below that of its base model."""
    stated = _base_length(base)
    if value >= stated:
        return []
    return [
        f"max_position_embeddings is {value:,}, below the base model's {stated:,}, because its RoPE was changed; train "
        "with a larger rope.factor or train.seq_length for more"
    ]


def has_rope_of(state: TrainingState, base: Mapping[str, Any]) -> bool:
    """Whether the model rotates as config.json of its base model, `base`, says, to the last bit."""
    if not _base_length(base):
        return False
    try:
        return same_maths(from_hf(base), state.rope, state.model.head_dim)
    except UserError:  # a RoPE that this program cannot train, hence another one
        return False


def _base_length(base: Mapping[str, Any]) -> int:
    """The base model's value; 0 where it states none."""
    return HFBlock(base, {}, "").max_position() if base.get("max_position_embeddings") else 0
