"""How ring attention passes buffers from rank to rank.

The ring needs little: who am I, how many are we, and "send this to the next rank while the previous one fills that".
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor


class Transfer(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when the received buffer may be read and the sent one overwritten (by what is launched from now on)."""


class Ring(Protocol):
    """One rank's place in a ring."""

    rank: int
    size: int

    def start(self, send: Tensor, receive: Tensor) -> Transfer:
        """Send `send` to rank + 1 and fill `receive` from rank - 1, without blocking.

        Both are contiguous; every rank starts the same transfers in the same order. Neither may be written, nor `receive`
        read, before the transfer was waited for.
        """


Group: TypeAlias = "Ring | dist.ProcessGroup | None"
"""What attention takes as its group; None = one rank."""


def as_ring(group: Group) -> Ring | None:
    """The ring over `group`; None where there is just one rank (None stands for that too)."""
    ring: Ring | None = GroupRing(group) if isinstance(group, dist.ProcessGroup) else group
    return ring if ring is not None and ring.size > 1 else None


class GroupRing:
    """A ring over the ranks of a torch ProcessGroup, in group order, by batched point-to-point operations (NCCL, gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._next, self._previous = (dist.get_global_rank(group, (self.rank + step) % self.size) for step in (1, -1))
        self._started = 0

    def start(self, send: Tensor, receive: Tensor) -> _Works:
        # Two transfers may be under way between the same two ranks (KV and its gradient): the tag keeps them apart where
        # the backend knows tags; NCCL keeps the order in which they were started.
        tag = self._started
        self._started += 1
        return _Works(dist.batch_isend_irecv([dist.P2POp(dist.isend, send, self._next, self.group, tag),
                                              dist.P2POp(dist.irecv, receive, self._previous, self.group, tag)]))


class _Works:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
