"""What a checkpoint costs: how long training waits for it, at once and in the background, and which part of
saving and loading are its checksums.

A model with its optimizer is saved and loaded by one rank, in a folder that is removed afterwards. Training
goes on with steps of S tokens while a checkpoint is written in the background.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import integrity, run_directory, saving, sharded, tensor_sums
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.number_format import byte_count, integer, percent, ratio, three_digits
from megatron_ultralong.measure.report import ReportColumn, SpeedReport, about
from megatron_ultralong.measure.step import model_text
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.step import Trainer, forward_backward

COLUMNS = (
    ReportColumn("bytes", "size", byte_count, "of the checkpoint's files"),
    ReportColumn(
        "seconds", "s", three_digits, "from the begin until the checkpoint is complete, or loaded", False
    ),
    ReportColumn(
        "waited", "training waits, s", three_digits, "for the copy, and for completing the folder", False
    ),
    ReportColumn("steps", "steps meanwhile", integer),
    ReportColumn("slowdown", "step time", ratio, "of these steps, relative to steps without a save"),
    ReportColumn("files", "hash of files", percent, "share of the seconds"),
    ReportColumn("tensors", "sums of tensors", percent, "share of the seconds"),
)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What is measured."""

    model: Model
    rope: Rope
    tokens: int
    """S of the steps beside a save."""
    precision: str
    folder: Path
    """On the disk that is measured."""
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"--seq-length {self.tokens} must be at least 1")


@dataclass
class _Seconds:
    """Time in functions, of all threads."""

    of: dict[str, float] = field(default_factory=lambda: {"files": 0.0, "tensors": 0.0})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Time the hashing of files and the sums of tensors in the block."""
        hash_file, local_sum = integrity.hash_file, tensor_sums.local_sum
        integrity.hash_file = self._timed("files", hash_file)
        tensor_sums.local_sum = self._timed("tensors", local_sum)
        try:
            yield
        finally:
            integrity.hash_file, tensor_sums.local_sum = hash_file, local_sum

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                with self._lock:
                    self.of[name] += time.perf_counter() - began

        return timed


def run(
    settings: CheckpointSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each before it starts. Starts and ends
    torch.distributed with one rank."""
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("`ultralong benchmark` runs in one process: start it without torchrun")
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    report = SpeedReport(
        kind="checkpoint",
        columns=COLUMNS,
        bars=("waited", "seconds"),
        about=about(
            device,
            command,
            shape=f"{model_text(settings.model)}, {settings.precision}",
            disk=str(_file_system(settings.folder)),
            tokens=settings.tokens,
            repeats=settings.repeats,
        ),
    )
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=settings.folder))
    try:
        trainer = _trainer(settings, ranks)
        alone = statistics.median(_steps(trainer, settings, 1 + settings.repeats)[1:])
        for background in (False, True):
            name = "save, in the background" if background else "save, training waits"
            progress(name)
            saves = [_save(trainer, settings, folder, background, alone) for _ in range(1 + settings.repeats)]
            report.add(
                {"name": name, "ours": True, **_median(saves[1:])}
            )  # the first one loaded Megatron's modules
        progress("load")
        loads = [_load(trainer, folder) for _ in range(settings.repeats)]
        report.add({"name": "load and verify", "ours": True, **_median(loads)})
    finally:
        launch.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _trainer(settings: CheckpointSettings, ranks: Any) -> Trainer:
    """A model with random weights, and its optimizer."""
    from megatron_ultralong.model import init, llama

    train = Train(
        seq_length=settings.tokens,
        global_batch=1,
        iterations=1,
        lr=1e-5,
        precision="bf16" if settings.precision == "bf16" else "fp32",
    )
    run = Run(
        name="benchmark", model=settings.model, rope=settings.rope, memory=Memory(offload="off"), train=train
    )
    chunks = llama.build(settings.model, settings.rope, ranks, run.parallel, run.memory, train.precision)
    init.initialise(llama.named_parameters(chunks[0]), settings.model, 1, 0, 1)
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, train, ranks)
    optim.set_hyperparameters(optimizer, train.lr, run.optim)
    return Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer)


def _steps(
    trainer: Trainer, settings: CheckpointSettings, count: int | None, until: Callable[[], bool] = bool
) -> list[float]:
    """Seconds of each of `count` training steps; None = as many as are begun before `until`."""
    seconds: list[float] = []
    device, s = trainer.ranks.device, settings.tokens
    while len(seconds) < count if count is not None else not until():
        row = torch.randint(settings.model.vocab_size, (1, s + 1), device=device)
        batch: Any = {
            "tokens": row[:, :-1],
            "labels": row[:, 1:],
            "loss_mask": torch.ones(1, s, device=device),
        }

        def step(batch: Any = batch) -> None:
            trainer.chunks[0].zero_grad_buffer()
            trainer.optimizer.zero_grad()
            forward_backward(trainer, [iter([batch])], 1)
            trainer.optimizer.step()

        seconds.append(timing.run_seconds(step, device))
    return seconds


def _save(
    trainer: Trainer, settings: CheckpointSettings, folder: Path, background: bool, alone: float
) -> dict[str, Any]:
    """The figures of one save. alone: seconds of a step without one."""
    state = TrainingState(model=settings.model, rope=settings.rope, iteration=1)
    counted = _Seconds()
    with counted.counted():
        began = time.perf_counter()
        pending = saving.start(folder, state, trainer.chunks, trainer.optimizer, background=background)
        if background and not pending.in_background:
            raise UserError("the host has no memory for a copy of the model; choose fewer --layers")
        waited = time.perf_counter() - began
        steps = _steps(trainer, settings, None, pending.is_written) if background else []
        waiting = time.perf_counter()
        checkpoint = pending.finish()
        ended = time.perf_counter()
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    figures = {
        "bytes": size,
        "seconds": ended - began,
        "waited": waited + ended - waiting,
        **{name: seconds / (ended - began) for name, seconds in counted.of.items()},
    }
    return (
        {**figures, "steps": len(steps), "slowdown": statistics.median(steps) / alone} if steps else figures
    )


def _load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The figures of one load, with all that is verified."""
    counted = _Seconds()
    with counted.counted():
        began = time.perf_counter()
        sharded.load(run_directory.resolve_verified(folder), trainer.chunks, trainer.optimizer)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, **{name: part / seconds for name, part in counted.of.items()}}


def _median(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median of every figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _file_system(folder: Path) -> str:
    """Type of the file system of a folder."""
    import psutil

    place = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if place.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"
