"""The training loop, for continued pretraining and for instruction tuning.

Every rank runs it. An iteration is one optimizer step over `global_batch` sequences. A checkpoint contains
enough to resume with the very next sequence, under any layout.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import run_directory, sharded
from megatron_ultralong.checkpoint.hf.assets import AssetFolders
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.data.loader import Batch
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.runtime.signals import StopRequest
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.loss_normalisation import global_mean
from megatron_ultralong.train.step import Batches, Trainer, forward_backward, token_losses, validation_loss

TokenLosses = Callable[[Batches, int, Callable[[torch.Tensor, Batch], Any]], list[Any]]
"""`step.token_losses` of the model being trained."""
Evaluation = Callable[[int, Ranks, TokenLosses], dict[str, float]]
"""Called with the iteration on every rank; returns scalars for the log by name."""


class TrainingStopped(UserError):
    """The run cannot continue (a loss that is not finite); says where, and which checkpoint is good."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Where the loop gets its micro-batches."""

    training: Callable[[int], Batches]
    """Endless micro-batches from the given number of consumed sequences on."""
    held_out: Callable[[], tuple[Batches, int]] | None = None
    """The held-out micro-batches and their number."""


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, folder: Path, assets: AssetFolders, keep: int, failures: int = 1) -> None:
        """assets: small files to copy into each checkpoint. keep: checkpoints kept, 0 = all. failures: saves
        in a row of which the last one must not fail."""
        self._folder, self._assets, self._keep = folder, assets, keep
        self._allowed, self._failed = failures, 0
        existing = agreement.on_main_rank(lambda: run_directory.complete_checkpoints(folder))
        self._newest = existing[-1] if existing else None
        self._good: Path | None = None
        if assets != AssetFolders():
            # The folder they come from may be gone when the first checkpoint is saved, hours later.
            agreement.on_main_rank(lambda: _copy(assets, folder / _ASSETS))
            self._assets = AssetFolders(base=folder / _ASSETS)

    def confirm(self) -> None:
        """Note that the iteration after the newest checkpoint was finite: that checkpoint is good."""
        self._good = self._newest

    def save(self, trainer: Trainer, state: TrainingState, log: Log, *, needed: bool) -> bool:
        """Write the checkpoint of `state`; return whether it was written. Every rank calls it.

        UserError where it cannot be written, if it is needed or too many have failed; else a warning.
        """
        trainer.ranks.heartbeat.phase(f"saving iteration {state.iteration}")
        try:
            with log.saving(state.iteration):
                self._save(trainer, state)
        except UserError as error:
            self._failed += 1
            if needed or self._failed >= self._allowed:
                raise UserError(f"{error}; {self}") from None
            log.note(
                f"warning: {error}; training goes on without it ({self._failed} of {self._allowed} saves failed), {self}"
            )
            return False
        self._failed = 0
        return True

    def _save(self, trainer: Trainer, state: TrainingState) -> None:
        self._newest = sharded.save(
            self._folder,
            state,
            trainer.chunks,
            trainer.optimizer,
            self._assets,
            self._keep,
            trainer.ode.tensors() if trainer.ode else None,
        )
        if (self._newest / "hf").is_dir():  # the folder they came from may be a checkpoint removed by `keep`
            self._assets = AssetFolders(base=self._newest / "hf")

    def __str__(self) -> str:
        if self._newest is None:
            return "no checkpoint has been saved"
        if self._newest == self._good:
            return f"the last good checkpoint is {self._good}"
        good = (
            "none before it is known to be good"
            if self._good is None
            else f"the last good one is {self._good}"
        )
        return f"the newest checkpoint is {self._newest}, which no finite iteration has followed; {good}"


_ASSETS = ".assets"
"""Hidden folder of a run directory with the small files of its model."""


def _copy(assets: AssetFolders, target: Path) -> None:
    try:
        shutil.rmtree(target, ignore_errors=True)
        assets.copy_to(target)
    except OSError as error:
        raise atomic_files.cannot_write(str(target), error) from None


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
    saves after the current iteration and returns. TrainingStopped where the loss or the gradient norm is not
    finite.
    """
    run, ranks, optimizer, t = trainer.run, trainer.ranks, trainer.optimizer, trainer.run.train
    micro_batches = run.micro_batches(ranks.dp)
    batches = data.training(state.consumed)
    stop = StopRequest()
    validated = None  # iteration
    if stop.on_any_rank(ranks.device):
        log.note("asked to stop before the first iteration; run the same command again")
        return state

    while state.iteration < t.iterations:
        iteration = state.iteration + 1
        ranks.heartbeat.iteration(iteration)
        began = time.perf_counter()
        lr = optim.learning_rate(t, iteration)
        optim.set_hyperparameters(optimizer, lr, run.optim)

        # Gradients of the global batch.
        for chunk in trainer.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with trainer.ode.drawn(iteration) if trainer.ode else nullcontext():
            loss, tokens = forward_backward(trainer, batches, micro_batches)
        bad_rank = agreement.first_rank_where(not bool(torch.isfinite(loss)), ranks.device)
        if bad_rank is not None:
            raise TrainingStopped(
                f"loss is not finite at iteration {iteration}, first on rank {bad_rank}; {checkpoints}"
            )

        # Optimizer step.
        updated, grad_norm, _ = optimizer.step()
        if agreement.first_rank_where(not math.isfinite(grad_norm or 0.0), ranks.device) is not None:
            raise TrainingStopped(f"gradient norm is not finite at iteration {iteration}; {checkpoints}")
        assert updated, "no loss scaling is in use, so every step must update"
        mean_loss, target_tokens = global_mean(loss, tokens, ranks)
        if trainer.ode is not None and not trainer.ode.step(target_tokens, lr / t.lr if t.lr else 0.0):
            raise TrainingStopped(
                f"gradient of the RoPE's network is not finite at iteration {iteration}; {checkpoints}"
            )
        checkpoints.confirm()

        # Log.
        state = replace(
            state,
            iteration=iteration,
            consumed=state.consumed + t.global_batch,
            tokens=state.tokens + t.global_batch * t.seq_length,
        )
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        log.step(
            state,
            loss=mean_loss,
            target_tokens=target_tokens,
            grad_norm=grad_norm,
            lr=lr,
            seconds=seconds,
            more=trainer.ode.scalars if trainer.ode else {},
        )

        # Validation and checkpoint.
        if t.eval_every and iteration % t.eval_every == 0:
            run_validation(trainer, state, data, log, evaluations)
            validated = iteration
        stopping, last = stop.on_any_rank(ranks.device), iteration == t.iterations
        if stopping or last or (t.save_every and iteration % t.save_every == 0):
            bad_rank = agreement.first_rank_where(not _finite(trainer.chunks), ranks.device)
            if bad_rank is not None:
                raise TrainingStopped(
                    f"weights are not finite after iteration {iteration}, first on rank {bad_rank}, and are not saved; "
                    f"{checkpoints}"
                )
            saved = checkpoints.save(trainer, state, log, needed=stopping or last)
            stopping = stopping or (saved and stop.on_any_rank(ranks.device))
        if stopping:
            log.note(f"asked to stop: saved iteration {iteration}; run the same command again to resume")
            return state

    if validated != state.iteration:
        run_validation(trainer, state, data, log, evaluations)
    return state


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
        log.validation(state, validation_loss(trainer, *data.held_out()))
    for evaluate in evaluations:
        scalars = evaluate(state.iteration, trainer.ranks, functools.partial(token_losses, trainer))
        log.evaluation(state, scalars)
