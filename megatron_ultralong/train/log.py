"""The output of a run: Megatron's log line with tokens/s/GPU and causal MFU, a progress bar, TensorBoard, and
wandb if requested."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from megatron_ultralong import config
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Run
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.planning import flops
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks


class Log:
    """Lines on rank 0's standard output, scalars in `SAVE/tensorboard`; silent on the other ranks."""

    def __init__(
        self, run: Run, ranks: Ranks, model: Model, save_dir: Path, start: int, rows: BlendedDataset
    ) -> None:
        """start: the iteration that the run starts from. UserError, on every rank, where `save_dir` cannot be
        written."""
        self.run, self.ranks, self.rows = run, ranks, rows
        masked = run.data.documents == "masked"
        self.flops_per_token = flops.flops_per_token(model, 0 if masked else run.train.seq_length)
        self.peak_flops = flops.peak_flops(ranks.device)
        self.bar: Any = None
        self.board: Any = None
        self.wandb: Any = None
        agreement.on_every_rank(lambda: self._open(save_dir, start) if ranks.is_main else None)
        note = flops.FORMULA
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

    def step(
        self,
        state: TrainingState,
        *,
        loss: float,
        target_tokens: int,
        grad_norm: float | None,
        lr: float,
        seconds: float,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Log one iteration: its line and its scalars. more: further scalars by name."""
        if not self.ranks.is_main:
            return
        t = self.run.train
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
            **more,
        }
        if self.peak_flops:
            scalars["speed/causal_mfu"] = tflops * 1e12 / self.peak_flops
        self._scalars(scalars, state.iteration)
        if state.iteration % t.log_every and state.iteration != t.iterations:
            return
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
            f"| global batch size: {t.global_batch} | lm loss: {loss:.6E} | grad norm: {norm:.3f} "
            f"| target tokens: {target_tokens} | tokens/s/GPU: {tokens_per_second:.1f} | {speed} |"
        )

    def validation(self, state: TrainingState, loss: float) -> None:
        """Log the held-out loss after an iteration."""
        self._scalars({"valid/loss": loss}, state.iteration)
        self.note(f" validation loss at iteration {state.iteration} | lm loss value: {loss:.6E} |")

    def evaluation(self, state: TrainingState, scalars: dict[str, float]) -> None:
        """Log the scalars of an evaluation after an iteration."""
        self._scalars(scalars, state.iteration)
        self.note(
            f" evaluation at iteration {state.iteration} | "
            + " | ".join(f"{name}: {value:.4f}" for name, value in scalars.items())
            + " |"
        )

    def bad_step(self, state: TrainingState, line: str) -> None:
        """Log an iteration whose update was not made."""
        self._scalars({"train/bad_steps": state.bad_steps}, state.iteration)
        self.note(line)

    def flush(self) -> None:
        """Write out what has been logged."""
        self._on_board(lambda board: board.flush())

    def saved(self, iteration: int, seconds: float, waited: float) -> None:
        """Log a complete checkpoint: the seconds from its begin to its end, and those in which training
        waited."""
        self.note(
            f" saved checkpoint of iteration {iteration} in {seconds:.1f} s; training waited {waited:.1f} s"
        )

    def close(self) -> None:
        """Close the progress bar, TensorBoard and wandb."""
        if self.bar is not None:
            self.bar.close()
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()

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
