"""The output of a run: Megatron's log line with tokens/s/GPU and causal MFU, a progress bar, metrics.jsonl,
TensorBoard, and wandb and a profiler trace if requested."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from tqdm import tqdm

from megatron_ultralong import config
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Run
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.planning import flops
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train import metrics
from megatron_ultralong.train.loss_normalisation import MeanLoss
from megatron_ultralong.train.metrics import MetricsFile, Remaining
from megatron_ultralong.train.stopwatch import StepTime
from megatron_ultralong.train.trace import Trace


class Log:
    """Lines on rank 0's standard output, `SAVE/metrics.jsonl`, scalars in `SAVE/tensorboard`; silent on the
    other ranks. A context: leaving it says how the run ended, and closes it."""

    def __init__(
        self, run: Run, ranks: Ranks, model: Model, save_dir: Path, start: int, rows: BlendedDataset
    ) -> None:
        """start: the iteration that the run starts from. UserError, on every rank, where `save_dir` cannot be
        written."""
        self.run, self.ranks, self.rows = run, ranks, rows
        masked = run.data.documents == "masked"
        self.flops_per_token = flops.flops_per_token(
            model, 0 if masked else run.train.seq_length, frozen=run.lora.rank > 0
        )
        self.peak_flops = flops.peak_flops(ranks.device)
        self.model, self.iteration = model, start
        self.remaining = Remaining(run.train)
        self.bar: Any = None
        self.board: Any = None
        self.wandb: Any = None
        self.metrics: MetricsFile | None = None
        self.trace: Trace | None = None
        agreement.on_every_rank(lambda: self._open(save_dir, start) if ranks.is_main else None)
        note = flops.FORMULA
        if run.lora.rank:
            note += "; 4 x, not 6 x, the weights, which are not trained with lora.rank"
        if masked:
            note += "; excludes attention, whose size differs from row to row with data.documents=masked"
        if self.peak_flops:
            note += f"; peak {self.peak_flops / 1e12:.0f} TFLOP/s per GPU"
        else:
            note += "; peak unknown for this device, so no MFU"
        self.note(note)

    def _open(self, save_dir: Path, start: int) -> None:
        atomic_files.check_writable(save_dir, f"--save {save_dir}")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(save_dir / "tensorboard"), purge_step=start + 1)
        except ImportError:
            self.note("tensorboard is not installed: no curves are written; pip install tensorboard")
        except OSError as error:
            raise UserError(
                f"--save {save_dir} cannot be written: tensorboard: {error.strerror or error}"
            ) from None
        if self.run.runtime.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "runtime.wandb is set, but wandb is not installed; pip install wandb, or leave it unset"
                ) from None
            self.wandb = wandb.init(
                project=self.run.runtime.wandb,
                name=self.run.name,
                config=config.to_dict(self.run),
                resume="allow",
                dir=str(save_dir),
            )
        self.metrics = MetricsFile(save_dir, self.note)
        window = self.run.runtime.profiled()
        if window is not None:
            self.trace = Trace(window, save_dir, self.ranks.device, self.note)
        self.bar = tqdm(
            total=self.run.train.iterations,
            initial=start,
            unit="it",
            desc=self.run.name,
            disable=None,
            smoothing=0.1,
        )

    def note(self, line: str) -> None:
        """Print a separate line."""
        if self.ranks.is_main:
            tqdm.write(line)
            sys.stdout.flush()  # a pipe or file would buffer lines, and a killed run would lose them

    def start(self, state: TrainingState, rope: Rope, kernels: Mapping[str, str]) -> None:
        """Record what runs where, and from which iteration on. Every rank calls it."""
        facts, length = metrics.machine(self.ranks), self.run.train.seq_length
        frequencies, factor = rope.inverse_frequencies(self.model.head_dim, length)
        ranks = self.ranks
        self._record(
            "start",
            format=metrics.FORMAT,
            iteration=state.iteration,
            iterations=self.run.train.iterations,
            run=config.to_dict(self.run),
            model=asdict(self.model),
            layout={"tp": ranks.tp, "pp": ranks.pp, "cp": ranks.cp, "dp": ranks.dp, "ranks": ranks.world},
            kernels=dict(kernels),
            rope={
                "settings": rope.describe(),
                "length": length,
                "attention_factor": factor,
                "inverse_frequencies": [
                    float(str(x)) for x in frequencies.detach().numpy()
                ],  # as short as exact
            },
            flops_per_token=self.flops_per_token,
            peak_flops_per_gpu=self.peak_flops,
            **facts,
        )

    def begin(self, iteration: int) -> None:
        """Before an iteration."""
        if self.trace is not None:
            self.trace.begin(iteration)

    def step(
        self,
        state: TrainingState,
        *,
        mean: MeanLoss,
        grad_norm: float | None,
        lr: float,
        timing: StepTime,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Log one iteration: its line and its scalars. more: further scalars by name."""
        if not self.ranks.is_main:
            return
        t, seconds, loss = self.run.train, timing.seconds, mean.loss
        self.iteration = state.iteration
        self.bar.update(1)
        tokens_per_second = t.global_batch * t.seq_length / seconds / self.ranks.world
        tflops = tokens_per_second * self.flops_per_token / 1e12
        epochs = self.rows.epoch(state.consumed)
        norm = float(grad_norm or 0.0)
        scalars = {
            "train/loss": loss,
            "train/learning_rate": lr,
            "train/grad_norm": norm,
            "train/tokens": state.tokens,
            "train/epochs_done": epochs,
            "speed/tokens_per_second_per_gpu": tokens_per_second,
            "speed/tflops_per_gpu": tflops,
            "speed/iteration_seconds": seconds,
            **{f"time/{part.replace(' ', '_')}": value for part, value in timing.parts.items()},
            **more,
        }
        if t.z_loss:
            scalars["train/z_loss"] = mean.z_loss
        if self.peak_flops:
            scalars["speed/causal_mfu"] = tflops * 1e12 / self.peak_flops
        self._scalars(scalars, state.iteration)
        if self.trace is not None and self.trace.ends_at(state.iteration):
            self.ranks.heartbeat.phase("writing the profile")
        profiled = self.trace is not None and self.trace.end(state.iteration)
        if not profiled:
            self.remaining.step(seconds)
        eta = self.remaining.seconds(state.iteration)
        figures = metrics.time_and_memory(timing, self.ranks.device.type == "cuda")
        self._record(
            "step",
            iteration=state.iteration,
            loss=loss,
            z_loss=mean.z_loss if t.z_loss else None,
            grad_norm=norm,
            learning_rate=lr,
            tokens=state.tokens,
            sequences=state.consumed,
            epochs_done=epochs,
            target_tokens=mean.tokens,
            seconds=seconds,
            tokens_per_second=tokens_per_second * self.ranks.world,
            tokens_per_second_per_gpu=tokens_per_second,
            tflops_per_gpu=tflops,
            causal_mfu=scalars.get("speed/causal_mfu"),
            **figures,
            eta_seconds=eta,
            profiled=profiled,
            **({"scalars": dict(more)} if more else {}),
        )
        if state.iteration % t.log_every and state.iteration != t.iterations:
            return
        memory = figures["memory"]
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        width = len(str(t.iterations))
        speed = (
            f"causal MFU: {100 * scalars['speed/causal_mfu']:.1f}%"
            if self.peak_flops
            else f"TFLOP/s/GPU: {tflops:.3f}"
        )
        self.note(
            f" [{now}] iteration {state.iteration:{width}d}/{t.iterations} | consumed samples: {state.consumed} "
            f"| epochs done: {epochs} | elapsed time per iteration (ms): {1e3 * seconds:.1f} | learning rate: {lr:.6E} "
            f"| global batch size: {t.global_batch} | lm loss: {loss:.6E} "
            + (f"| z loss: {mean.z_loss:.6E} " if t.z_loss else "")
            + f"| grad norm: {norm:.3f} | target tokens: {mean.tokens} | tokens/s/GPU: {tokens_per_second:.1f} | {speed} "
            f"| peak memory (GiB): {(memory['peak_reserved'] or memory['peak_resident']) / 2**30:.2f} "
            + ("|" if eta is None else f"| ETA: {datetime.timedelta(seconds=round(eta))} |")
        )

    def validation(self, state: TrainingState, loss: float, seconds: float) -> None:
        """Log the held-out loss after an iteration, and the seconds it took."""
        self.remaining.validation(seconds)
        self._record("validation", iteration=state.iteration, loss=loss, seconds=seconds)
        self._scalars({"valid/loss": loss}, state.iteration)
        self.note(f" validation loss at iteration {state.iteration} | lm loss value: {loss:.6E} |")

    def evaluation(self, state: TrainingState, scalars: dict[str, float], seconds: float) -> None:
        """Log the scalars of an evaluation after an iteration, and the seconds it took."""
        self._record("evaluation", iteration=state.iteration, scalars=scalars, seconds=seconds)
        self._scalars(scalars, state.iteration)
        self.note(
            f" evaluation at iteration {state.iteration} | "
            + " | ".join(f"{name}: {value:.4f}" for name, value in scalars.items())
            + " |"
        )

    def bad_step(self, state: TrainingState, line: str) -> None:
        """Log an iteration whose update was not made."""
        self.iteration = state.iteration
        if self.bar is not None:
            self.bar.update(1)
        self._record("bad_step", iteration=state.iteration, bad_steps=state.bad_steps, reason=line)
        self._scalars({"train/bad_steps": state.bad_steps}, state.iteration)
        self.note(line)

    def flush(self) -> None:
        """Write out what has been logged."""
        self._on_board(lambda board: board.flush())

    def saved(self, iteration: int, seconds: float, waited: float) -> None:
        """Log a complete checkpoint: the seconds from its begin to its end, and those in which training
        waited."""
        self.remaining.save(waited)
        self._record("save", iteration=iteration, seconds=seconds, waited=waited)
        self.note(
            f" saved checkpoint of iteration {iteration} in {seconds:.1f} s; training waited {waited:.1f} s"
        )

    def not_saved(self, iteration: int, error: str) -> None:
        """Record that a checkpoint could not be written."""
        self._record("save", iteration=iteration, error=error)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        else:
            complete = self.iteration >= self.run.train.iterations
            reason = "complete" if complete else "asked to stop"
        if self.trace is not None:
            self.trace.close()
        self._record("stop", iteration=self.iteration, reason=reason)
        if self.metrics is not None:
            self.metrics.close()
        if self.bar is not None:
            self.bar.close()
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()

    def _record(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.add(kind, **values)

    def _scalars(self, scalars: dict[str, Any], iteration: int) -> None:
        def add(board: Any) -> None:
            for name, value in scalars.items():
                board.add_scalar(name, value, iteration)

        self._on_board(add)
        if self.wandb is not None:
            self.wandb.log(scalars, step=iteration)

    def _on_board(self, act: Callable[[Any], None]) -> None:
        """Use TensorBoard. Where its file cannot be written, say so once and go on without it."""
        if self.board is None:
            return
        try:
            act(self.board)
        except Exception as error:  # its writer is a thread, which raises whatever it met
            self.board = None
            self.note(f"warning: tensorboard cannot be written ({error}); this run goes on without it")


def print_run(run: Run, ranks: Ranks, chosen: Mapping[str, str]) -> None:
    """Print the resolved run, the ranks and device in use, and the kernels (`kernel_choices.apply`)."""
    if not ranks.is_main:
        return
    for section, values in config.to_dict(run).items():
        if section == "unpublished":
            if values:
                print(f"not published, this project's own choice: {', '.join(values)}")
            continue
        print(f"{section}: {json.dumps(values) if isinstance(values, dict) else values}")
    print(
        f"ranks: {ranks.world} on {ranks.device.type} = tp {ranks.tp} x pp {ranks.pp} x cp {ranks.cp} x dp {ranks.dp}"
    )
    print("\n".join(f"{name}: {choice}" for name, choice in chosen.items()), flush=True)
