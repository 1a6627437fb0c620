"""Iterations whose update must not be made: a loss or gradient that is not finite, a loss far above the
others, and what follows (`train.on_bad_step`)."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import run_directory, sharded, training_state
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import agreement
from megatron_ultralong.train.checkpoints import Checkpoints
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.step import Trainer

COMPARED, FEWEST = 32, 8
"""A loss is compared with the median of the last COMPARED good iterations, once there are FEWEST."""


class TrainingStopped(UserError):
    """The run cannot continue (a loss that is not finite); says where, and which checkpoint is good."""


def fault_of_loss(
    train: Train, state: TrainingState, own: torch.Tensor, mean: float, device: torch.device
) -> str | None:
    """What is wrong with the loss of the iteration after `state`, the same on every rank; None = nothing.
    Every rank calls it.

    own: this rank's sum. mean: over all ranks.
    """
    iteration, recent = state.iteration + 1, state.recent_losses
    rank = agreement.first_rank_where(not bool(torch.isfinite(own)), device)
    if rank is not None:
        return f"loss is not finite at iteration {iteration}, first on rank {rank}"
    if train.loss_spike and len(recent) >= FEWEST:
        median = statistics.median(recent)
        # `mean` may differ in its last bit between ranks.
        if agreement.first_rank_where(mean > train.loss_spike * median, device) is not None:
            return (
                f"loss {mean:.4g} at iteration {iteration} is above train.loss_spike={train.loss_spike:g} times "
                f"{median:.4g}, the median of the last {len(recent)}"
            )
    return None


def with_loss(train: Train, recent: list[float], loss: float) -> list[float]:
    """`recent` with the loss of another good iteration; [] where losses are not compared."""
    return [*recent, loss][-COMPARED:] if train.loss_spike else []


def stopped(fault: str, checkpoints: Checkpoints, log: Log) -> TrainingStopped:
    """Complete the checkpoint that is being written, and return the error of a run that ends with `fault`;
    every rank calls it. An error of the save does not hide the fault."""
    try:
        checkpoints.finish(log)
    except UserError as error:
        return TrainingStopped(f"{fault}; {error}")
    return TrainingStopped(f"{fault}; {checkpoints}")


def respond(
    fault: str, trainer: Trainer, state: TrainingState, checkpoints: Checkpoints, log: Log
) -> TrainingState:
    """Return the state to continue from after a bad iteration, the one that follows `state`; every rank calls
    it. Its batch is not used again.

    TrainingStopped where `train.on_bad_step` or `train.max_bad_steps` want it, and where there is no
    checkpoint to rewind to.
    """
    t = trainer.run.train
    bad = replace(
        state,
        iteration=state.iteration + 1,
        consumed=state.consumed + t.global_batch,
        bad_steps=state.bad_steps + 1,
    )
    if t.on_bad_step == "stop":
        raise stopped(fault, checkpoints, log)
    if bad.bad_steps > t.max_bad_steps:
        count = f"bad iteration {bad.bad_steps} of this run (train.max_bad_steps={t.max_bad_steps})"
        raise stopped(f"{fault}; it is {count}", checkpoints, log)
    count = f"bad iteration {bad.bad_steps} of at most {t.max_bad_steps}"
    if t.on_bad_step == "skip":
        log.bad_step(bad, f"warning: {fault}; its update is skipped ({count})")
        return bad
    try:
        checkpoints.finish(log)
    except UserError as error:
        raise TrainingStopped(f"{fault}; {error}") from None
    target = checkpoints.rewind()
    if target is None:
        raise TrainingStopped(f"{fault}; there is no checkpoint to rewind to: {checkpoints}")
    log.bad_step(bad, f"warning: {fault}; rewinding to {target} ({count})")
    return _rewound(target, trainer, bad)


def _rewound(target: Path, trainer: Trainer, bad: TrainingState) -> TrainingState:
    """Load a checkpoint into the running trainer; the data go on after those of `bad`."""
    trainer.ranks.heartbeat.phase(f"loading {target.name}")
    target = run_directory.resolve_verified(target)
    sharded.load(target, trainer.chunks, trainer.optimizer)
    if trainer.ode is not None:
        ode = trainer.ode
        agreement.on_every_rank(lambda: ode.load_optimizer(target))
    stored = agreement.on_every_rank(lambda: training_state.read(target))
    return replace(bad, iteration=stored.iteration, tokens=stored.tokens, recent_losses=stored.recent_losses)
