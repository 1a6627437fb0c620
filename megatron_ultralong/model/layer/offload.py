"""What layers keep for their backward, in host memory: copied out behind the forward, back in before the
backward needs it.

On a GPU the copies run on streams of their own between pinned host memory and the device. The last
`OFFLOADED_LAYERS_ON_GPU` layers' tensors stay there, so that device memory for checkpoints is bounded
whatever the number of layers. Host memory is what is kept at one time: buffers are used again and again. On a
CPU the same code copies between two places in host memory, without streams.
"""

from __future__ import annotations

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
        """Host memory taken so far."""
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self.passes = 0
        self._leaving: deque[Kept] = deque()
        self._last: Kept | None = None
        if self.cuda:
            self.outward, self.inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin(self) -> None:
        """A forward pass through a model chunk begins: what is kept from now on comes back in the opposite
        order."""
        self._last = None
        self.passes += 1

    def keep(self, tensors: Sequence[Tensor]) -> Kept:
        """Start copying `tensors` out; they must not be written to any more. UserError where the machine's
        memory is used up."""
        self._last = self.keep_after(self._last, tensors)
        return self._last

    def keep_after(self, before: Kept | None, tensors: Sequence[Tensor]) -> Kept:
        """`keep` of one of several series, each of which comes back in the opposite order: this after
        `before`."""
        while len(self._leaving) >= OFFLOADED_LAYERS_ON_GPU:
            self._leaving.popleft().leave()
        kept = Kept(self, tensors, before)
        self._leaving.append(kept)
        return kept

    def leave(self, but: int | None = None) -> None:
        """Let everything leave the device, but what pass number `but` kept: other micro-batches come back
        much later."""
        for kept in self._leaving:
            if kept.number != but:
                kept.leave()
        if but is None:
            self._leaving.clear()

    def take(self, like: Tensor) -> _Buffer:
        """A host buffer of the size of `like`."""
        size = like.numel() * like.element_size()
        if self._free[size]:
            return self._free[size].pop()
        available = host_bytes()
        if size > available:
            raise UserError(
                f"memory.offload: {available / 2**30:.1f} GiB of host memory are left after {self.bytes / 2**30:.1f} GiB of "
                f"offloaded tensors on this rank, and a layer needs {size / 2**30:.1f} GiB more; raise parallel.cp, tp or pp, or "
                "use memory.offload=layer_inputs"
            )
        self.bytes += size
        return _Buffer(size, pinned=self.cuda)

    def give_back(self, buffers: list[_Buffer]) -> None:
        for buffer in buffers:
            self._free[buffer.size].append(buffer)

    def close(self) -> None:
        """Give the host memory back, once nothing that was kept is needed any more."""
        self._leaving.clear()
        self._last = None
        self.bytes -= sum(size * len(buffers) for size, buffers in self._free.items())
        self._free.clear()


