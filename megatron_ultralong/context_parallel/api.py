"""Attention of a context-parallel rank, for every cp_comm_type: what the model calls.

CP = U x R ranks. Inside groups of U adjacent ranks heads are exchanged for tokens (ulysses.py); the R ranks
that then hold the same heads pass keys round (p2p: ring.py) or gather them (all_gather.py). Any of U, R and
CP may be 1. A rank holds the zigzag shard of the sequence that zigzag.py gives it among CP; of a row
whose attention stays inside several documents those of its placement (placement.py) on the R ranks, whose
keys are sent where they are needed for either `cp_comm_type` (exchange.py).

Shapes: S tokens of the complete sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d
head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel import query_rows, zigzag
from megatron_ultralong.context_parallel.all_gather import all_gather_backward, all_gather_forward
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator, Group, communicator, rank_and_size
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.ring import ring_backward, ring_forward
from megatron_ultralong.context_parallel.ulysses import (
    AttentionBackward,
    AttentionForward,
    ulysses_backward,
    ulysses_forward,
)
from megatron_ultralong.errors import UserError

CommType = Literal["p2p", "all_gather"]
_DEFAULT = AttentionSpec()


@dataclass(frozen=True, kw_only=True)
class ContextGroups:
    """The ranks that share a sequence with this one, and how they communicate. The default is one rank."""

    ring: Group = None
    """The R ranks that hold the same heads: `zigzag.ring_ranks`."""
    ulysses: Group = None
    """The U ranks that exchange heads: `zigzag.ulysses_ranks`."""
    cp_comm_type: CommType = "p2p"
    """Between the ranks of `ring`."""

    @property
    def size(self) -> int:
        """CP."""
        return rank_and_size(self.ring)[1] * rank_and_size(self.ulysses)[1]

    @property
    def rank(self) -> int:
        """This rank's index among CP, as in zigzag.py."""
        (ring_rank, _), (ulysses_rank, ulysses_size) = map(rank_and_size, (self.ring, self.ulysses))
        return ring_rank * ulysses_size + ulysses_rank


def split_group(
    group: Group, ulysses: int = 1, cp_comm_type: CommType = "p2p", timeout: timedelta | None = None
) -> ContextGroups:
    """Make the groups inside a context-parallel group in which `ulysses` adjacent ranks exchange heads.

    A collective call of all ranks of `group` (and no others), once at start. timeout: of the new groups; None
    = torch's default. Raises UserError if CP is not a multiple of `ulysses`; ValueError if torch.distributed
    was started with a `device_id`: NCCL then splits communicators, in which all ranks of the world would have
    to take part. In that case make the groups of `zigzag.ring_ranks` and `zigzag.ulysses_ranks` yourself.
    """
    rank, cp = rank_and_size(group)
    members = [
        next(ranks for ranks in groups if rank in ranks)
        for groups in (zigzag.ring_ranks(cp, ulysses), zigzag.ulysses_ranks(cp, ulysses))
    ]
    ring, inside = (
        None if len(ranks) == 1 else group if len(ranks) == cp else _subgroup(group, ranks, timeout)
        for ranks in members
    )
    _connect(ring)
    return ContextGroups(ring=ring, ulysses=inside, cp_comm_type=cp_comm_type)


def attention(
    q: Tensor, k: Tensor, v: Tensor, groups: ContextGroups, spec: AttentionSpec = _DEFAULT
) -> Tensor:
    """Compute causal attention of q [b, h, s, d] over k, v [b, g, s, d] of all ranks -> [b, h, s, d];
    differentiable.

    Any strides, one floating dtype; h a multiple of g. All ranks must call it, and run its backward, in the
    same order. Raises ValueError for shapes or a placement that do not fit; UserError for heads that do not,
    and for several rows with a placement.
    """
    return _Attention.apply(q, k, v, groups, spec)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, groups: ContextGroups, spec: AttentionSpec = _DEFAULT
) -> tuple[Tensor, Tensor]:
    """Return (out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `attention`, outside autograd.

    With `spec.query_rows` q, out and lse have these rows only; cp_comm_type p2p without Ulysses supports
    that.
    """
    spec = _check(q, k, v, groups, spec)
    ring, ulysses = communicator(groups.ring), communicator(groups.ulysses)
    if spec.query_rows is not None:
        return query_rows.forward_rows(q, k, v, ring, spec)
    attend: AttentionForward
    if ring is None:
        attend = partial(kernels.forward_diagonal, blocks=_one_rank(k, ulysses, spec), spec=spec)
    elif groups.cp_comm_type == "p2p" or spec.placement is not None:
        attend = partial(ring_forward, ring=ring, spec=spec)
    else:
        attend = partial(all_gather_forward, comm=ring, spec=spec)
    return attend(q, k, v) if ulysses is None else ulysses_forward(q, k, v, ulysses, attend)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: ContextGroups,
    spec: AttentionSpec = _DEFAULT,
) -> QKVGradients:
    """Return gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as returned by
    `attention_forward`."""
    spec = _check(q, k, v, groups, spec)
    ring, ulysses = communicator(groups.ring), communicator(groups.ulysses)
    attend: AttentionBackward
    if ring is None:
        attend = partial(kernels.backward_diagonal, blocks=_one_rank(k, ulysses, spec), spec=spec)
    elif groups.cp_comm_type == "p2p" or spec.placement is not None:
        attend = partial(ring_backward, ring=ring, spec=spec)
    else:
        attend = partial(all_gather_backward, comm=ring, spec=spec)
    if ulysses is None:
        return attend(dout, q, k, v, out, lse)
    return ulysses_backward(dout, q, k, v, out, lse, ulysses, attend)


