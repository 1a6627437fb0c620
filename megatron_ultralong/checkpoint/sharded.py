"""Sharded checkpoints in Megatron's dist_checkpointing format, readable under any layout; saving.py writes
them.

A run directory contains `iter_0000100/` folders: Megatron's shards, `run.json` (training_state.py) and `hf/`
(config, tokenizer and licence of the base model). A folder is written under a hidden name and renamed when
all ranks are done, so each `iter_*` was complete when it was written. What has been damaged since is found by
its checksums (integrity.py, tensor_sums.py). `latest_checkpointed_iteration.txt` is kept for Megatron-LM's
own tools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import integrity, rope_network, tensor_sums, torch_index
from megatron_ultralong.errors import UserError, first_line
from megatron_ultralong.rope.clex import TrainedCLEX
from megatron_ultralong.runtime import agreement

# The complete optimizer state passes through the host of data-parallel rank 0, so a save takes no GPU memory.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def state_dict(
    chunks: list[torch.nn.Module], optimizer: Any = None, *, loading: bool = False, base: bool = False
) -> dict[str, Any]:
    """Megatron's sharded state dict of the model chunks and, if given, the optimizer.

    With LoRA it has what is trained only; with `base` all weights but the adapters.
    """
    from megatron_ultralong.model.adapters import is_adapter
    from megatron_ultralong.model.llama import unwrap

    state: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        parts = complete_state(chunk)
        if unwrap(chunk).has_adapters:
            parts = {
                name: parts[name]
                for name, parameter in unwrap(chunk).named_parameters()
                if (not is_adapter(name) if base else parameter.requires_grad)
            }
        state[_chunk_key(chunks, i)] = parts
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=_metadata()
        )
    return state


def complete_state(chunk: torch.nn.Module) -> dict[str, Any]:
    """Megatron's sharded state dict of all parameters of a chunk."""
    from megatron_ultralong.model.llama import unwrap

    # Some releases of Megatron-Core modify the metadata in place, so each call gets its own.
    return unwrap(chunk).sharded_state_dict(metadata=_metadata())


