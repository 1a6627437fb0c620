"""Micro-batches through Megatron's pipeline schedule: a training step, a validation step, losses per
token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import Run
from megatron_ultralong.data.loader import Batch
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train import loss_normalisation
from megatron_ultralong.train.loss_normalisation import LossSums
from megatron_ultralong.train.ode_training import OdeTraining
from megatron_ultralong.train.stopwatch import Stopwatch

Batches = list[Iterator[Batch]]
"""This rank's micro-batches, one iterator per model chunk."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What this rank trains: its model chunks, wrapped for data parallelism, and their optimizer."""

    run: Run
    ranks: Ranks
    chunks: list[torch.nn.Module]
    optimizer: Any
    ode: OdeTraining | None = None
    """Of a RoPE method whose frequencies are trained."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Measures the iterations of `loop.train`."""


def forward_backward(trainer: Trainer, batches: Batches, micro_batches: int) -> LossSums:
    """Forward and backward of `micro_batches` micro-batches; return this rank's sums of the loss.

    Gradients end up averaged over all target tokens of the global batch (see loss_normalisation.py).
    """
    step = _loss_step(trainer, trainer.run.train.z_loss)
    with trainer.watch.waits():
        results = _schedule(trainer, batches, micro_batches, step, training=True)
    return loss_normalisation.local_sum(results, trainer.ranks.device)


@torch.no_grad()
def validation_loss(trainer: Trainer, batches: Batches, micro_batches: int) -> float:
    """Mean cross entropy over the target tokens of `micro_batches` micro-batches, over all ranks."""
    results = _schedule(trainer, batches, micro_batches, _loss_step(trainer, z_loss=0.0), training=False)
    total = loss_normalisation.local_sum(results, trainer.ranks.device)
    return loss_normalisation.global_mean(total, trainer.ranks).loss


@torch.no_grad()
def token_losses(
    trainer: Trainer, batches: Batches, micro_batches: int, reduce: Callable[[Tensor, Batch], Any]
) -> list[Any]:
    """Return `reduce(losses, batch)` of each micro-batch: losses float32 [b, s], the cross entropy of every
    token that this rank holds.

    Every rank calls it; [] on all pipeline stages but the last. The losses of one micro-batch exist at a
    time.
    """

    def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> Any:
        batch = next(batches)
        tokens, labels = _to_device(batch, ("tokens", "labels"), trainer.ranks.device)
        output = model(tokens, labels, placement=batch.get("placement"))
        return output, lambda nll: (
            nll.sum(),
            torch.tensor(nll.numel(), dtype=torch.int, device=nll.device),
            reduce(nll, batch),
        )

    return _schedule(trainer, batches, micro_batches, forward_step, training=False)


def _loss_step(trainer: Trainer, z_loss: float) -> Callable[..., Any]:
    def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> Any:
        with trainer.watch.part("data"):
            batch = next(batches)
            tokens, labels, loss_mask = _to_device(
                batch, ("tokens", "labels", "loss_mask"), trainer.ranks.device
            )
        z_sum = torch.zeros((), device=trainer.ranks.device) if z_loss else None
        # By keyword: Float16Module converts positional floats to bf16.
        output = model(
            tokens,
            labels,
            loss_mask=loss_mask,
            z_loss=z_loss,
            placement=batch.get("placement"),
            z_sum=z_sum,
        )
        return output, loss_normalisation.loss_function(loss_mask, z_sum)

    return forward_step


def _to_device(batch: Batch, names: tuple[str, ...], device: torch.device) -> list[Tensor]:
    return [batch[name].to(device, non_blocking=True) for name in names]


def _schedule(
    trainer: Trainer,
    batches: Batches,
    micro_batches: int,
    forward_step: Callable[..., Any],
    *,
    training: bool,
) -> list[Any]:
    """Run Megatron's pipeline schedule; return the last value of each micro-batch's loss function."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ultralong.model.llama import unwrap

    chunks, train = trainer.chunks, trainer.run.train
    for chunk in chunks:
        unwrap(chunk).config.finalize_model_grads_func = finalize_model_grads
        unwrap(chunk).config.timers = trainer.watch
        chunk.train(training)
    # Between its own computations, a pipeline stage does nothing but wait for the others.
    with trainer.watch.part("pipeline") if trainer.ranks.pp > 1 else nullcontext():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=micro_batches,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch,
            forward_only=not training,
        )
