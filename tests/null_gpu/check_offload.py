"""Copies between GPU and host run on streams of their own: nothing they read or write may be reused before
they have ended. Checked by PyTorch's own race detector (torch.cuda._sanitizer), which follows events and
streams and needs no kernel to compute anything."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.cuda import _sanitizer

from megatron_ultralong.config import Memory, Model, Parallel, Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import llama
from megatron_ultralong.model.layer.offload import HostStore
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.runtime import launch

CUDA = torch.device("cuda", 0)
MODEL = Model(hidden_size=256, ffn_size=512, layers=4, heads=4, kv_heads=2, head_dim=64, vocab_size=500)
LENGTH = 2048
MEMORY = {
    "layer inputs": Memory(offload="layer_inputs", layer_chunk=1024, loss_chunk=512),
    "all": Memory(offload="all", layer_chunk=1024, loss_chunk=512),
    "query chunks": Memory(offload="all", query_chunks=True, layer_chunk=1024, loss_chunk=512),
}


class Handler(_sanitizer.EventHandler):
    """PyTorch's, except that freed memory stays known: the next tensor there must wait for what the last one
    is used for."""

    def _handle_memory_allocation(self, data_ptr: int) -> None:
        self.tensors_accessed.ensure_tensor_exists(data_ptr)

    def _handle_memory_deallocation(self, data_ptr: int) -> None:
        pass


@pytest.fixture(scope="module")
def detector() -> Iterator[Any]:
    """One for all tests: its callbacks are never unregistered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sanitizer, "EventHandler", Handler)
        walk = traceback.walk_stack  # a few frames are enough, and faster
        patch.setattr(traceback, "walk_stack", lambda frame: itertools.islice(walk(frame), 8))
        yield _sanitizer.CUDASanitizerDispatchMode()


@contextmanager
def races_are_errors(detector: Any) -> Iterator[None]:
    torch.cuda.synchronize()  # nothing runs
    detector.event_handler.tensors_accessed = _sanitizer._TensorsAccessed()
    with detector:
        yield


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield launch.start(Runtime(device="cuda"), Parallel())
    launch.stop()


class Stream(torch.cuda.Stream):
    """A stream with bugs."""

    def wait_stream(self, stream: Any) -> None:
        if "does not wait" not in self.bugs:
            super().wait_stream(stream)

    def record_event(self, event: Any = None) -> Any:
        if "is not waited for" in self.bugs:
            return torch.cuda.Stream().record_event()  # of a stream that does nothing
        return super().record_event(event)

    bugs: tuple[str, ...] = ()


BUGS: dict[str, tuple[str, str]] = {
    "memory is filled that is still in use": ("to_device", "does not wait"),
    "tensors are used before they arrive": ("to_device", "is not waited for"),
    "tensors are copied before they are computed": ("to_host", "does not wait"),
    "memory is reused before it was copied": ("to_host", "is not waited for"),
}


@pytest.mark.parametrize(
    ("memory", "bug"), [*((name, None) for name in MEMORY), *(("all", bug) for bug in BUGS)]
)
def test_steps_have_no_race(ranks: Any, detector: Any, memory: str, bug: str | None) -> None:
    (chunk,) = llama.build(MODEL, Unscaled(), ranks, Parallel(), MEMORY[memory], "bf16")
    store = llama.unwrap(chunk).store
    if bug is not None:
        name, kind = BUGS[bug]
        stream = Stream(CUDA)
        stream.bugs = (kind,)
        setattr(store, name, stream)
    tokens = torch.zeros(1, LENGTH + 1, dtype=torch.int64, device="cuda")
    mask = torch.ones(1, LENGTH, device="cuda")

    def steps() -> None:
        with races_are_errors(detector):
            for _ in range(2):
                losses = [chunk(tokens[:, :-1], tokens[:, 1:], mask) for _ in range(2)]
                for loss in losses:
                    loss.backward()

    if bug is None:
        steps()
    else:
        with pytest.raises(_sanitizer.CUDASanitizerErrors):
            steps()
    torch.cuda.synchronize()


def tensors() -> list[torch.Tensor]:
    return [torch.ones(2**16, device=CUDA), torch.ones(2**12, device=CUDA)]


@pytest.mark.parametrize("fetched", [0, 1, 4], ids=["forward", "prefetched", "backward"])
def test_a_dropped_graph_frees_nothing_under_a_running_copy(detector: Any, fetched: int) -> None:
    store = HostStore(CUDA)
    with races_are_errors(detector):
        store.begin_forward()
        kept = [store.offload(tensors()) for _ in range(5)]
        if fetched:
            store.drop_device_copies()
        for _ in range(fetched):
            kept.pop().fetch()
        store._on_device.clear()  # the store's own references, as later offloads or the store's end drop them
        store._last = None
        del kept
        # Memory that has just been freed. Not after `store.close()`, which waits for the device.
        reused = [tensors() for _ in range(8)]
    del reused
    store.close()


def test_host_memory_that_cannot_be_page_locked() -> None:
    """One line for the user, and nothing left for the next kernel to fail with."""
    os.environ["NULL_GPU_REFUSE_PAGE_LOCKING"] = "1"
    try:
        store = HostStore(CUDA)
        x = tensors()
        with pytest.raises(UserError, match=r"cannot be page-locked \(CUDA error 2\)"):
            store.offload(x)
    finally:
        del os.environ["NULL_GPU_REFUSE_PAGE_LOCKING"]
    torch.ones(1, device=CUDA)
    assert store.bytes == 0
    [y, _] = store.offload(x).fetch()
    assert y.shape == x[0].shape