def attention_backward_rows(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: ContextGroups,
    spec: AttentionSpec,
    dkv_sum: Tensor,
) -> Tensor:
    """Return dq of the queries of `spec.query_rows`, and add their shares of dK and dV to dkv_sum [2, b, g,
    s, d], float32."""
    spec = _check(q, k, v, groups, spec)
    return query_rows.backward_rows(dout, q, k, v, out, lse, communicator(groups.ring), spec, dkv_sum)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, out and lse for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: ContextGroups, spec: AttentionSpec
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, groups, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.spec = groups, spec
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *attention_backward(dout, q, k, v, out, lse, ctx.groups, ctx.spec), None, None


def _one_rank(k: Tensor, ulysses: Communicator | None, spec: AttentionSpec) -> list[zigzag.AttentionBlock]:
    """The blocks of a rank that has the complete sequence, by itself or after the exchange of heads."""
    if spec.placement is not None:
        return spec.placement.schedules[0].own
    return [zigzag.block_between(0, 0, k.shape[2] * rank_and_size(ulysses)[1])]


def _check(q: Tensor, k: Tensor, v: Tensor, groups: ContextGroups, spec: AttentionSpec) -> AttentionSpec:
    """Return `spec` with its backend. Raises as `attention`; the kernels check the rest."""
    cp = groups.size
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and k.shape[3] == q.shape[3]
    s = k.shape[2] if fits else 0
    rows = [slice(0, s)] if spec.query_rows is None else spec.query_rows
    fits = fits and q.dtype == k.dtype == v.dtype and all(0 <= r.start <= r.stop <= s for r in rows)
    # A zigzag shard has two halves.
    even = (cp if spec.placement is None else rank_and_size(groups.ulysses)[1]) > 1
    if not fits or q.shape[2] != sum(r.stop - r.start for r in rows) or (even and s % 2):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [b, h, s, d] and [b, g, s, d] "
            f"twice, with {'s even and ' if even else ''}all of one dtype"
        )
    if spec.query_rows is not None and (groups.cp_comm_type != "p2p" or communicator(groups.ulysses)):
        raise ValueError("query rows require cp_comm_type p2p without Ulysses")
    placement = spec.placement
    if placement is None:
        return spec
    if q.shape[0] != 1:
        raise UserError(
            f"attention inside documents takes one packed row at a time, not {q.shape[0]}: set train.micro_batch to 1"
        )
    _, ring_size = rank_and_size(groups.ring)
    if (placement.seq_length, len(placement.runs)) != (s * cp, ring_size):
        raise ValueError(
            f"the row of {placement.seq_length} tokens is placed on {len(placement.runs)} ranks, not {s * cp} tokens "
            f"on the {ring_size} of the ring"
        )
    # Packed rows always have blocks of new shapes.
    return replace(spec, backend=spec.backend or kernels.without_cudnn(q))


def _connect(group: Group) -> None:
    """Have NCCL connect all ranks of a group now. It would at the first transfer, and wait for all of them;
    the first messages of a packed row may be between some."""
    if isinstance(group, dist.ProcessGroup) and "nccl" in str(dist.get_backend_config(group)):
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


def _subgroup(group: Any, ranks: list[int], timeout: timedelta | None) -> Group:
    if isinstance(group, dist.ProcessGroup):
        if dist.group.WORLD.bound_device_id is not None:
            raise ValueError(
                "cannot make groups of some of the ranks when torch.distributed was started with a device_id"
            )
        return dist.new_group(
            [dist.get_global_rank(group, rank) for rank in ranks],
            timeout=timeout,
            use_local_synchronization=True,
        )
    return group.subgroup(ranks)
