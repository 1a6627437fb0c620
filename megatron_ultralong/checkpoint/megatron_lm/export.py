"""A Hugging Face directory as a checkpoint of Megatron-LM, in its torch_dist format: tensor by tensor, on any
number of ranks.

OUT has `release/` (Megatron's files; Megatron-LM's name for weights without optimizer), the file that names
it, `hf/` (config, tokenizer and licence), and the model's arguments as text.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import convert, exported_weights, shard_writer, sharded
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf.assets import copy_assets
from megatron_ultralong.checkpoint.hf.reader import HFReader
from megatron_ultralong.checkpoint.hf.writer import check_output
from megatron_ultralong.checkpoint.megatron_lm import arguments, rope
from megatron_ultralong.config import Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks

ARGUMENTS = "megatron_arguments.txt"


def export_megatron(
    folder: Path,
    out: Path,
    ranks: Ranks,
    parallel: Parallel,
    target_tp: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Path, list[str]]:
    """Write the HF directory `folder` as a checkpoint of Megatron-LM, `out`; return it, and what its user
    should know, in lines. Every rank calls it.

    target_tp: tensor parallel ranks of Megatron-LM, by which it pads the vocabulary. dtype: as in
    `convert.import_hf`. UserError, on every rank, where Megatron-LM cannot express the model, or `out` is in
    use or cannot be written; `out` then does not exist.
    """
    base = hf_config.read_config(folder)
    values = arguments.of_model(base.model, base.max_position, target_tp)
    rope_values, notes = rope.arguments(base.rope, base.model.head_dim, base.max_position)
    values = {**rope_values, **values}
    rows = values["padded_vocab_size"]
    if rows % ranks.tp:
        raise UserError(f"--tp {ranks.tp} does not divide the padded vocabulary of {rows}; choose another")
    reader = HFReader(folder, base.model)
    try:
        with _staged(out, ranks) as staging:
            agreement.on_main_rank((staging / "release").mkdir)
            chunk = exported_weights.build(replace(base.model, vocab_size=rows), base.rope, ranks, parallel)
            common = _common_state(values, target_tp)
            with convert.weights_of(reader, chunk, ranks, dtype, rows) as weights:
                state = sharded.state_dict([chunk])
                _add_extra_states(state["model"])
                shards = shard_writer.Shards(
                    staging / "release",
                    out,
                    {**common, **state},
                    base.model.vocab_size,
                    copied=False,
                    values=weights,
                )
                agreement.on_every_rank(shards.write)
            shards.finish()
            agreement.on_main_rank(lambda: _add_files(staging, folder, common, values))
    finally:
        reader.close()
    return out, [*reader.notes(), *notes]


def _common_state(values: dict[str, Any], target_tp: int) -> dict[str, Any]:
    """What Megatron-LM's training loop stores beside the tensors."""
    return {
        "args": arguments.stored(values, target_tp),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        # How the names of tensors are formed; read before a model's own state dict is made.
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _add_extra_states(state: dict[str, Any]) -> None:
    """Add the empty `_extra_state` of those modules that have one with TransformerEngine only: Megatron-LM
    does not load a checkpoint that lacks one of its model's."""
    end = "self_attention.linear_proj._extra_state"
    for name, linear in list(state.items()):
        if not name.endswith(end):
            continue
        norms = [
            module
            for module in ("q_layernorm", "k_layernorm")
            if name.replace(end, f"self_attention.{module}.weight") in state
        ]
        for module in ("core_attention", *norms):
            state[name.replace("linear_proj", module)] = replace(
                linear, key=linear.key.replace("linear_proj", module)
            )
    norm = "decoder.final_layernorm"
    if f"{norm}.weight" in state:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        replica = state[f"{norm}.weight"].replica_id
        state[f"{norm}._extra_state"] = ShardedObject(f"{norm}._extra_state", None, (1,), (0,), replica)


# ---- files -------------------------------------------------------------------------------------


@contextmanager
def _staged(out: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a hidden folder next to `out`, the same on every rank, which becomes `out` when the block ends
    without an exception and is removed otherwise."""
    lock: list[int] = []
    staging = agreement.on_main_rank(lambda: _begin(out, lock))
    try:
        with atomic_files.under_final_name(staging, out):
            yield staging
            agreement.on_main_rank(lambda: _publish(staging, out))
    finally:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock.pop())


def _begin(out: Path, lock: list[int]) -> Path:
    """Create and lock the hidden folder; the lock is added to `lock`."""
    check_output(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pattern = atomic_files.staging_pattern(out)
        convert.print_notes(atomic_files.remove_abandoned(out.parent, pattern, f"export to {out}"))
        staging = atomic_files.staging_folder(out)
        lock.append(atomic_files.lock_folder(staging))
    except OSError as error:
        raise atomic_files.cannot_write(f"--output {out}", error) from None
    return staging


def _add_files(staging: Path, folder: Path, common: dict[str, Any], values: dict[str, Any]) -> None:
    """Write everything besides the tensors."""
    try:
        file = staging / "release" / "common.pt"
        if not file.exists():
            # Newer releases of Megatron-Core write it among the tensors, where older ones do not find it.
            pickled = io.BytesIO()  # torch has errors of its own for a disk that is full
            torch.save(common, pickled)
            file.write_bytes(pickled.getvalue())
        copy_assets(folder, staging / "hf", skip=("README.md",))
        (staging / ARGUMENTS).write_text("\n".join(arguments.command_line(values)) + "\n")
        (staging / "latest_checkpointed_iteration.txt").write_text("release")
    except OSError as error:
        raise atomic_files.cannot_write(str(staging), error) from None


def _publish(staging: Path, out: Path) -> None:
    check_output(out)  # again: it may have been filled meanwhile
    try:
        atomic_files.publish(staging, out)
    except OSError as error:
        raise atomic_files.cannot_write(f"--output {out}", error) from None
