"""How context-parallel ranks exchange buffers: one hop of a ring, messages between two ranks, and three
collectives.

A `Communicator` does both, over a torch ProcessGroup (here) or over threads (virtual_ranks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

# Older versions of PyTorch only have the longer names, newer ones warn about them.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def receive_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that a transfer fills before it is read; uninitialised."""
    return _allocate(tuple(shape), dtype=dtype, device=device)


_allocate = torch.empty  # tests fill it with NaN


Messages: TypeAlias = Sequence[tuple[int, Tensor]]
"""(rank, buffer) each."""


class Transfer(Protocol):
    """A transfer in flight."""

    def wait(self) -> None:
        """Return when the received buffer may be read and the sent one overwritten (by what is launched from
        now on)."""


class Communicator(Protocol):
    """One rank's place in a group of ranks.

    No call blocks. Buffers are contiguous, and every rank starts the same transfers in the same order.
    Neither buffer may be written, nor `receive` read, before the transfer was waited for.
    """

    rank: int
    size: int

    def send_recv(self, send: Tensor, receive: Tensor) -> Transfer:
        """Send `send` to rank + 1 and fill `receive` from rank - 1: one hop of the ring."""

    def exchange(self, sends: Messages, receives: Messages) -> Transfer:
        """Send buffers to ranks, and fill others from ranks; at most one to and one from each. Every rank
        calls it, also with none."""

    def all_to_all(self, send: Tensor, receive: Tensor) -> Transfer:
        """send[j] goes to rank j, receive[j] comes from rank j; both [size, ...]."""

    def all_gather(self, send: Tensor, receive: Tensor) -> Transfer:
        """receive [size, ...] becomes `send` [...] of every rank."""

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> Transfer:
        """receive [...] becomes the sum of send[this rank] over all ranks; send [size, ...]."""


Group: TypeAlias = "Communicator | dist.ProcessGroup | None"
"""What callers pass as a group of ranks; None = one rank."""


def communicator(group: Group) -> Communicator | None:
    """Return the communicator of `group`; None if it has just one rank."""
    comm: Communicator | None
    comm = ProcessGroupCommunicator(group) if isinstance(group, dist.ProcessGroup) else group
    return comm if comm is not None and comm.size > 1 else None


def rank_and_size(group: Group) -> tuple[int, int]:
    """Return (rank, size) of `group`: (0, 1) for None."""
    comm = communicator(group)
    return (0, 1) if comm is None else (comm.rank, comm.size)


class ProcessGroupCommunicator:
    """`Communicator` over the ranks of a torch ProcessGroup (NCCL or gloo), in group order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._started = 0

    def send_recv(self, send: Tensor, receive: Tensor) -> _Works:
        following, previous = ((self.rank + step) % self.size for step in (1, -1))
        return self.exchange([(following, send)], [(previous, receive)])

    def exchange(self, sends: Messages, receives: Messages) -> _Works:
        # Two may be in flight between the same two ranks (KV and its gradient). The tag distinguishes them if
        # the backend supports tags; NCCL keeps the order in which they were started.
        tag = self._started
        self._started += 1
        ops = [
            dist.P2POp(op, buffer, dist.get_global_rank(self.group, rank), self.group, tag)
            for op, messages in ((dist.isend, sends), (dist.irecv, receives))
            for rank, buffer in messages
        ]
        return _Works(dist.batch_isend_irecv(ops) if ops else [])

    def all_to_all(self, send: Tensor, receive: Tensor) -> _Works:
        return _Works([dist.all_to_all_single(receive, send, group=self.group, async_op=True)])

    def all_gather(self, send: Tensor, receive: Tensor) -> _Works:
        return _Works([_ALL_GATHER(receive.view(-1), send.view(-1), group=self.group, async_op=True)])

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> _Works:
        return _Works([_REDUCE_SCATTER(receive.view(-1), send.view(-1), group=self.group, async_op=True)])


class _Works:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        with _around_wait():
            for work in self._works:
                work.wait()


_around_wait: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def waits_inside(context: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `context()` around each wait for a transfer of a ProcessGroup in the block, on any thread: the
    backward's waits are on autograd's."""
    global _around_wait
    _around_wait = context
    try:
        yield
    finally:
        _around_wait = contextlib.nullcontext
