"""Checksums of tensors that do not depend on how they are sharded: computed from memory while a checkpoint is
saved, and again from memory after it was loaded, under any layout.

The sum of a tensor is, modulo 2^64, the sum over its elements of their bits, as a signed integer, times an
odd number that depends on the element's place in the complete tensor. Each shard adds its part. A single
changed bit always changes the sum, since an odd number times a power of two below 2^64 is not 0 modulo 2^64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.runtime import agreement

_A, _B = 0x9E3779B97F4A7C15 - (1 << 64), 0x632BE59BD9B4E019
"""The factor of element i is (A i + B) | 1; odd constants of random bits, as signed 64-bit integers."""
_CHUNK = 1 << 20
"""Elements at a time; three temporaries of 8 bytes each."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local_sum(data: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], rows: int | None = None) -> int:
    """The part of a shard in its tensor's sum, 0 to 2^64 - 1.

    data: the shard, any dtype. offset: indices of its first element in the complete tensor. shape: of the
    complete tensor; its first dimension does not matter. rows: count only the first so many of the complete
    tensor (others are padding); None = all.
    """
    width = shape[-1] if shape else 1
    columns = data.shape[-1] if data.dim() else 1
    flat = data.detach().reshape(-1, columns)
    starts = _row_starts(tuple(data.shape[:-1]), offset[:-1], shape, data.device)
    if rows is not None:
        first = starts // (width if len(shape) < 2 else _size(shape[1:]))
        if len(shape) == 1:
            flat = flat[:, : max(0, rows - offset[0])]
            columns = flat.shape[-1]
        else:
            kept = int((first < rows).sum())  # rows are in ascending order
            flat, starts = flat[:kept], starts[:kept]
    if not flat.numel():
        return 0
    places = torch.arange(columns, device=data.device) + (offset[-1] if offset else 0)
    by_column = places * _A
    total = 0
    step = max(1, _CHUNK // columns)
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step].contiguous()
        factors = (starts[begin : begin + step] * _A + _B)[:, None] + by_column
        factors.bitwise_or_(1)
        bits = part.view(_BITS[part.element_size()]).to(torch.int64)
        total += int(factors.mul_(bits).sum())
    return total % (1 << 64)


def _row_starts(
    rows: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Place of each row's first column in the complete, flattened tensor, without the column offset."""
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    # The leading dimensions of `shape` that a shard does not have (stacked layers) have one index.
    for d, first in enumerate(offset):
        own = d - (len(offset) - len(rows))
        indices = torch.arange(rows[own] if own >= 0 else 1, device=device) + first
        starts = (starts[:, None] + (indices * _size(shape[d + 1 :]))[None, :]).reshape(-1)
    return starts


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


class Sums:
    """The sums of a checkpoint's tensors, collected while Megatron saves or loads it."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._mine: dict[str, tuple[str, int]] = {}

    def while_loading(self, strategy: Any) -> Any:
        """Megatron's strategy for loading, which then adds this rank's part of each tensor that it loads."""
        hooked = copy.copy(strategy)

        def load(state: Any, *arguments: Any, **named: Any) -> Any:
            loaded = strategy.load(state, *arguments, **named)
            agreement.on_every_rank(lambda: self.add_all(_pairs(state, loaded)))
            return loaded

        hooked.load = load
        return hooked

    def on_all_ranks(self) -> dict[str, str]:
        """Tensor -> "dtype:sum" of the complete tensors, on every rank; every rank calls it."""
        totals: dict[str, tuple[str, int]] = {}
        for part in agreement.gather(self._mine):
            for name, (dtype, value) in part.items():
                totals[name] = dtype, (totals.get(name, ("", 0))[1] + value) % (1 << 64)
        return {name: f"{dtype}:{value:016x}" for name, (dtype, value) in totals.items()}

    def add_all(self, pairs: Iterable[tuple[Any, Tensor]]) -> None:
        """Add this rank's part of each of Megatron's sharded tensors, given with its values."""
        for tensor, values in pairs:
            self._add(tensor, values)

    def _add(self, tensor: Any, values: Tensor) -> None:
        from megatron.core.dist_checkpointing.mapping import is_main_replica

        if not is_main_replica(tensor.replica_id):
            return
        rows = self._vocab_size if tensor.allow_shape_mismatch else None
        part = local_sum(values, tuple(tensor.global_offset), tuple(tensor.global_shape), rows)
        _, before = self._mine.get(tensor.key, ("", 0))
        self._mine[tensor.key] = str(values.dtype).removeprefix("torch."), (before + part) % (1 << 64)


def first_difference(stored: dict[str, str], loaded: dict[str, str]) -> str | None:
    """The first tensor whose sum differs. Tensors that are stored in another dtype than they were loaded into
    are not compared."""
    for name, value in loaded.items():
        other = stored.get(name)
        if other is not None and other != value and other.partition(":")[0] == value.partition(":")[0]:
            return name
    return None


def sharded_tensors(state: Any) -> Iterator[Any]:
    """The sharded tensors of Megatron's state dict."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return (leaf for leaf in nested_values(state) if isinstance(leaf, ShardedTensor))


def saved_tensors(state: Any) -> Iterator[Any]:
    """The sharded tensors of a state dict that this rank saves."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    return (leaf for leaf in sharded_tensors(state) if is_main_replica(leaf.replica_id))


def _pairs(state: Any, loaded: Any) -> Iterator[tuple[Any, Tensor]]:
    """Sharded tensors of a state dict and what was loaded for them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(state, ShardedTensor):
        yield state, loaded
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _pairs(value, loaded.get(key))
    elif isinstance(state, (list, tuple)):
        for value, other in zip(state, loaded, strict=True):
            yield from _pairs(value, other)
