"""Which kernels a model uses in this process: applied and described once, at the start of a run."""

from __future__ import annotations

import torch

from megatron_ultralong.config import AttentionBackend, Model
from megatron_ultralong.context_parallel.kernels import startup
from megatron_ultralong.model import elementwise, spec
from megatron_ultralong.runtime import agreement, memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def apply(
    device: torch.device,
    model: Model,
    precision: str,
    attention: AttentionBackend = "auto",
    documents: bool = False,
    adapters: bool = False,
) -> dict[str, str]:
    """Apply the setting of the attention kernel; return every choice by name, with its reason.

    precision: bf16 or fp32. documents: whether attention stays inside documents. adapters: whether the model
    has LoRA's. Every rank calls it after `launch.start`. UserError where the attention kernel cannot be used.
    """
    choices = agreement.on_every_rank(
        lambda: startup.apply(attention, device, DTYPES[precision], model.head_dim, documents)
    )
    choices["linear layers and norms"] = spec.layers_of(device, adapters)
    operations = elementwise.chosen_operations(device, DTYPES[precision], transformer_engine=False)
    choices["SwiGLU and RoPE"] = operations["SwiGLU"]
    if device.type == "cuda":
        choices["environment"] = memory.cuda_environment()
    return choices
