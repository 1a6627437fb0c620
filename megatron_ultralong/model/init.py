"""Initial weights of a model trained from scratch: a function of the seed and each tensor's name, so they are
equal under every layout."""

from __future__ import annotations

import math
import zlib

import torch

from megatron_ultralong.config import Model
from megatron_ultralong.model import weight_mapping


def initialise(
    parameters: dict[str, torch.nn.Parameter], model: Model, seed: int, tp_rank: int, tp: int
) -> None:
    """Fill Megatron `parameters` (by global name) in place: normal(0, init_std), with the output projections
    of attention and MLP scaled by 1 / sqrt(2 layers) (GPT-2); norms 1, biases 0."""
    shapes = weight_mapping.hf_shapes(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensors = {
                hf: _tensor(hf, shapes[hf], model, seed) for hf in weight_mapping.hf_names(name, model)
            }
            parameter.copy_(weight_mapping.split(name, tensors, model, tp_rank, tp))


def _tensor(name: str, shape: tuple[int, ...], model: Model, seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    # A 32-bit seed: of a longer one torch's CPU generator uses the lower half only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = model.init_std / math.sqrt(2 * model.layers) if residual else model.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
