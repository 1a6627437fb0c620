"""The training loop: one for continued pretraining and for instruction tuning.

Every rank runs it. An iteration is one optimizer step over `global_batch` sequences; what a checkpoint holds
is enough to go on with the very next sequence, whatever the layout it is resumed on.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.checkpoint.sharded import Progress
from megatron_ultralong.config import Run
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.log import Log


class TrainingStopped(UserError):
    """The run cannot go on (a loss that is not a number); says where, and which checkpoint is good."""


Batches = Iterator[dict[str, torch.Tensor]]
Losses = Callable[[list[Batches], int, Callable[[torch.Tensor, dict[str, torch.Tensor]], Any]], list[Any]]
"""`token_losses` with all but its last three arguments."""
Evaluation = Callable[[int, Ranks, Losses], dict[str, float]]
"""Called with the iteration on every rank; gives scalars for the log by their names."""


def train(
    run: Run,
    ranks: Ranks,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    progress: Progress,
    *,
    data: Callable[[int], list[Batches]],
    valid: Callable[[], tuple[list[Batches], int]] | None,
    save_dir: Path,
    assets: Path | None,
    log: Log,
    tokenizer: Path | None = None,
    callbacks: list[Callable[[int, list[torch.nn.Module]], None]] | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> Progress:
    """Train from `progress` to `run.train.iterations`; returns the last progress, which is saved.

    `data(consumed)` gives an endless iterator of this rank's micro-batches for each model chunk, from
    sequence `consumed` on; `valid()` the held-out ones and their number of micro-batches. `callbacks` are
    called after each save with the iteration; `evaluations` every `train.eval_every` iterations and at the
    end. A SIGTERM saves after the iteration in flight and returns. Raises TrainingStopped where loss or
    gradient is not finite.
    """
    t = run.train
    micro_batches = run.micro_batches(ranks.dp)
    batches = data(progress.consumed)
    stop = _StopRequest(ranks)
    last_saved = progress.iteration if sharded.whole(save_dir) else None

    def save() -> None:
        nonlocal last_saved, assets, tokenizer
        with log.saving(progress.iteration):
            saved = sharded.save(
                save_dir, progress, chunks, optimizer, assets, ranks, keep=t.keep, tokenizer=tokenizer
            )
        last_saved = progress.iteration
        if (saved / "hf").is_dir():  # where they came from may be a checkpoint that `keep` has removed
            assets, tokenizer = saved / "hf", None
        for callback in callbacks or []:
            callback(progress.iteration, chunks)

    def hold_out() -> None:
        if valid is not None:
            log.held_out(progress, evaluate(run, ranks, chunks, valid))
        for evaluation in evaluations:
            log.evaluation(
                progress,
                evaluation(progress.iteration, ranks, functools.partial(token_losses, run, ranks, chunks)),
            )

    evaluated = None
    while progress.iteration < t.iterations:
        iteration = progress.iteration + 1
        began = time.perf_counter()
        optim.set_learning_rate(optimizer, optim.learning_rate(t, iteration), run.optim.weight_decay)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss, tokens = step(run, ranks, chunks, batches, micro_batches, training=True)
        _stop_on(loss, "loss", iteration, ranks, save_dir, last_saved)
        updated, grad_norm, _ = optimizer.step()
        _stop_on(
            torch.tensor([float(grad_norm or 0.0)]),
            "gradient norm",
            iteration,
            ranks,
            save_dir,
            last_saved,
            own=False,
        )
        assert updated, "no loss scaling is in use, so every step must update"
        loss_mean, token_count = _mean_loss(loss, tokens, ranks)
        progress = replace(
            progress,
            iteration=iteration,
            consumed=progress.consumed + t.global_batch,
            tokens=progress.tokens + t.global_batch * t.seq_length,
        )
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        log.step(
            progress,
            loss=loss_mean,
            target_tokens=token_count,
            grad_norm=grad_norm,
            lr=optim.learning_rate(t, iteration),
            seconds=time.perf_counter() - began,
        )
        if t.eval_every and iteration % t.eval_every == 0:
            evaluated = iteration
            hold_out()
        stopping = stop.requested()
        if stopping or iteration == t.iterations or (t.save_every and iteration % t.save_every == 0):
            save()
        if stopping:
            log.note(f"stop requested: saved iteration {iteration}; start the same command again to go on")
            return progress
    if evaluated != progress.iteration:
        hold_out()
    return progress


def step(
    run: Run,
    ranks: Ranks,
    chunks: list[torch.nn.Module],
    batches: list[Batches],
    micro_batches: int,
    *,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward (and backward) of `micro_batches` micro-batches through Megatron's schedule.

    Returns (sum of the loss, number of target tokens) of this rank, float64 scalars: zero off the last
    pipeline stage. Gradients end up averaged over all target tokens of the global batch, over data and
    context parallel ranks alike.
    """
    results = _schedule(
        run,
        chunks,
        batches,
        micro_batches,
        _forward_step(ranks.device, run.train.z_loss if training else 0.0),
        training,
    )
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for loss, tokens in results:
        total += torch.stack([loss.double(), tokens.double()])
    return total[0], total[1]


