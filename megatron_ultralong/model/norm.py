"""RMSNorm with sequence parallelism, in place of Megatron-Core's norms when TransformerEngine is not
installed."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ultralong.model.elementwise import rms_norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype.

    The weight is marked `sequence_parallel`: with sequence parallelism each tensor parallel rank normalises
    its own tokens, so Megatron must sum the weight's gradients over the tensor parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
