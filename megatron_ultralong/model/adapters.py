"""LoRA's adapters inside the layers: what they add to Megatron's linears, and which weights are trained.

With sequence parallelism only the rank's own tokens are multiplied with A, so that what is gathered, or
summed and scattered, is `rank` numbers a token.

Shapes: c of this rank's tokens, b sequences, T = c TP tokens that a linear gathers with sequence parallelism
(otherwise T = c), r the adapters' rank.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_ultralong import lora
from megatron_ultralong.config import Model
from megatron_ultralong.lora import LINEARS, SPLIT_INPUT, Lora, Part, Target
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.runtime.launch import Ranks


class Adapter(MegatronModule):
    """A and B of one linear, this rank's shards."""

    def __init__(
        self, config: TransformerConfig, target: Target, model: Model, rank: int, tp_group: Any
    ) -> None:
        super().__init__(config)
        self.target, self.tp_group = target, tp_group
        for which, shape in zip(lora.PARTS, lora.shapes(target, model, rank), strict=True):
            dim = lora.split_dim(target, which)
            size = list(shape)
            if dim is not None:
                size[dim] //= tp_group.size()
            parameter = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(parameter, dim is not None, dim or 0, 1)
            # Each rank has the gradient of its own tokens: Megatron sums those of marked parameters.
            parameter.sequence_parallel = dim is None and config.sequence_parallel
            setattr(self, which, parameter)

    a: Tensor
    b: Tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        dims = {which: lora.split_dim(self.target, which) for which in lora.PARTS}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {which: dim for which, dim in dims.items() if dim is not None},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class Adapters(MegatronModule):
    """The adapters of a layer, children by Hugging Face's names of the linears."""

    def __init__(self, config: TransformerConfig, model: Model, settings: Lora, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group, self._scale = tp_group, settings.scale
        self._groups = model.kv_heads // tp_group.size()
        self._rows = {
            target: lora.shapes(target, model, settings.rank)[1][0] // tp_group.size()
            for target in lora.TARGETS
        }
        for target in settings.targets:
            self.add_module(target, Adapter(config, target, model, settings.rank, tp_group))

    def add(self, linear: str, y: Tensor, x: Tensor) -> Tensor:
        """Return y, the output of a linear, plus what its adapters add for its input x: [c, b, in] where the
        linear splits its output, [T, b, in/TP] where it splits its input."""
        present = [target for target in LINEARS[linear] if target in self._modules]
        if not present:
            return y
        if present[0] in SPLIT_INPUT:
            return self._add_of_split_input(self._modules[present[0]], y, x)
        a = torch.cat([self._modules[target].a for target in present])
        low = F.linear(x, a)  # [c, b, n r]
        if self.config.sequence_parallel:
            low = gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return _add_product(y, low, self._b(linear, present))

    def _add_of_split_input(self, adapter: Any, y: Tensor, x: Tensor) -> Tensor:
        low = F.linear(x, adapter.a)  # [T, b, r], a part of the sum over ranks
        if self.config.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)  # [c, b, r]
        elif self.tp_group.size() > 1:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return _add_product(y, low, adapter.b * self._scale)

    def _b(self, linear: str, present: list[Target]) -> Tensor:
        """The scaled B [out, n r] of a linear made of several: each one's rows are not 0 in its own r columns
        only, in the order of Megatron's rows."""
        parts = []
        for target in LINEARS[linear]:
            if target in present:
                b, i = self._modules[target].b * self._scale, present.index(target)
                rank = b.shape[1]
                parts.append(F.pad(b, (i * rank, (len(present) - 1 - i) * rank)))
            else:
                like = self._modules[present[0]].b
                parts.append(like.new_zeros(self._rows[target], len(present) * like.shape[1]))
        if linear == "linear_qkv":  # for each KV head its queries, its key, its value
            return torch.cat([part.unflatten(0, (self._groups, -1)) for part in parts], dim=1).flatten(0, 1)
        return torch.cat(parts)


def _add_product(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """y [..., out] + low [..., n] b^T."""
    return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), b.t()).view_as(y)


# ---- which weights are trained -----------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in a chunk, belongs to an adapter."""
    return ".adapters." in name


def is_trained(name: str, settings: Lora, model: Model) -> bool:
    """Whether a parameter, by its name in a chunk, is trained."""
    if not settings.rank or is_adapter(name):
        return True
    if name == weight_mapping.EMBEDDING or (name == weight_mapping.OUTPUT and model.tied_embeddings):
        return settings.train_embeddings
    return settings.train_norms and "norm" in name.rpartition(".")[0].rpartition(".")[2]


def freeze(chunk: torch.nn.Module, settings: Lora, model: Model) -> None:
    """Leave only what `is_trained` to be trained."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_trained(name, settings, model))


# ---- values ------------------------------------------------------------------------------------


def parse_name(name: str) -> tuple[int, Target, Part]:
    """Return (layer of the complete model, linear, a or b) of an adapter's parameter, by its name with the
    layer's number in the complete model."""
    _, _, layer, _, target, which = name.split(".")
    return int(layer), target, which  # type: ignore[return-value]


def initialise(
    parameters: dict[str, torch.nn.Parameter], model: Model, settings: Lora, seed: int, ranks: Ranks
) -> None:
    """Fill adapters (parameters by name with the layer's number in the complete model) in place: A uniform in
    +- 1 / sqrt(in), B zero, as PEFT does. A function of the seed and each tensor's name, equal under every
    layout."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            layer, target, which = parse_name(name)
            if which == "b":
                parameter.zero_()
                continue
            shape = lora.shapes(target, model, settings.rank)[0]
            seeded = zlib.crc32(f"{seed}/{lora.peft_name(target, layer, which)}".encode())
            bound = 1 / math.sqrt(shape[1])
            whole = torch.empty(shape).uniform_(
                -bound, bound, generator=torch.Generator().manual_seed(seeded)
            )
            parameter.copy_(shard(target, which, whole, ranks.tp_rank, ranks.tp))


def shard(target: Target, which: Part, whole: Tensor, tp_rank: int, tp: int) -> Tensor:
    """Return the part of a complete A or B that a tensor parallel rank has."""
    dim = lora.split_dim(target, which)
    return whole if dim is None else whole.chunk(tp, dim)[tp_rank]
