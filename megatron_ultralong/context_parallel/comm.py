"""How context parallelism passes buffers from rank to rank.

The ring needs little: who am I, how many are we, and "send this to the next rank while the previous one fills
that". The other ways need three collectives. Both come over a torch ProcessGroup, or over threads
(virtual_ranks.py).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor

# Older versions of PyTorch only know the longer names, newer ones warn of them.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transfer(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when the received buffer may be read and the sent one overwritten (by what is launched from
        now on)."""


class Ring(Protocol):
    """One rank's place in a ring."""

    rank: int
    size: int

    def start(self, send: Tensor, receive: Tensor) -> Transfer:
        """Send `send` to rank + 1 and fill `receive` from rank - 1, without blocking.

        Both are contiguous; every rank starts the same transfers in the same order. Neither may be written,
        nor `receive` read, before the transfer was waited for.
        """


class Peers(Ring, Protocol):
    """One rank among others with which it also runs collectives.

    None of them blocks; the rules of `Ring.start` hold for their buffers.
    """

    def all_to_all(self, send: Tensor, receive: Tensor) -> Transfer:
        """send[j] goes to rank j, receive[j] comes from rank j; both [size, ...]."""

    def all_gather(self, send: Tensor, receive: Tensor) -> Transfer:
        """receive [size, ...] becomes `send` [...] of every rank."""

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> Transfer:
        """receive [...] becomes the sum of send[this rank] over all ranks; send [size, ...]."""


Group: TypeAlias = "Ring | dist.ProcessGroup | None"
"""What the ring takes as its group; None = one rank."""
PeerGroup: TypeAlias = "Peers | dist.ProcessGroup | None"
"""What the other ways take as theirs."""


def as_ring(group: Group) -> Ring | None:
    """The ring over `group`; None where there is just one rank (None stands for that too)."""
    ring: Ring | None = GroupRing(group) if isinstance(group, dist.ProcessGroup) else group
    return ring if ring is not None and ring.size > 1 else None


def as_peers(group: PeerGroup) -> Peers | None:
    """As `as_ring`, with collectives."""
    peers: Peers | None = GroupRing(group) if isinstance(group, dist.ProcessGroup) else group
    return peers if peers is not None and peers.size > 1 else None


class GroupRing:
    """`Peers` over the ranks of a torch ProcessGroup, in group order; hops are batched point-to-point
    operations (NCCL, gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._next, self._previous = (
            dist.get_global_rank(group, (self.rank + step) % self.size) for step in (1, -1)
        )
        self._started = 0

    def start(self, send: Tensor, receive: Tensor) -> _Works:
        # Two transfers may be under way between the same two ranks (KV and its gradient): the tag keeps them
        # apart where the backend knows tags; NCCL keeps the order in which they were started.
        tag = self._started
        self._started += 1
        return _Works(
            dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, send, self._next, self.group, tag),
                    dist.P2POp(dist.irecv, receive, self._previous, self.group, tag),
                ]
            )
        )

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
        for work in self._works:
            work.wait()
