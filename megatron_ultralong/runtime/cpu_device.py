"""The CPU as Megatron-Core's device, in the places where Megatron-Core requests CUDA by name.

Megatron-Core requests CUDA as a device string, as `torch.cuda.*Tensor` types and through a few `torch.cuda`
functions. `install()` replaces each by its CPU form, so that the same code runs on gloo ranks without a GPU.
`launch.start` calls it once per process, never for training on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TYPE_NAMES = ("Float", "Half", "BFloat16", "Int", "Long", "Byte", "Double")


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces `device="cuda"`, `.cuda()`, pinned memory and `torch.cuda.*Tensor` type names by their CPU
    forms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """The interface of a CUDA stream; all work is already in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """The interface of a CUDA event, on the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end.seconds - self.seconds) * 1e3


_installed = False


def install() -> None:
    """Use the CPU wherever Megatron-Core requests CUDA, for the rest of this process."""
    global _installed
    if _installed:
        return
    _installed = True
    # When imported, Megatron-Core calls torch.compile on functions that are never used here; loading the
    # compiler takes seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    stream = _Stream()
    for name, replacement in {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
    }.items():
        setattr(torch.cuda, name, replacement)
    for name in _TYPE_NAMES:
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    # Megatron sets CUDA's generator through torch._C, which without a GPU queues the call, and a stack trace,
    # for ever.
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _CudaMeansCpu().__enter__()


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"
