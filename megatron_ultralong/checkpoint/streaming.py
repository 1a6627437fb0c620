"""Sharded checkpoints written and read tensor by tensor: a conversion has a few tensors in memory, not the
model.

The model's parameters have shapes and dtypes but no values (torch's meta device). What is written is asked
for when its turn comes; what is read is handed on and dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.checkpoint import sharded, tensor_sums
from megatron_ultralong.config import Model
from megatron_ultralong.model import llama, weight_mapping
from megatron_ultralong.runtime import agreement

BATCH_BYTES = 128 << 20
"""Bytes of parameters that are read together."""


def parameters(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of a chunk by Megatron's own names, with layer numbers of the complete model."""
    return {weight_mapping.canonical(name): p for name, p in llama.named_parameters(chunk).items()}


def drop_values(chunk: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Move a chunk to the meta device. dtypes: of its parameters by name (`parameters`)."""
    chunk.to_empty(device=torch.device("meta"))
    for name, parameter in parameters(chunk).items():
        parameter.data = parameter.data.to(dtypes[name])


class Source:
    """Values of a chunk on the meta device, read when they are written."""

    def __init__(self, chunk: torch.nn.Module, read: Callable[[str], Tensor]) -> None:
        """read: returns a parameter by its name (`parameters`): this rank's shard, contiguous, on the CPU."""
        # A view, like one half of the MLP's first matrix, has the storage of its parameter.
        self._names = {_storage(parameter): name for name, parameter in parameters(chunk).items()}
        self._read = read

    def values(self, view: Tensor) -> Tensor:
        """The values of a view of one of the chunk's parameters, contiguous."""
        whole = self._read(self._names[_storage(view)])
        values = whole.as_strided(view.size(), view.stride(), view.storage_offset())
        # The writer stores all of a view's storage.
        return values.clone() if values.numel() != whole.numel() else values


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class StoredParameters:
    """The parameters of a checkpoint. Iterating, once and on every rank to the end, yields (name, this
    rank's shard) for all of them in the model's order, in the dtype that is stored; None for those of other
    ranks."""

    def __init__(self, path: Path, chunk: torch.nn.Module, model: Model) -> None:
        """chunk: of `model`; it loses its values. UserError, on every rank, where the checkpoint does not
        fit."""
        # Name -> key of the state dict, which counts the layers of this rank only.
        names = dict(zip(parameters(chunk), dict(llama.unwrap(chunk).named_parameters()), strict=True))
        requested = sharded.state_dict([chunk], loading=True)
        sharded.check(path, requested, model.vocab_size, with_optimizer=False)
        stored = sharded.stored_tensors(path)
        mine = {name: stored[requested["model"][key].key].dtype for name, key in names.items()}
        self.dtypes: dict[str, torch.dtype] = {}
        """Of all parameters of the model, by name."""
        for part in agreement.gather(mine):
            self.dtypes |= part
        drop_values(chunk, mine)
        self._path, self._model, self._names = path, model, names
        self._state = sharded.state_dict([chunk], loading=True)["model"]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """UserError, on every rank, where a tensor cannot be read, and at the end where the values are not
        those that were saved."""
        from megatron.core.dist_checkpointing import serialization

        sums = tensor_sums.Sums(self._model.vocab_size)
        strategy = _allocating(serialization.get_default_load_sharded_strategy(str(self._path)))
        strategy = sums.while_loading(strategy)
        for batch in _batches(self._model):
            keys = {name: self._names[name] for name in batch if name in self._names}
            requested = {key: self._state.pop(key) for key in keys.values()}
            loaded = sharded.load_state(requested, self._path, strategy, complete=False)
            for name in batch:
                yield name, loaded.pop(keys[name]) if name in keys else None
        sharded.compare(self._path, sums)


def _batches(model: Model) -> Iterator[list[str]]:
    """The parameters of `model` in groups of about `BATCH_BYTES` as float32, the same on every rank."""
    batch: list[str] = []
    size = 0
    for name in weight_mapping.megatron_names(model):
        batch.append(name)
        size += 4 * prod(weight_mapping.shard_shape(name, model, 1))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _allocating(strategy: Any) -> Any:
    """Megatron's strategy for loading, which then allocates what it loads, and loads any part of a tensor.

    For layers that are stacked in one tensor Megatron wants all of a rank's, so each is requested as a part
    of an ordinary tensor with one more dimension.
    """
    hooked = copy.copy(strategy)

    def load(state: Any, *arguments: Any, **named: Any) -> Any:
        for leaf in tensor_sums.sharded_tensors(state):
            leaf.data = None
            leaf.local_shape = (1,) * leaf.prepend_axis_num + tuple(leaf.local_shape)
            leaf.stacked, leaf.prepend_axis_num = leaf.prepend_axis_num, 0
        return _unstacked(state, strategy.load(state, *arguments, **named))

    hooked.load = load
    return hooked


def _unstacked(state: Any, loaded: Any) -> Any:
    """What was loaded for `state`, each tensor without the dimensions that `_allocating` adds."""
    if isinstance(loaded, dict):
        return {key: _unstacked(state[key], value) for key, value in loaded.items()}
    if isinstance(loaded, list):
        return [_unstacked(part, value) for part, value in zip(state, loaded, strict=True)]
    return loaded.flatten(0, state.stacked) if getattr(state, "stacked", 0) else loaded
