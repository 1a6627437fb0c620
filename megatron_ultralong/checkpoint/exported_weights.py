"""The weights of an export, one of Megatron's parameters at a time: those of a checkpoint, or of a model with
the adapters of a checkpoint merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from megatron_ultralong.checkpoint import adapters, streaming
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf.reader import HFReader
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Memory, Model, Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.lora import Lora
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks


def build(
    model: Model, rope: Rope, ranks: Ranks, parallel: Parallel, lora: Lora | None = None
) -> torch.nn.Module:
    """The model with memory that is reserved, but neither used nor filled."""
    from megatron_ultralong.model import llama

    memory = Memory(offload="off")
    return llama.build(
        model, rope, ranks, parallel, memory, "bf16", transformer_engine=False, lora=lora or Lora()
    )[0]


class StoredWeights:
    """The weights of a checkpoint. Iterating, once and on every rank, yields (Megatron's name, shards in TP
    order on rank 0, none on the others)."""

    def __init__(self, checkpoint: Path, model: Model, rope: Rope, ranks: Ranks, parallel: Parallel) -> None:
        self._chunk, self._model, self._ranks = build(model, rope, ranks, parallel), model, ranks
        self._weights = streaming.StoredParameters(checkpoint, self._chunk, model)
        self.dtypes = self._weights.dtypes
        """By Megatron's names."""

    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        owners = _owners(list(streaming.parameters(self._chunk)), self._ranks)
        for name, shard in self._weights:
            shape = weight_mapping.shard_shape(name, self._model, self._ranks.tp)
            yield name, _gather(shard, owners[name], shape, self.dtypes[name], self._ranks)

    def final(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, by Hugging Face's name, as it is exported."""
        return tensor


class MergedWeights:
    """The weights of a model with adapters merged, as `StoredWeights`. Rank 0 reads the model."""

    def __init__(
        self, checkpoint: Path, state: TrainingState, folder: Path, ranks: Ranks, parallel: Parallel
    ) -> None:
        """UserError, on every rank, where the adapters were trained with another model."""
        config = hf_config.read_config(folder)
        for one in fields(Model):
            ours, theirs = getattr(state.model, one.name), getattr(config.model, one.name)
            if ours != theirs and one.name != "init_std":
                raise UserError(f"--base {folder}: {one.name} is {theirs}, but the adapters need {ours}")
        self._reader, self._model, self._ranks = HFReader(folder, state.model), state.model, ranks
        self.dtypes = self._reader.dtypes()
        self._check(checkpoint, state, folder, parallel)
        self._trained = adapters.read(checkpoint, state)

    def _check(self, checkpoint: Path, state: TrainingState, folder: Path, parallel: Parallel) -> None:
        run, ranks = state.stored_run(), self._ranks
        assert run is not None
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        chunk = build(state.model, state.rope, ranks, parallel, run.lora)
        streaming.drop_values(chunk, dict.fromkeys(streaming.parameters(chunk), dtype))
        source = streaming.Source(
            chunk, lambda name: self._reader.shard(name, ranks.tp_rank, ranks.tp, dtype)
        )
        if adapters.frozen_sum([chunk], source.values) != state.frozen_weights:
            raise UserError(
                f"--base {folder} is not the model that the adapters of {checkpoint} were trained with; give that one"
            )

    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        for name in weight_mapping.megatron_names(self._model):
            yield name, [self._reader.shard(name, 0, 1, self.dtypes[name])] if self._ranks.is_main else []
        self._reader.close()

    def final(self, name: str, tensor: Tensor) -> Tensor:
        return self._trained.merged(name, tensor)


def _owners(names: list[str], ranks: Ranks) -> dict[str, list[int]]:
    """Parameter name -> the ranks that hold its shards, in TP order. names: of this rank's parameters."""
    owners: dict[str, list[int]] = {}
    for rank, (tp_rank, held) in enumerate(agreement.gather((ranks.tp_rank, names))):
        for name in held:
            owners.setdefault(name, [0] * ranks.tp)[tp_rank] = rank
    return owners


def _gather(
    mine: Tensor | None, owners: list[int], shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks
) -> list[Tensor]:
    """The shards of one parameter in TP order, on rank 0; an empty list on the others. mine: this rank's."""
    if not ranks.is_main:
        if ranks.rank in owners:
            assert mine is not None
            torch.distributed.send(_bytes(mine), dst=0)
        return []
    shards = []
    for owner in owners:
        shard = mine if owner == 0 and mine is not None else torch.empty(shape, dtype=dtype)
        if owner != 0:
            torch.distributed.recv(_bytes(shard), src=owner)
        shards.append(shard)
    return shards


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8, which gloo can send for any dtype."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)
