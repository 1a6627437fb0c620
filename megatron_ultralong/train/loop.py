"""The training loop, for continued pretraining and for instruction tuning.

Every rank runs it. An iteration is one optimizer step over `global_batch` sequences. A checkpoint contains
enough to resume with the very next sequence, under any layout.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.data.loader import Batch
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.runtime.signals import StopRequest
from megatron_ultralong.train import bad_steps
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.checkpoints import Checkpoints
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.loss_normalisation import MeanLoss, global_mean
from megatron_ultralong.train.step import Batches, Trainer, forward_backward, token_losses, validation_loss

TokenLosses = Callable[[Batches, int, Callable[[torch.Tensor, Batch], Any]], list[Any]]
"""`step.token_losses` of the model being trained."""
Evaluation = Callable[[int, Ranks, TokenLosses], dict[str, float]]
"""Called with the iteration on every rank; returns scalars for the log by name."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Where the loop gets its micro-batches."""

    training: Callable[[int], Batches]
    """Endless micro-batches from the given number of consumed sequences on."""
    held_out: Callable[[], tuple[Batches, int]] | None = None
    """The held-out micro-batches and their number."""


def train(
    trainer: Trainer,
    state: TrainingState,
    data: TrainingData,
    checkpoints: Checkpoints,
    log: Log,
    evaluations: Sequence[Evaluation] = (),
) -> TrainingState:
    """Train from `state` to `run.train.iterations`; return the last state, which is saved.

    Held-out loss and `evaluations` run every `train.eval_every` iterations and at the end. A request to stop
    saves after the current iteration and returns. TrainingStopped after a bad iteration where
    `train.on_bad_step` wants it, and where weights are not finite.
    """
    ranks, t = trainer.ranks, trainer.run.train
    batches = data.training(state.consumed)
    stop = StopRequest()
    validated = None  # iteration
    if stop.on_any_rank(ranks.device):
        log.note("asked to stop before the first iteration; run the same command again")
        return state

    while state.iteration < t.iterations:
        iteration = state.iteration + 1
        ranks.heartbeat.iteration(iteration)
        log.begin(iteration)
        trainer.watch.begin()
        done = _iteration(trainer, state, batches)
        if done.fault is not None:
            trainer.watch.stop()
            state = bad_steps.respond(done.fault, trainer, state, checkpoints, log)
            if state.iteration < iteration:  # rewound
                batches, validated = data.training(state.consumed), None
                continue
        else:
            checkpoints.confirm(iteration)
            state = replace(
                state,
                iteration=iteration,
                consumed=state.consumed + t.global_batch,
                tokens=state.tokens + t.global_batch * t.seq_length,
                recent_losses=bad_steps.with_loss(t, state.recent_losses, done.mean.loss),
            )
            log.step(
                state,
                mean=done.mean,
                grad_norm=done.grad_norm,
                lr=optim.learning_rate(t, iteration),
                timing=trainer.watch.end(ranks),
                more=trainer.ode.scalars if trainer.ode else {},
            )
        checkpoints.poll(log)

        # Validation and checkpoint.
        if t.eval_every and iteration % t.eval_every == 0:
            run_validation(trainer, state, data, log, evaluations)
            validated = iteration
        stopping, last = stop.on_any_rank(ranks.device), iteration == t.iterations
        if stopping or last or (t.save_every and iteration % t.save_every == 0):
            bad_rank = agreement.first_rank_where(not _finite(trainer.chunks), ranks.device)
            if bad_rank is not None:
                fault = f"weights are not finite after iteration {iteration}, first on rank {bad_rank}, and are not saved"
                raise bad_steps.stopped(fault, checkpoints, log)
            saved = checkpoints.save(trainer, state, log, needed=stopping or last)
            stopping = stopping or (saved and stop.on_any_rank(ranks.device))
        if stopping:
            checkpoints.finish(log, needed=True)
            log.note(f"asked to stop: saved iteration {iteration}; run the same command again to resume")
            return state

    if validated != state.iteration:
        run_validation(trainer, state, data, log, evaluations)
    return state


@dataclass(frozen=True, kw_only=True)
class _Iteration:
    """One iteration, the same on every rank."""

    mean: MeanLoss
    grad_norm: float = 0.0
    """Before clipping."""
    fault: str | None = None
    """Why the weights were not updated."""


def _iteration(trainer: Trainer, state: TrainingState, batches: Batches) -> _Iteration:
    """Forward, backward and update of the iteration after `state`. Every rank calls it."""
    run, ranks, t, ode = trainer.run, trainer.ranks, trainer.run.train, trainer.ode
    iteration = state.iteration + 1
    lr = optim.learning_rate(t, iteration)
    optim.set_hyperparameters(trainer.optimizer, lr, run.optim)

    # Gradients of the global batch.
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    with ode.drawn(iteration) if ode else nullcontext():
        sums = forward_backward(trainer, batches, run.micro_batches(ranks.dp))
    mean = global_mean(sums, ranks)
    fault = bad_steps.fault_of_loss(t, state, sums.loss, mean.loss, ranks.device)
    if fault is not None:
        return _Iteration(mean=mean, fault=fault)

    def is_acceptable(norm: float) -> bool:
        nonlocal fault
        if agreement.first_rank_where(not math.isfinite(norm), ranks.device) is not None:
            fault = f"gradient norm is not finite at iteration {iteration}"
        elif ode is not None and not ode.step(mean.tokens, lr / t.lr if t.lr else 0.0):
            fault = f"gradient of the RoPE's network is not finite at iteration {iteration}"
        return fault is None

    with trainer.watch.part("optimizer"):
        updated, grad_norm = optim.step(trainer.optimizer, is_acceptable)
    assert updated or fault is not None, "no loss scaling is in use, so every other step must update"
    return _Iteration(mean=mean, grad_norm=grad_norm, fault=fault)


def _finite(chunks: list[torch.nn.Module]) -> bool:
    """Whether all of this rank's weights are finite."""
    norms = [torch.linalg.vector_norm(p.detach(), torch.inf) for chunk in chunks for p in chunk.parameters()]
    return not norms or bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def run_validation(
    trainer: Trainer, state: TrainingState, data: TrainingData, log: Log, evaluations: Sequence[Evaluation]
) -> None:
    """Log the held-out loss, if there is held-out data, and the scalars of `evaluations`."""
    trainer.ranks.heartbeat.phase(f"evaluation after iteration {state.iteration}")
    if data.held_out is not None:
        began = time.perf_counter()
        loss = validation_loss(trainer, *data.held_out())
        log.validation(state, loss, time.perf_counter() - began)
    for evaluate in evaluations:
        began = time.perf_counter()
        scalars = evaluate(state.iteration, trainer.ranks, functools.partial(token_losses, trainer))
        log.evaluation(state, scalars, time.perf_counter() - began)
