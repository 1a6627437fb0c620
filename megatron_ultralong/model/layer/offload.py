"""memory.offload: what layers keep for their backward, in host memory. It is copied to the host during the
forward, and back before the backward needs it.

On a GPU the copies run on streams of their own between pinned host memory and the device. The tensors of the
last `OFFLOADED_LAYERS_ON_GPU` layers stay there, so that device memory for them is bounded for any number of
layers. Host memory is what is kept at one time: buffers are reused. On a CPU the same code copies between two
places in host memory, without streams.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.config import OFFLOADED_LAYERS_ON_GPU
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime.memory import host_bytes


class HostStore:
    """The host buffers of one rank, and the streams that fill and read them. One serves every model chunk of
    the rank."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes = 0
        """Host memory allocated so far."""
        self.forward_pass = 0
        self._free: dict[int, list[_HostBuffer]] = defaultdict(list)
        self._on_device: deque[OffloadedTensors] = deque()
        self._last: OffloadedTensors | None = None
        if self.cuda:
            self.to_host, self.to_device = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin_forward(self) -> None:
        """Start the forward pass of a model chunk: what is offloaded from now on is fetched in reverse
        order."""
        self._last = None
        self.forward_pass += 1

    def offload(self, tensors: Sequence[Tensor]) -> OffloadedTensors:
        """Start copying `tensors` to the host; they must not be written to any more. Raises UserError if the
        machine has no memory left."""
        self._last = self.offload_after(self._last, tensors)
        return self._last

    def offload_after(self, previous: OffloadedTensors | None, tensors: Sequence[Tensor]) -> OffloadedTensors:
        """`offload` in one of several series, each of which is fetched in reverse order: this after
        `previous`."""
        while len(self._on_device) >= OFFLOADED_LAYERS_ON_GPU:
            self._on_device.popleft().drop_device_copy()
        offloaded = OffloadedTensors(self, tensors, previous)
        self._on_device.append(offloaded)
        return offloaded

    def drop_device_copies(self, except_pass: int | None = None) -> None:
        """Free the device copies of everything but what forward pass `except_pass` offloaded: other
        micro-batches are needed much later."""
        for offloaded in self._on_device:
            if offloaded.forward_pass != except_pass:
                offloaded.drop_device_copy()
        if except_pass is None:
            self._on_device.clear()

    def acquire_buffer(self, like: Tensor) -> _HostBuffer:
        """Return a free host buffer of the size of `like`."""
        size = like.numel() * like.element_size()
        if self._free[size]:
            return self._free[size].pop()
        available = host_bytes()
        if size > available:
            raise UserError(
                f"memory.offload: {available / 2**30:.1f} GiB of host memory are left after "
                f"{self.bytes / 2**30:.1f} GiB of offloaded tensors on this rank, and a layer needs "
                f"{size / 2**30:.1f} GiB more; raise parallel.cp, tp or pp, or use memory.offload=layer_inputs"
            )
        buffer = _HostBuffer(size, pinned=self.cuda)
        self.bytes += size
        return buffer

    def release_buffers(self, buffers: list[_HostBuffer]) -> None:
        for buffer in buffers:
            self._free[buffer.size].append(buffer)

    def close(self) -> None:
        """Free the host memory, once nothing that was offloaded is needed any more."""
        self._on_device.clear()
        self._last = None
        self.bytes -= sum(size * len(buffers) for size, buffers in self._free.items())
        self._free.clear()