class Kept:
    """Tensors of one layer, or of a chunk of it, in host memory. `get` once, or any number of times with
    `again`."""

    def __init__(self, store: HostStore, tensors: Sequence[Tensor], before: Kept | None) -> None:
        self._store, self._before = store, before
        self._device: list[Tensor] | None = list(tensors)
        self.number = store.passes
        self._forms = [_Form.of(x) for x in tensors]
        self._buffers = [store.take(x) for x in tensors]
        self._arrival: Any = None
        if store.cuda:
            store.outward.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(store.outward):
                for buffer, form, x in zip(self._buffers, self._forms, tensors, strict=True):
                    buffer.fill(form, x)
            self._left = store.outward.record_event()
        else:
            for buffer, form, x in zip(self._buffers, self._forms, tensors, strict=True):
                buffer.fill(form, x)

    def leave(self) -> None:
        """Let go of the tensors on the device. What the device does from now on waits for the copy, so their
        memory may be used again at once, without the host waiting."""
        if self._device is not None and self._arrival is None and self._buffers:
            if self._store.cuda:
                torch.cuda.current_stream().wait_event(self._left)
            self._device = None

    def fetch(self) -> None:
        """Start copying back, if it is not there."""
        if self._device is not None or not self._buffers:
            return
        store = self._store
        self._device = [
            torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
            for form in self._forms
        ]
        copies = [
            (x, buffer.read(form))
            for x, buffer, form in zip(self._device, self._buffers, self._forms, strict=True)
        ]
        if store.cuda:
            store.inward.wait_stream(
                torch.cuda.current_stream()
            )  # whoever had the new tensors' memory before is done with it
            store.inward.wait_event(self._left)
            with torch.cuda.stream(store.inward):
                for x, host in copies:
                    x.copy_(host, non_blocking=True)
            self._arrival = store.inward.record_event()
            for buffer in self._buffers:
                buffer.last_use = self._arrival
        else:
            for x, host in copies:
                x.copy_(host)

    def get(self, again: bool = False) -> list[Tensor]:
        """The tensors on the device, where those kept before start to come as well. The host memory is free
        again, unless they are to be asked for `again`."""
        self._store.leave(but=self.number)
        if again:
            self.leave()  # whoever gets tensors lets go of them without waiting for the copy out, which is to be read once more
        self.fetch()
        if self._before is not None:
            self._before.fetch()
        assert self._device is not None, "a layer's kept tensors were asked for twice"
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
        tensors, self._device, self._arrival = self._device, None, None
        if not again:
            self._before = None
            self._release()
        return tensors

    def __del__(self) -> None:  # a graph that is dropped without a backward
        self._release()

    def _release(self) -> None:
        buffers, self._buffers = getattr(self, "_buffers", []), []
        self._store.give_back(buffers)


class Rows:
    """A tensor [t, ...] in host memory, of which the device has no more than the rows that were asked for.

    They come, and are kept, by the same slices each time: fastest in descending order, the next under way
    while one is used.
    """

    def __init__(self, store: HostStore, shape: torch.Size) -> None:
        self.shape = shape
        self._store = store
        self._parts: dict[int, Kept] = {}
        self._last: Kept | None = None

    def keep(self, rows: slice, x: Tensor) -> None:
        """`rows` are x, which must not be written to any more. Errors as of `HostStore.keep`."""
        self._last = self._parts[rows.start] = self._store.keep_after(self._last, [x])

    def __getitem__(self, rows: slice) -> Tensor:
        return self._parts[rows.start].get(again=True)[0]

    def __len__(self) -> int:
        return self.shape[0]


class _Form(NamedTuple):
    """What a tensor looks like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _Form:
        """That of x, packed in its own order of dimensions: copies between different orders would go through
        one more buffer on a GPU."""
        return cls(x.shape, torch.empty_like(x, device="meta").stride(), x.dtype, x.device)


class _Buffer:
    """Host memory of one tensor, page-locked where a GPU copies; any tensor of its size fits. `last_use`: the
    copy out of it that must end before it is filled again."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = size
        self.last_use: Any = None
        if not pinned or not size:
            self.bytes = torch.empty(size, dtype=torch.uint8)
            return
        # Pages of its own, locked one by one: torch's pinned allocator rounds every size up to a power of
        # two.
        self.bytes = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))
        if error != 0:
            raise UserError(
                f"memory.offload: {size / 2**30:.1f} GiB of host memory cannot be page-locked (CUDA error {error}); raise the "
                "container's locked-memory limit (ulimit -l unlimited)"
            )
        weakref.finalize(self, _unlock, self.bytes).atexit = False

    def fill(self, form: _Form, x: Tensor) -> None:
        if self.last_use is not None:
            torch.cuda.current_stream().wait_event(self.last_use)
            self.last_use = None
        self.read(form).copy_(x, non_blocking=True)

    def read(self, form: _Form) -> Tensor:
        """The tensor in it."""
        return self.bytes.view(form.dtype).as_strided(form.shape, form.stride)


def _unlock(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
