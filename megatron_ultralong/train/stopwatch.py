"""Seconds of an iteration by part: data, forward, backward, waiting for other ranks, optimizer.

On a GPU the parts are bounded by events on the stream that computes, which are read once the device has
finished the iteration: the host never waits for them, and a part that overlaps with computation takes no
time. On a CPU they are bounded by the host's clock. A part inside another one counts for itself only, so the
parts and `other` add up to the iteration.

Megatron-Core reports the passes and the synchronisation of gradients to `timers` of its configurations, of
which `Stopwatch` is one; attention's communication reports its waits (`context_parallel/comm.py`).
Collectives of tensor parallelism are inside the computation and are not separated from it.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ultralong.context_parallel import comm
from megatron_ultralong.runtime.launch import Ranks

EXPOSED = ("context parallel", "pipeline", "data parallel")
"""Parts in which a rank waits for others: attention's keys and values; other pipeline stages, their bubble
included; the reduction of gradients and the gathering of weights."""
PARTS = ("data", "forward", "backward", *EXPOSED, "optimizer", "other")
_WORK = ("data", "forward", "backward")
"""Parts that show which rank is slow: in the others, ranks wait for each other."""
_TIMERS = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "data parallel",
    "embedding-grads-all-reduce": "data parallel",
    "conditional-embedder-grads-all-reduce": "data parallel",
    "non-tensor-parallel-grads-all-reduce": "data parallel",
    "params-all-gather": "data parallel",
}
"""Parts by Megatron-Core's names; its other timers are inside these, or inside the caller's parts."""


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """What a rank reports of an iteration."""

    work: float
    """Seconds of data, forward and backward, without waiting for other ranks."""
    allocated: int
    """Most bytes of GPU memory that tensors took at once since the start; 0 on a CPU."""
    reserved: int
    """Most bytes of GPU memory that PyTorch's allocator held; 0 on a CPU."""
    resident: int
    """Most bytes of host memory of the process."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of an iteration."""

    seconds: float
    """From its begin until the device had finished."""
    parts: dict[str, float]
    """Seconds of this rank, by `PARTS`, those that took any."""
    ranks: list[RankTime]
    """Of all ranks."""


class Stopwatch:
    """Measures one iteration after the other. Outside of `begin` and `end`, its parts cost nothing."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._running = False
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        self._spare: list[Any] = []
        self._began = 0.0

    def begin(self) -> None:
        """Start an iteration; the device is idle."""
        self._forget()
        self._stack, self._began, self._running = [], time.perf_counter(), True
        self._mark()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block takes as `name`."""
        self._push(name)
        try:
            yield
        finally:
            self._pop()

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Count waits of attention's communication in the block."""
        with comm.waits_inside(lambda: self.part("context parallel")):
            yield

    def stop(self) -> None:
        """Drop an iteration that has begun."""
        self._running = False
        self._forget()

    def end(self, ranks: Ranks) -> StepTime:
        """End the iteration: one small collective, and the host waits for the device. Every rank calls it.

        The collective is sent while the last work of the iteration still runs, so the passes must have
        finished, as they have where their loss or norm has been read.
        """
        self._mark()
        work = [stop for (name, _), (_, stop) in itertools.pairwise(self._marks) if name in _WORK]
        if self._on_gpu and work:
            work[-1].synchronize()  # returns at once: see above
        parts = self._seconds(_WORK)
        mine = torch.tensor(
            [sum(parts.get(name, 0.0) for name in _WORK), *_memory(ranks.device)], dtype=torch.float64
        ).to(ranks.device, non_blocking=True)
        everyone = mine.new_empty(ranks.world * len(mine))
        torch.distributed.all_gather_into_tensor(everyone, mine)
        self._mark()
        self._running = False
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        parts = self._seconds(PARTS)
        self._forget()
        return StepTime(
            seconds=seconds,
            parts={name: parts[name] for name in PARTS if name in parts},
            ranks=[
                RankTime(work=work, allocated=int(a), reserved=int(r), resident=int(h))
                for work, a, r, h in everyone.view(ranks.world, -1).tolist()
            ],
        )

    # ---- Megatron-Core's timers ----------------------------------------------------------------

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of a name, as Megatron-Core's configurations have them."""
        return _Timer(self, _TIMERS.get(name))

    def attach(self, optimizer: Any) -> None:
        """Have Megatron-Core's optimizer report to this stopwatch."""
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            one.config.timers = self

    # ---- marks ---------------------------------------------------------------------------------

    def _push(self, name: str) -> None:
        if self._running:
            self._stack.append(name)
            self._mark()

    def _pop(self) -> None:
        if self._running:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        """Note the time, and what is being done from now on."""
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((self._stack[-1] if self._stack else "other", mark))

    def _forget(self) -> None:
        if self._on_gpu:
            self._spare += [mark for _, mark in self._marks]
        self._marks.clear()

    def _seconds(self, names: tuple[str, ...]) -> dict[str, float]:
        """The seconds of these parts, which have ended."""
        found: dict[str, float] = {}
        for (name, start), (_, stop) in itertools.pairwise(self._marks):
            if name in names:
                took = 1e-3 * start.elapsed_time(stop) if self._on_gpu else stop - start
                found[name] = found.get(name, 0.0) + took
        return found


class _Timer:
    """One of Megatron-Core's timers; None = of no part."""

    def __init__(self, watch: Stopwatch, part: str | None) -> None:
        self._watch, self._part = watch, part

    def start(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._watch._push(self._part)

    def stop(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._watch._pop()


def _memory(device: torch.device) -> tuple[int, int, int]:
    """(allocated, reserved, resident) of `RankTime`."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type != "cuda":
        return 0, 0, resident
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), resident
