"""How the loss is normalised: the mean over all target tokens of the global batch.

Ranks and micro-batches have different numbers of target tokens, so a mean of means would be wrong. Each
micro-batch therefore returns the sum of its tokens' losses and their number. Megatron
(`calculate_per_token_loss`, `finalize_model_grads`) divides the summed gradients by the number of target
tokens over all micro-batches, data and context parallel ranks; `global_mean` does the same with the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.runtime.launch import Ranks

SumAndCount = tuple[Tensor, Tensor]
"""(sum of the loss, number of target tokens): scalars."""


def loss_function(loss_mask: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, SumAndCount]]:
    """The loss function of a micro-batch that Megatron's schedule calls with the model's output, the sum of
    the loss on this rank. loss_mask: float32 [b, s], 1 where the label counts."""

    def loss(output: Tensor) -> tuple[Tensor, Tensor, SumAndCount]:
        count = loss_mask.sum().to(torch.int)
        return output, count, (output.detach(), count)

    return loss


def local_sum(results: list[SumAndCount], device: torch.device) -> SumAndCount:
    """Sum over this rank's micro-batches, float64; zero on all pipeline stages but the last."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for loss, tokens in results:
        total += torch.stack([loss.double(), tokens.double()])
    return total[0], total[1]


def global_mean(loss: Tensor, tokens: Tensor, ranks: Ranks) -> tuple[float, int]:
    """(mean over all target tokens, their number) over data, context and pipeline parallel ranks; (0.0, 0)
    where every token is masked."""
    total: Any = torch.stack([loss, tokens])
    torch.distributed.all_reduce(total, group=ranks.groups.dp_cp)
    torch.distributed.all_reduce(total, group=ranks.groups.pp)  # zero on all stages but the last
    return (float(total[0] / total[1]) if total[1] > 0 else 0.0), int(total[1])