@torch.no_grad()
def token_losses(
    run: Run,
    ranks: Ranks,
    chunks: list[torch.nn.Module],
    batches: list[Batches],
    micro_batches: int,
    reduce: Callable[[torch.Tensor, dict[str, torch.Tensor]], Any],
) -> list[Any]:
    """What `reduce(losses, batch)` makes of each micro-batch: losses float32 [b, s], the cross entropy of
    every token that this rank holds.

    Every rank calls it; [] off the last pipeline stage. Losses are let go with their micro-batch.
    """

    def forward_step(batches: Batches, model: torch.nn.Module) -> Any:
        batch = next(batches)
        tokens, labels = (batch[name].to(ranks.device, non_blocking=True) for name in ("tokens", "labels"))
        output = model(tokens, labels, starts=batch.get("document_starts"))
        return output, lambda nll: (
            nll.sum(),
            torch.tensor(nll.numel(), dtype=torch.int, device=nll.device),
            reduce(nll, batch),
        )

    return _schedule(run, chunks, batches, micro_batches, forward_step, training=False)


def _schedule(
    run: Run,
    chunks: list[torch.nn.Module],
    batches: list[Batches],
    micro_batches: int,
    forward_step: Callable[..., Any],
    training: bool,
) -> list[Any]:
    """Micro-batches through Megatron's pipeline schedule: the last value of each one's loss function."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ultralong.model.llama import unwrap

    for chunk in chunks:
        unwrap(chunk).config.finalize_model_grads_func = finalize_model_grads
        chunk.train(training)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=run.train.seq_length,
        micro_batch_size=run.train.micro_batch,
        forward_only=not training,
    )


def evaluate(
    run: Run, ranks: Ranks, chunks: list[torch.nn.Module], valid: Callable[[], tuple[list[Batches], int]]
) -> float:
    """Held-out loss: mean over the target tokens of the held-out rows, over all ranks."""
    batches, micro_batches = valid()
    with torch.no_grad():
        loss, tokens = step(run, ranks, chunks, batches, micro_batches, training=False)
    return _mean_loss(loss, tokens, ranks)[0]


def _forward_step(device: torch.device, z_loss: float) -> Callable[..., Any]:
    def forward_step(batches: Batches, model: torch.nn.Module) -> Any:
        batch = next(batches)
        starts = batch.get("document_starts")  # numbers for the host
        tokens, labels, loss_mask = (
            batch[name].to(device, non_blocking=True) for name in ("tokens", "labels", "loss_mask")
        )
        output = model(
            tokens, labels, loss_mask=loss_mask, z_loss=z_loss, starts=starts
        )  # by name: Float16Module makes the others bf16

        def loss(
            output: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            count = loss_mask.sum().to(torch.int)
            return output, count, (output.detach(), count)

        return output, loss

    return forward_step


def _mean_loss(loss: torch.Tensor, tokens: torch.Tensor, ranks: Ranks) -> tuple[float, int]:
    """Token-weighted mean over data, context and pipeline ranks; (0.0, 0) where every token is masked."""
    both = torch.stack([loss, tokens])
    torch.distributed.all_reduce(both, group=ranks.groups.dp_cp)
    torch.distributed.all_reduce(both, group=ranks.groups.pp)  # only the last stage holds anything but zero
    return (float(both[0] / both[1]) if both[1] > 0 else 0.0), int(both[1])


def _stop_on(
    value: torch.Tensor,
    what: str,
    iteration: int,
    ranks: Ranks,
    save_dir: Path,
    last_saved: int | None,
    *,
    own: bool = True,
) -> None:
    """TrainingStopped, on every rank, where `value` is not finite on one of them. Not `own`: all have the
    same figure."""
    bad = torch.tensor(
        [ranks.world - ranks.rank if not torch.isfinite(value).all() else 0], device=ranks.device
    )
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    if int(bad):
        where = f", first on rank {ranks.world - int(bad)}" if own else ""
        good = (
            "no checkpoint was saved yet"
            if last_saved is None
            else f"the last good checkpoint is {save_dir}/iter_{last_saved:07d}"
        )
        raise TrainingStopped(f"{what} is not finite at iteration {iteration}{where}; {good}")


class _StopRequest:
    """SIGTERM, noted; all ranks agree on it between iterations, so that none saves alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.flag = torch.zeros(1, device=ranks.device)
        signal.signal(signal.SIGTERM, self._note)
        self.noted = False

    def _note(self, number: int, frame: Any) -> None:
        self.noted = True

    def requested(self) -> bool:
        self.flag.fill_(float(self.noted))
        torch.distributed.all_reduce(self.flag, op=torch.distributed.ReduceOp.MAX)
        return bool(self.flag)
