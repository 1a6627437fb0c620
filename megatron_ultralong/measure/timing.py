"""Time and memory of a piece of work on one device.

On a GPU: CUDA events and the allocator's peak. On a CPU: the clock and counted tensors.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import memory

SLOW = 20.0
"""Seconds; work that takes longer is timed once."""
CPU_MEMORY = (
    "on a CPU, bytes of the tensors that torch operations return; workspace inside kernels is not seen"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the device ran out of memory; libraries inside torch report it in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED")
    )


def free_memory() -> None:
    """Free what failed work may still hold and the allocator's unused blocks; call it outside `except`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int = 10, warm_up: int = 2
) -> float:
    """Return the median time of `repeats` runs of `work` after `warm_up` runs, by CUDA events on a GPU.

    If the first run takes more than `SLOW` seconds, its time is returned.
    """
    times: list[float] = []
    for _ in range(warm_up + repeats):
        times.append(run_seconds(work, device))
        if times[0] > SLOW:
            return times[0]
    return statistics.median(times[warm_up:])


def run_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one run of `work`."""
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
class PeakMemory:
    """Largest number of bytes that a block held on the device, beyond what was there before."""

    bytes: int = 0
    """Set at the end of the block."""
    thread_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """To be entered by every other thread that takes part: on a CPU, torch shows a thread only its own
    operations."""


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block."""
    peak = PeakMemory()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    live = _LiveBytes()
    peak.thread_context = lambda: _CountNewTensors(live)
    with _CountNewTensors(live):
        yield peak
    peak.bytes = live.most


class _LiveBytes:
    """Bytes of storages that are alive, over all threads that count."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: dict[int, int] = {}
        # A storage may be freed while another thread, or this one, is counting.
        self._lock = threading.RLock()

    def add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        with self._lock:
            if id(storage) in self._known or storage.nbytes() == 0:
                return
            self._known[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, id(storage))

    def _freed(self, key: int) -> None:
        with self._lock:
            self.now -= self._known.pop(key)


class _CountNewTensors(TorchDispatchMode):
    """Counts storages that operations return and were not given."""

    def __init__(self, live: _LiveBytes) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            if x.device.type == "cpu" and x.untyped_storage()._cdata not in given:
                self.live.add(x)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Return the bytes of all elements of these tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative Frobenius norm of the difference, in float64."""
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm())


# ---- devices and dtypes by name ----------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def select_device(choice: str) -> torch.device:
    """Return auto, cuda or cpu as a torch device. Raises UserError if cuda is requested and not available."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; check the driver, or use --device cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    memory.grow_segments()
    return torch.device("cuda", torch.cuda.current_device())
