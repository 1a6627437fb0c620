"""Attention of a context-parallel rank, whichever way its ranks work together: what the model calls.

CP = U x R ranks. Inside groups of U adjacent ranks heads are exchanged for tokens (ulysses.py); between the R
ranks that then hold the same heads, keys go round (ring.py) or are gathered (all_gather.py). Any of U, R and
CP may be 1. Whatever the way, a rank holds the zigzag share of the sequence that zigzag.py gives it among CP.

Shapes: S tokens of the whole sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.all_gather import gather_backward, gather_forward
from megatron_ultralong.context_parallel.autograd import Backward, Forward, differentiable
from megatron_ultralong.context_parallel.comm import PeerGroup, as_peers
from megatron_ultralong.context_parallel.kernels.select import Gradients
from megatron_ultralong.context_parallel.ring import ring_backward, ring_forward
from megatron_ultralong.context_parallel.ulysses import ulysses_backward, ulysses_forward
from megatron_ultralong.context_parallel.zigzag import Starts

CommType = Literal["p2p", "all_gather"]


@dataclass(frozen=True, kw_only=True)
class ContextGroups:
    """Whom a rank shares a sequence with, and how. The default is one rank alone."""

    ring: PeerGroup = None
    """The R ranks that hold the same heads: `layout.ring_ranks`."""
    ulysses: PeerGroup = None
    """The U ranks that exchange heads: `layout.ulysses_ranks`."""
    cp_comm_type: CommType = "p2p"
    """What goes on between the ranks of `ring`."""

    @property
    def size(self) -> int:
        """CP."""
        return _size(self.ring) * _size(self.ulysses)

    @property
    def rank(self) -> int:
        """This rank's place among CP, as zigzag.py counts."""
        return _rank(self.ring) * _size(self.ulysses) + _rank(self.ulysses)


def split(
    group: PeerGroup, ulysses: int = 1, cp_comm_type: CommType = "p2p", timeout: timedelta | None = None
) -> ContextGroups:
    """The groups of a context-parallel group in which `ulysses` adjacent ranks exchange heads.

    A collective call of all ranks of `group` (of no others), once at start. timeout: of the new groups; None
    = torch's own. UserError where CP is no multiple of `ulysses`; ValueError where torch.distributed was
    started with a `device_id`: NCCL then splits communicators, in which all ranks of the world would have to
    take part. Make the groups of `layout.ring_ranks` and `layout.ulysses_ranks` yourself there.
    """
    cp, rank = _size(group), _rank(group)
    ours = [
        next(ranks for ranks in groups if rank in ranks)
        for groups in (zigzag.ring_ranks(cp, ulysses), zigzag.ulysses_ranks(cp, ulysses))
    ]
    ring, inside = (
        None if len(ranks) == 1 else group if len(ranks) == cp else _subgroup(group, ranks, timeout)
        for ranks in ours
    )
    return ContextGroups(ring=ring, ulysses=inside, cp_comm_type=cp_comm_type)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: ContextGroups,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
) -> Tensor:
    """Causal attention of q [b, h, s, d] over k, v [b, g, s, d] of all ranks -> [b, h, s, d]; differentiable.

    Any strides, one floating dtype; h a multiple of g. All ranks must call it, and run its backward, in the
    same order. scale: of the logits, default d ** -0.5. starts: positions in the whole row (b = 1) at which
    documents start, where attention is to stay inside them; the same on all ranks. ValueError for shapes that
    do not fit; UserError for heads or starts that do not.
    """
    return differentiable(
        q,
        k,
        v,
        partial(attention_forward, groups=groups, scale=scale, starts=starts),
        partial(attention_backward, groups=groups, scale=scale, starts=starts),
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: ContextGroups,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
    rows: Sequence[slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `attention`, outside autograd.

    rows: q holds these of the s local tokens only, and so do out and lse; the ring alone can do that.
    """
    if rows is not None:
        assert groups.cp_comm_type == "p2p" and _size(groups.ulysses) == 1
        return ring_forward(q, k, v, groups.ring, scale=scale, starts=starts, rows=rows)
    between = {"p2p": ring_forward, "all_gather": gather_forward}[groups.cp_comm_type]
    attend: Forward = partial(between, group=groups.ring, scale=scale, starts=starts)
    return ulysses_forward(q, k, v, groups.ulysses, attend)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: ContextGroups,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
    rows: Sequence[slice] | None = None,
    sums: Tensor | None = None,
) -> Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as `attention_forward` gave them.

    rows: as there; dk and dv are then these rows' shares, in float32, to be added up. sums [2, b, g, s, d],
    float32: to which they are added instead.
    """
    if rows is not None:
        assert groups.cp_comm_type == "p2p" and _size(groups.ulysses) == 1
        return ring_backward(
            dout, q, k, v, out, lse, groups.ring, scale=scale, starts=starts, rows=rows, sums=sums
        )
    between = {"p2p": ring_backward, "all_gather": gather_backward}[groups.cp_comm_type]
    attend: Backward = partial(between, group=groups.ring, scale=scale, starts=starts)
    return ulysses_backward(dout, q, k, v, out, lse, groups.ulysses, attend)


def _size(group: PeerGroup) -> int:
    peers = as_peers(group)
    return 1 if peers is None else peers.size


def _rank(group: PeerGroup) -> int:
    peers = as_peers(group)
    return 0 if peers is None else peers.rank


def _subgroup(group: Any, ranks: list[int], timeout: timedelta | None) -> PeerGroup:
    if isinstance(group, dist.ProcessGroup):
        if dist.group.WORLD.bound_device_id is not None:
            raise ValueError(
                "groups of some ranks cannot be made on their own where torch.distributed was started with a device_id"
            )
        return dist.new_group(
            [dist.get_global_rank(group, rank) for rank in ranks],
            timeout=timeout,
            use_local_synchronization=True,
        )
    return group.subgroup(ranks)