def _chunk_key(chunks: list[torch.nn.Module], i: int) -> str:
    return f"model{i}" if len(chunks) > 1 else "model"


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def stored_tensors(checkpoint: Path) -> dict[str, Any]:
    """Name -> metadata (global_shape, dtype) of a checkpoint's tensors. UserError where Megatron cannot read
    it."""
    from megatron.core import dist_checkpointing

    torch_index.read(checkpoint)
    try:
        return dist_checkpointing.load_tensors_metadata(str(checkpoint))
    except Exception as error:  # whatever a damaged checkpoint makes torch or Megatron raise
        raise UserError(
            f"{checkpoint} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None


# ---- loading -----------------------------------------------------------------------------------


def load(path: Path, chunks: list[torch.nn.Module], optimizer: Any = None, *, base: bool = False) -> None:
    """Fill `chunks` (and the optimizer) from the checkpoint at `path`, written under any layout; which
    weights, with LoRA, as in `state_dict`. The network of a RoPE method keeps its weights where the
    checkpoint has none.

    UserError, on every rank, names the first tensor that is missing, extra or of another shape (only
    `_extra_state` may differ), or whose values are not those that were saved. The checkpoint's files are not
    verified here: see `run_directory.resolve_verified`.
    """
    from megatron.core.dist_checkpointing import serialization

    from megatron_ultralong.checkpoint import optimizer_state
    from megatron_ultralong.model.llama import unwrap

    if optimizer is not None:
        optimizer_state.before_load(optimizer)
    requested = state_dict(chunks, optimizer, loading=True, base=base)
    vocab_size = unwrap(chunks[0]).vocab_size
    check(path, requested, vocab_size, with_optimizer=optimizer is not None)
    sums = tensor_sums.Sums(vocab_size)
    strategy = sums.while_loading(serialization.get_default_load_sharded_strategy(str(path)))
    state = load_state(requested, path, strategy)
    compare(path, sums)
    for i, chunk in enumerate(chunks):
        tensors = {k: v for k, v in state[_chunk_key(chunks, i)].items() if not k.endswith("_extra_state")}
        missing, unexpected = unwrap(chunk).load_state_dict(tensors, strict=False)
        if unwrap(chunk).has_adapters:  # a part of the weights is loaded
            missing = [name for name in missing if name in requested[_chunk_key(chunks, i)]]
        unmatched = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        assert not unmatched, unmatched
    rope = unwrap(chunks[0]).rotary.rope
    if isinstance(rope, TrainedCLEX):
        agreement.on_every_rank(lambda: rope_network.copy_weights_if_stored(path, rope.weights))
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        optimizer_state.after_load(optimizer)


def load_state(
    requested: dict[str, Any], path: Path, strategy: Any, *, complete: bool = True
) -> dict[str, Any]:
    """Load what Megatron's sharded state dict `requested` asks for; every rank calls it. strategy: Megatron's
    for loading. complete: the ranks ask for all parts of each tensor, which is checked. UserError, on every
    rank, where that fails."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        return dist_checkpointing.load(
            requested,
            str(path),
            strategy,
            validate_access_integrity=complete,
            strict=StrictHandling.IGNORE_ALL,
        )
    except CheckpointException as error:  # no subclass of Exception
        first = next(iter(error.failures.values()), (error, None))[0]
        raise UserError(f"{path} cannot be read: {type(first).__name__}: {first_line(first)}") from None


def compare(path: Path, sums: tensor_sums.Sums) -> None:
    """UserError, on every rank, where a loaded tensor is not the one that was saved."""
    loaded = sums.on_all_ranks()
    stored = agreement.on_main_rank(lambda: integrity.read(path))
    name = None if stored is None else tensor_sums.first_difference(stored.tensors, loaded)
    if name is not None:
        raise UserError(
            f"{path}: the values of {name} are not those that were saved; a fault of memory, storage or network"
        )


def check(path: Path, requested: dict[str, Any], vocab_size: int, with_optimizer: bool) -> None:
    """Compare names and global shapes before anything is read: Megatron silently pads or cuts a vocabulary
    that differs."""
    tensors = agreement.on_every_rank(lambda: stored_tensors(path))
    stored = {name: tuple(tensor.global_shape) for name, tensor in tensors.items()}
    needed = {
        name: leaf for rank in agreement.gather(_global_shapes(requested)) for name, leaf in rank.items()
    }
    for name, (shape, padded) in needed.items():
        if name not in stored:
            raise UserError(f"{path} lacks the tensor {name}")
        if padded and not name.startswith("optimizer.") and not _pads(stored[name][0], vocab_size):
            raise UserError(
                f"{path}: {name} has {stored[name][0]} rows, which is not a padded size of the model's vocabulary "
                f"of {vocab_size}"
            )
        if (shape[1:] != stored[name][1:]) if padded else (shape != stored[name]):
            raise UserError(
                f"{path}: {name} has shape {list(stored[name])}, but the model needs {list(shape)}"
            )
    for name in stored:
        is_optional = name.endswith("_extra_state") or (name.startswith("optimizer.") and not with_optimizer)
        if name not in needed and not is_optional:
            raise UserError(f"{path} has the tensor {name}, which the model does not have")


def _global_shapes(requested: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (global shape, whether its rows may be padded differently) of this rank's tensors."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}
    for leaf in nested_values(requested):
        for tensor in nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]:
            if isinstance(tensor, ShardedTensor):
                shapes[tensor.key] = tuple(tensor.global_shape), tensor.allow_shape_mismatch
    return shapes


def _pads(rows: int, vocab_size: int) -> bool:
    """Whether `rows` is `vocab_size` padded for some tensor parallel size, as here (to a multiple of TP) or
    in Megatron-LM (to a multiple of 128 x TP)."""
    # With arbitrary sizes, a small vocabulary would fit almost any number of rows.
    sizes = (*range(1, 17), 32, 64)
    return any(rows == -(-vocab_size // size) * size for tp in sizes for size in (tp, 128 * tp))
