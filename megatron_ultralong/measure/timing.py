"""Time and memory of a piece of work on one device: CUDA events and the allocator's peak on a GPU, a clock
and counted tensors on a CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong.errors import UserError

Result = TypeVar("Result")
SLOW = 20.0
"""Seconds: work that takes longer is timed once."""
CPU_MEMORY = (
    "on a CPU, bytes of the tensors that torch's operations return; workspace inside kernels is not seen"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left; libraries inside torch say so in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED")
    )


def release() -> None:
    """Let go of what a piece of work that failed may still hold, and of the allocator's unused blocks; call
    it outside `except`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10, warm_up: int = 2) -> float:
    """Median time of `repeats` runs of `work` after `warm_up` more, by CUDA events on a GPU; of the first run
    where it takes over `SLOW` seconds."""
    times = []
    for _ in range(warm_up + repeats):
        times.append(once(work, device))
        if times[0] > SLOW:
            return times[0]
    return statistics.median(times[warm_up:])


def once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run of `work`."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# ---- memory ------------------------------------------------------------------------------------


@dataclass
class Peak:
    """Bytes that a block held on the device at most, beyond what was there before."""

    bytes: int = 0
    threads: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """To be entered by every other thread that takes part (on a CPU, torch shows a thread only its own
    operations)."""


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the memory of the block; `bytes` is set at its end."""
    found = Peak()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    tally = _Tally()
    found.threads = lambda: _Count(tally)
    with _Count(tally):
        yield found
    found.bytes = tally.most


class _Tally:
    """Bytes of storages alive, over all threads that count."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: dict[int, int] = {}
        # Storages may go while another thread, or this one, is counting.
        self._lock = threading.RLock()

    def add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        with self._lock:
            if id(storage) in self._known or storage.nbytes() == 0:
                return
            self._known[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key: int) -> None:
        with self._lock:
            self.now -= self._known.pop(key)


class _Count(TorchDispatchMode):
    """Counts what operations return and did not get: new tensors."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            if x.device.type == "cpu" and x.untyped_storage()._cdata not in given:
                self.tally.add(x)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def size(*tensors: torch.Tensor) -> int:
    """Bytes of these tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64."""
    want = want.double()
    return float((found.double() - want).norm() / want.norm())


def device_of(choice: str) -> torch.device:
    """auto, cuda or cpu as a torch device; UserError where it is not there."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; check the driver, or use --device cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def dtype_of(choice: str) -> torch.dtype:
    """bf16 or fp32 as torch's."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]
