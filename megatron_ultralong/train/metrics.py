"""SAVE/metrics.jsonl: what a run measured, an object a line, for programs and for `ultralong report-run`.

`kind` says what a line is:

    start        once per process: iteration it starts from, settings, layout, machine, versions, RoPE
    step         an iteration: loss, norm, learning rate, speed, time by part, memory, slowest rank, ETA
    validation   held-out loss after an iteration
    evaluation   scalars of an evaluation after an iteration
    save         a checkpoint, and the seconds that training waited for it; or the error of a failed one
    bad_step     an iteration without an update, and why (train.on_bad_step)
    stop         how the process ended; none where it was killed

A run that resumes appends. Lines of iterations after that of a `start` line are then superseded: these
iterations are trained again; so are those after a run that has rewound. Times are UTC, durations seconds,
memory bytes; what is not known is null.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import platform
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong import __version__
from megatron_ultralong.config import Train
from megatron_ultralong.io.jsonl import AppendFile
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train.stopwatch import EXPOSED, StepTime

FILE = "metrics.jsonl"
FORMAT = 1
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "triton", "transformers", "numpy")
_RECENT = 50
"""Iterations whose median is the expected one."""


RETRY = 60.0
"""Seconds after which a file that could not be written is opened again."""


class MetricsFile:
    """Appends to the file. Where it cannot be written, says so, and the run goes on without it until it
    can."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """folder: the run directory. warn: called with a line for the log."""
        self._path, self._warn = folder / FILE, warn
        self._file: AppendFile | None = None
        self._retry_at: float | None = None
        """When to open it again, after it could not be written."""
        self._guarded(self._open)

    def add(self, kind: str, **values: Any) -> None:
        """Write a line."""
        if self._file is None and self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._guarded(self._open)
        if self._file is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._guarded(self._append, _finite({"kind": kind, "time": now, **values}))

    def close(self) -> None:
        """Sync and close the file."""
        if self._file is not None:
            self._guarded(self._file.close)

    def _open(self) -> None:
        self._file = AppendFile(self._path, lambda *_: None, flag="--save")

    def _append(self, line: Any) -> None:
        assert self._file is not None
        self._file.append(line)
        if self._retry_at is not None:
            self._retry_at = None
            self._warn(f"{FILE} is written again")

    def _guarded(self, act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(Exception):
                    file.close()  # releases the lock
            if self._retry_at is None:
                self._warn(f"warning: {FILE} cannot be written ({error}); the run goes on without it")
            self._retry_at = time.monotonic() + RETRY


def _finite(value: Any) -> Any:
    """Without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- what the lines contain --------------------------------------------------------------------


def machine(ranks: Ranks) -> dict[str, Any]:
    """Host and device names with their numbers of ranks, and versions. Every rank calls it."""
    gpu = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if gpu else (platform.processor() or "cpu")
    places = agreement.gather((socket.gethostname(), device))
    hosts, devices = (dict(Counter(place[i] for place in places)) for i in (0, 1))
    versions = {"megatron_ultralong": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if gpu:
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {"hosts": hosts, "device": ranks.device.type, "devices": devices, "versions": versions}


def time_and_memory(timing: StepTime, on_gpu: bool) -> dict[str, Any]:
    """The fields of a `step` line about its time by part, all ranks' memory, and the slowest rank."""
    work = [rank.work for rank in timing.ranks]
    slowest = max(range(len(work)), key=work.__getitem__)
    return {
        "parts": timing.parts,
        "exposed_communication": sum(timing.parts.get(name, 0.0) for name in EXPOSED),
        "memory": {
            "peak_allocated": max(rank.allocated for rank in timing.ranks) if on_gpu else None,
            "peak_reserved": max(rank.reserved for rank in timing.ranks) if on_gpu else None,
            "peak_resident": max(rank.resident for rank in timing.ranks),
        },
        "slowest_rank": {"rank": slowest, "work": work[slowest], "median_work": statistics.median(work)},
    }


class Remaining:
    """Estimates the seconds until the end of training from medians of recent iterations, saves and
    validations."""

    def __init__(self, train: Train) -> None:
        self._train = train
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saves: deque[float] = deque(maxlen=5)
        self._validations: deque[float] = deque(maxlen=5)

    def step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def save(self, seconds: float) -> None:
        self._saves.append(seconds)

    def validation(self, seconds: float) -> None:
        """With all evaluations after the iteration."""
        self._validations.append(seconds)

    def seconds(self, iteration: int) -> float | None:
        """From the end of `iteration` on; None before the first one. What has not been measured yet is not
        included."""
        if not self._steps:
            return None
        t = self._train
        return (
            (t.iterations - iteration) * statistics.median_low(self._steps)
            + _events(iteration, t.iterations, t.save_every) * _median(self._saves)
            + _events(iteration, t.iterations, t.eval_every) * _median(self._validations)
        )


def _events(iteration: int, last: int, every: int) -> int:
    """How often something happens after `iteration`: every so many iterations (0 = never) and at the last."""
    every = every or last
    return last // every - iteration // every + (iteration < last and last % every != 0)


def _median(values: deque[float]) -> float:
    return statistics.median(values) if values else 0.0
