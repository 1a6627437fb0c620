"""What layers keep for their backward, in host memory: copied out behind the forward, back in before the backward needs it.

On a GPU the copies run on streams of their own between pinned host memory and the device. The last `OFFLOADED_LAYERS_ON_GPU` layers'
tensors stay there, so that device memory for checkpoints is bounded whatever the number of layers. Host memory is what is kept at one
time: buffers are used again and again. On a CPU the same code copies between two places in host memory, without streams.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_ultralong.config import OFFLOADED_LAYERS_ON_GPU, UserError

RESERVE = 0.05
"""Share of the machine's memory that is never taken."""


class HostStore:
    """The host buffers of one rank, and the streams that fill and read them. One serves every model chunk of the rank."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes = 0
        """Host memory taken so far."""
        self._free: dict[Any, list[_Buffer]] = defaultdict(list)
        self._leaving: deque[Kept] = deque()
        self._last: Kept | None = None
        if self.cuda:
            self.outward, self.inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin(self) -> None:
        """A forward pass through a model chunk begins: what is kept from now on comes back in the opposite order."""
        self._last = None

    def keep(self, tensors: Sequence[Tensor]) -> Kept:
        """Start copying `tensors` out; they must not be written to any more. UserError where the machine's memory is used up."""
        while len(self._leaving) >= OFFLOADED_LAYERS_ON_GPU:
            self._leaving.popleft().leave()
        kept = Kept(self, tensors, self._last)
        self._leaving.append(kept)
        self._last = kept
        return kept

    def take(self, like: Tensor) -> _Buffer:
        """A host buffer of the shape, strides and dtype of `like`."""
        key = (like.shape, like.stride(), like.dtype)
        if self._free[key]:
            return self._free[key].pop()
        size = like.numel() * like.element_size()
        memory = psutil.virtual_memory()
        if size > memory.available - RESERVE * memory.total:
            raise UserError(f"memory.offload: {memory.available / 2**30:.1f} GiB of host memory are left after {self.bytes / 2**30:.1f} GiB of "
                            f"offloaded tensors on this rank, and a layer needs {size / 2**30:.1f} GiB more; raise parallel.cp, tp or pp, or "
                            "use memory.offload=checkpoints")
        self.bytes += size
        return _Buffer(like, key, pinned=self.cuda)

    def give_back(self, buffers: list[_Buffer]) -> None:
        for buffer in buffers:
            self._free[buffer.key].append(buffer)

    def close(self) -> None:
        """Give the host memory back, once nothing that was kept is needed any more."""
        self._leaving.clear()
        self._last = None
        if self.cuda:
            torch.cuda.synchronize()
        for buffer in [buffer for buffers in self._free.values() for buffer in buffers]:
            self.bytes -= buffer.host.numel() * buffer.host.element_size()
            buffer.unpin()
        self._free.clear()


class Kept:
    """Tensors of one layer in host memory. `get` once."""

    def __init__(self, store: HostStore, tensors: Sequence[Tensor], before: Kept | None) -> None:
        self._store, self._before = store, before
        self._device: list[Tensor] | None = list(tensors)
        self._places = [x.device for x in tensors]
        self._buffers = [store.take(x) for x in tensors]
        self._arrival: Any = None
        if store.cuda:
            store.outward.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(store.outward):
                for buffer, x in zip(self._buffers, tensors, strict=True):
                    buffer.fill(x)
            self._left = store.outward.record_event()
        else:
            for buffer, x in zip(self._buffers, tensors, strict=True):
                buffer.fill(x)

    def leave(self) -> None:
        """Let go of the tensors on the device. What the device does from now on waits for the copy, so their memory may be used
        again at once, without the host waiting."""
        if self._device is not None and self._arrival is None and self._buffers:
            if self._store.cuda:
                torch.cuda.current_stream().wait_event(self._left)
            self._device = None

    def fetch(self) -> None:
        """Start copying back, if it is not there."""
        if self._device is not None or not self._buffers:
            return
        store = self._store
        self._device = [torch.empty_like(buffer.host, device=place) for buffer, place in zip(self._buffers, self._places, strict=True)]
        if store.cuda:
            store.inward.wait_stream(torch.cuda.current_stream())  # whoever had the new tensors' memory before is done with it
            store.inward.wait_event(self._left)
            with torch.cuda.stream(store.inward):
                for x, buffer in zip(self._device, self._buffers, strict=True):
                    x.copy_(buffer.host, non_blocking=True)
            self._arrival = store.inward.record_event()
            for buffer in self._buffers:
                buffer.last_use = self._arrival
        else:
            for x, buffer in zip(self._device, self._buffers, strict=True):
                x.copy_(buffer.host)

    def get(self) -> list[Tensor]:
        """The tensors on the device, where the layer before starts to come as well. The host memory is free again."""
        self.fetch()
        if self._before is not None:
            self._before.fetch()
        assert self._device is not None, "a layer's kept tensors were asked for twice"
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
        tensors, self._device, self._before = self._device, None, None
        self._release()
        return tensors

    def __del__(self) -> None:  # a graph that is dropped without a backward
        self._release()

    def _release(self) -> None:
        buffers, self._buffers = getattr(self, "_buffers", []), []
        self._store.give_back(buffers)


class _Buffer:
    """Host memory of one tensor, page-locked where a GPU copies. `last_use`: the copy out of it that must end first."""

    def __init__(self, like: Tensor, key: Any, pinned: bool) -> None:
        # In the order of `like` in memory: copies between different orders would go through one more buffer on the device.
        self.host = torch.empty_like(like, device="cpu")
        self.key = key
        self.last_use: Any = None
        self._pinned = pinned
        if pinned:
            # Registered, not taken from torch's pinned allocator: that rounds every size up to a power of two.
            error = torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), self.host.numel() * self.host.element_size(), 0)
            if int(error) != 0:
                raise UserError(f"memory.offload: {self.host.numel() * self.host.element_size() / 2**30:.1f} GiB of host memory cannot be "
                                f"page-locked (CUDA error {int(error)}); raise the container's locked-memory limit (ulimit -l unlimited)")

    def fill(self, x: Tensor) -> None:
        if self.last_use is not None:
            torch.cuda.current_stream().wait_event(self.last_use)
            self.last_use = None
        self.host.copy_(x, non_blocking=True)

    def unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())
            self._pinned = False
