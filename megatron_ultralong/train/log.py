"""What a run says: Megatron's log line with tokens/s/GPU and causal MFU, a progress bar, TensorBoard, and
wandb where asked."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ultralong import config
from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.checkpoint.sharded import Progress
from megatron_ultralong.config import Model, Run
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import flops
from megatron_ultralong.runtime.launch import Ranks


class Log:
    """Lines on rank 0's standard output, scalars in `SAVE/tensorboard`; silent on the other ranks."""

    def __init__(
        self, run: Run, ranks: Ranks, model: Model, save_dir: Path, start: int, rows: BlendedDataset
    ) -> None:
        self.run, self.ranks, self.rows = run, ranks, rows
        masked = run.data.documents == "masked"
        self.flops = flops.flops_per_token(model, 0 if masked else run.train.seq_length)
        self.peak = flops.peak_flops(ranks.device)
        self.bar = None
        self.board: Any = None
        self.wandb: Any = None
        sharded.agree(lambda: self._open(save_dir, start), ranks, f"--save {save_dir} cannot be written")
        if not ranks.is_main:
            return
        self.bar = tqdm(
            total=run.train.iterations, initial=start, unit="it", desc=run.name, disable=None, smoothing=0.1
        )
        without = (
            "; without attention, whose size differs from row to row with data.documents=masked"
            if masked
            else ""
        )
        self.note(
            flops.FORMULA
            + without
            + (
                f"; peak {self.peak / 1e12:.0f} TFLOP/s a GPU"
                if self.peak
                else "; no peak known here, so no MFU"
            )
        )

    def _open(self, save_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        save_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
        self.board = SummaryWriter(str(save_dir / "tensorboard"), purge_step=start + 1)
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

    def note(self, line: str) -> None:
        """A line of its own."""
        if self.ranks.is_main:
            tqdm.write(line)
            sys.stdout.flush()  # a pipe or file would hold lines back, and a killed run would lose them

    def step(
        self,
        progress: Progress,
        *,
        loss: float,
        target_tokens: int,
        grad_norm: float | None,
        lr: float,
        seconds: float,
    ) -> None:
        """One iteration's line and scalars."""
        if not self.ranks.is_main or self.bar is None:
            return
        t = self.run.train
        self.bar.update(1)
        tokens_per_second = t.global_batch * t.seq_length / seconds / self.ranks.world
        tflops = tokens_per_second * self.flops / 1e12
        epochs = self.rows.epoch(progress.consumed)
        scalars = {
            "train/loss": loss,
            "train/learning_rate": lr,
            "train/grad_norm": float(grad_norm or 0.0),
            "train/tokens": progress.tokens,
            "train/epochs_done": epochs,
            "speed/tokens_per_second_per_gpu": tokens_per_second,
            "speed/tflops_per_gpu": tflops,
            "speed/iteration_seconds": seconds,
        }
        if self.peak:
            scalars["speed/causal_mfu"] = tflops * 1e12 / self.peak
        self._scalars(scalars, progress.iteration)
        if progress.iteration % t.log_every and progress.iteration != t.iterations:
            return
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        width = len(str(t.iterations))
        speed = (
            f"causal MFU: {100 * tflops * 1e12 / self.peak:.1f}%"
            if self.peak
            else f"TFLOP/s/GPU: {tflops:.3f}"
        )
        self.note(
            f" [{now}] iteration {progress.iteration:{width}d}/{t.iterations} | consumed samples: {progress.consumed} "
            f"| epochs done: {epochs} | elapsed time per iteration (ms): {1e3 * seconds:.1f} | learning rate: {lr:.6E} "
            f"| global batch size: {t.global_batch} | lm loss: {loss:.6E} | grad norm: {float(grad_norm or 0.0):.3f} "
            f"| target tokens: {target_tokens} | tokens/s/GPU: {tokens_per_second:.1f} | {speed} |"
        )

    def held_out(self, progress: Progress, loss: float) -> None:
        """The held-out loss after an iteration."""
        self._scalars({"valid/loss": loss}, progress.iteration)
        self.note(f" validation loss at iteration {progress.iteration} | lm loss value: {loss:.6E} |")

    def evaluation(self, progress: Progress, scalars: dict[str, float]) -> None:
        """What an evaluation of its own found after an iteration."""
        self._scalars(scalars, progress.iteration)
        self.note(
            f" evaluation at iteration {progress.iteration} | "
            + " | ".join(f"{name}: {value:.4f}" for name, value in scalars.items())
            + " |"
        )

    @contextlib.contextmanager
    def saving(self, iteration: int) -> Iterator[None]:
        """Says what is saved, and how long it took."""
        began = time.perf_counter()
        if self.board is not None:
            self.board.flush()  # a run that goes on from here does not give these scalars again
        yield
        self.note(f" saved checkpoint of iteration {iteration} in {time.perf_counter() - began:.1f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _scalars(self, scalars: dict[str, Any], iteration: int) -> None:
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, iteration)
        if self.wandb is not None:
            self.wandb.log(scalars, step=iteration)


def print_run(run: Run, ranks: Ranks) -> None:
    """The resolved run, and what was chosen on this machine."""
    if not ranks.is_main:
        return
    for section, values in config.to_dict(run).items():
        print(f"{section}: {json.dumps(values) if isinstance(values, dict) else values}")
    print(
        f"ranks: {ranks.world} on {ranks.device.type} = tp {ranks.tp} x pp {ranks.pp} x cp {ranks.cp} x dp {ranks.dp}",
        flush=True,
    )
