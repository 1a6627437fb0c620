"""How the loss is normalised: the mean over all target tokens of the global batch.

Ranks and micro-batches have different numbers of target tokens, so a mean of means would be wrong. Each
micro-batch therefore returns the sum of its tokens' losses and their number. Megatron
(`calculate_per_token_loss`, `finalize_model_grads`) divides the summed gradients by the number of target
tokens over all micro-batches, data and context parallel ranks; `global_mean` does the same with the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.runtime.launch import Ranks


class LossSums(NamedTuple):
    """Sums over target tokens, scalars."""

    loss: Tensor
    """Of the cross entropy."""
    z_loss: Tensor
    """Of `train.z_loss` x logsumexp^2, which the gradient has too; 0 where it is off."""
    tokens: Tensor
    """Number of target tokens."""


class MeanLoss(NamedTuple):
    """Means over all target tokens of the global batch; 0 where every token is masked."""

    loss: float
    """Cross entropy."""
    z_loss: float
    tokens: int
    """Number of target tokens."""


def loss_function(
    loss_mask: Tensor, z_sum: Tensor | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor, LossSums]]:
    """The loss function of a micro-batch that Megatron's schedule calls with the model's output, the sum of
    the loss on this rank. loss_mask: float32 [b, s], 1 where the label counts. z_sum: the z-loss's share of
    that sum, None = it has none."""

    def loss(output: Tensor) -> tuple[Tensor, Tensor, LossSums]:
        count = loss_mask.sum().to(torch.int)
        total = output.detach()
        z_loss = torch.zeros_like(total) if z_sum is None else z_sum
        return output, count, LossSums(total - z_loss, z_loss, count)

    return loss


def local_sum(results: list[LossSums], device: torch.device) -> LossSums:
    """Sum over this rank's micro-batches, float64; zero on all pipeline stages but the last."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for sums in results:
        total += torch.stack([value.double() for value in sums])
    return LossSums(*total)


def global_mean(sums: LossSums, ranks: Ranks) -> MeanLoss:
    """Means over data, context and pipeline parallel ranks together."""
    total: Any = torch.stack(list(sums))
    torch.distributed.all_reduce(total, group=ranks.groups.dp_cp)
    torch.distributed.all_reduce(total, group=ranks.groups.pp)  # zero on all stages but the last
    loss, z_loss, tokens = total.tolist()
    return MeanLoss(loss / tokens, z_loss / tokens, int(tokens)) if tokens else MeanLoss(0.0, 0.0, 0)