class OffloadedTensors:
    """Tensors of one layer, or of a chunk of it, in host memory. `fetch` once, or any number of times with
    `keep`."""

    def __init__(
        self, store: HostStore, tensors: Sequence[Tensor], previous: OffloadedTensors | None
    ) -> None:
        self._store, self._previous = store, previous
        self._device_copy: list[Tensor] | None = None
        self.forward_pass = store.forward_pass
        self._layouts = [_TensorLayout.of(x) for x in tensors]
        self._buffers = [store.acquire_buffer(x) for x in tensors]
        self._device_copy = list(tensors)
        self._arrival: Any = None
        if store.cuda:
            self._compute: Any = torch.cuda.current_stream()
            store.to_host.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(store.to_host):
                self._copy_to_host(tensors)
            self._copied_out = store.to_host.record_event()
        else:
            self._copy_to_host(tensors)

    @property
    def on_device(self) -> bool:
        """Whether a device copy exists or is on its way."""
        return self._device_copy is not None

    def drop_device_copy(self) -> None:
        """Let go of the tensors on the device. What the device does from now on waits for the copy, so their
        memory may be reused at once, without the host waiting."""
        if self._device_copy is not None and self._arrival is None and self._buffers:
            if self._store.cuda:
                torch.cuda.current_stream().wait_event(self._copied_out)
            self._device_copy = None

    def prefetch(self) -> None:
        """Start copying back, unless a device copy exists."""
        if self._device_copy is not None or not self._buffers:
            return
        store = self._store
        self._device_copy = [
            torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=layout.device)
            for layout in self._layouts
        ]
        copies = [
            (x, buffer.view_as(layout))
            for x, buffer, layout in zip(self._device_copy, self._buffers, self._layouts, strict=True)
        ]
        if store.cuda:
            # Earlier work on the memory that the new tensors reuse must have finished.
            self._compute = torch.cuda.current_stream()
            store.to_device.wait_stream(self._compute)
            store.to_device.wait_event(self._copied_out)
            with torch.cuda.stream(store.to_device):
                for x, host in copies:
                    x.copy_(host, non_blocking=True)
            self._arrival = store.to_device.record_event()
            for buffer in self._buffers:
                buffer.last_use = self._arrival
        else:
            for x, host in copies:
                x.copy_(host)

    def fetch(self, keep: bool = False) -> list[Tensor]:
        """Return the tensors on the device, and start fetching those offloaded before them. The host memory
        is freed unless `keep`."""
        self._store.drop_device_copies(except_pass=self.forward_pass)
        if keep:
            # The caller will free the tensors without waiting for the copy to the host, which is still
            # needed. Otherwise it may go on reading memory that has been freed: nobody uses it any more.
            self.drop_device_copy()
        self.prefetch()
        if self._previous is not None:
            self._previous.prefetch()
        assert self._device_copy is not None, "a layer's offloaded tensors were fetched twice"
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
        tensors, self._device_copy, self._arrival = self._device_copy, None, None
        if not keep:
            self._previous = None
            self._release()
        return tensors

    def __del__(self) -> None:  # a graph that is dropped without a backward
        if getattr(self, "_device_copy", None) is not None and self._store.cuda:
            # The stream that the device copy was allocated for may reuse its memory at once: not before the
            # copy to or from the host has ended.
            self._compute.wait_event(self._copied_out if self._arrival is None else self._arrival)
        self._release()

    def _copy_to_host(self, tensors: Sequence[Tensor]) -> None:
        for buffer, layout, x in zip(self._buffers, self._layouts, tensors, strict=True):
            buffer.copy_from(layout, x)

    def _release(self) -> None:
        buffers, self._buffers = getattr(self, "_buffers", []), []
        self._store.release_buffers(buffers)


class OffloadedHiddenStates:
    """A tensor [t, ...] in host memory, of which only the requested rows are on the device.

    Rows are offloaded and fetched by the same slices: fastest in descending order, when the next are copied
    back while one is used.
    """

    def __init__(self, store: HostStore, shape: torch.Size) -> None:
        self.shape = shape
        self._store = store
        self._chunks: dict[int, OffloadedTensors] = {}
        self._last: OffloadedTensors | None = None

    def offload(self, rows: slice, x: Tensor) -> None:
        """Start copying x, the tensor's `rows`, to the host; x must not be written to any more. Raises as
        `HostStore.offload`."""
        self._last = self._chunks[rows.start] = self._store.offload_after(self._last, [x])

    def __getitem__(self, rows: slice) -> Tensor:
        return self._chunks[rows.start].fetch(keep=True)[0]

    def __len__(self) -> int:
        return self.shape[0]


class _TensorLayout(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _TensorLayout:
        """The layout of x, dense in its own order of dimensions: copies between different orders would need
        another buffer on a GPU."""
        return cls(x.shape, torch.empty_like(x, device="meta").stride(), x.dtype, x.device)


class _HostBuffer:
    """Host memory of one tensor, page-locked if a GPU copies; any tensor of its size fits. `last_use`: the
    copy out of it that must end before it is filled again."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = size
        self.last_use: Any = None
        if not pinned or not size:
            self.bytes = torch.empty(size, dtype=torch.uint8)
            return
        # Its own pages, locked one by one: torch's pinned allocator rounds every size up to a power of two.
        # Each is a mapping: three a layer and chunk of queries, so 6,144 for 32 layers and 1M tokens in
        # chunks of 16,384; Linux allows 65,530.
        try:
            pages = mmap.mmap(-1, size)
        except OSError as failure:
            raise UserError(
                f"memory.offload: {size / 2**30:.3f} GiB of host memory cannot be mapped ({failure.strerror}): "
                "raise memory.layer_chunk, or the number of mappings that a process may have "
                "(sysctl vm.max_map_count)"
            ) from None
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))
        if error != 0:
            _take_pending_error()
            raise UserError(
                f"memory.offload: {size / 2**30:.1f} GiB of host memory cannot be page-locked (CUDA error "
                f"{error}); raise the container's locked-memory limit (ulimit -l unlimited)"
            )
        weakref.finalize(self, _unlock, self.bytes).atexit = False

    def copy_from(self, layout: _TensorLayout, x: Tensor) -> None:
        if self.last_use is not None:
            torch.cuda.current_stream().wait_event(self.last_use)
            self.last_use = None
        self.view_as(layout).copy_(x, non_blocking=True)

    def view_as(self, layout: _TensorLayout) -> Tensor:
        """Return the tensor stored in this buffer."""
        return self.bytes.view(layout.dtype).as_strided(layout.shape, layout.stride)


def _take_pending_error() -> None:
    """Take the error of a failed call from CUDA's runtime, which otherwise keeps it for whoever asks next:
    PyTorch after the next kernel, which would then fail in its place."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _unlock(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
