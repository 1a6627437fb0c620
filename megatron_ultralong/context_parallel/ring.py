"""Ring attention: exact causal attention over a sequence of which every rank holds two zigzag pieces.

Keys and values travel from rank to rank while queries stay (Liu et al., arXiv 2310.01889); the zigzag order
(zigzag.py) gives every rank the same work. The backward is its own ring: it takes the final output and
logsumexp, so it never computes the forward again (as FlashAttention's backward, arXiv 2205.14135), and the
gradients of keys and values travel with them, in float32, until they are home. In packed rows (`starts`,
zigzag.py) a hop computes only what shares a document.

Shapes: S tokens of the whole sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d head
dimension. Memory beyond inputs and outputs, at any CP: two KV buffers [2, b, g, s, d] and the float32 output;
in the backward also dQ in float32 and two float32 dKV buffers. On the wire, a rank and layer: forward CP - 1
KV buffers; backward CP - 1 KV buffers and CP float32 dKV buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ultralong.config import KEY_BLOCK
from megatron_ultralong.context_parallel import partial_attention, zigzag
from megatron_ultralong.context_parallel.autograd import differentiable
from megatron_ultralong.context_parallel.comm import Group, Transfer, as_ring
from megatron_ultralong.context_parallel.kernels.select import Gradients
from megatron_ultralong.context_parallel.zigzag import Starts


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: Group, *, scale: float | None = None, starts: Starts | None = None
) -> Tensor:
    """Causal attention of q [b, h, s, d] over k, v [b, g, s, d] of all ranks of `group` -> [b, h, s, d];
    differentiable.

    Any strides and floating dtype; h a multiple of g. Every rank of the group must call it, and run its
    backward, in the same order as the others. group: a torch ProcessGroup, a `comm.Ring`, or None for one
    rank that holds the whole sequence. scale: of the logits, default d ** -0.5. starts: positions in the
    whole row (b = 1) at which documents start, where attention is to stay inside them. ValueError for shapes
    that do not fit, UserError for starts that do not.
    """
    ring = as_ring(group)
    return differentiable(
        q,
        k,
        v,
        partial(ring_forward, group=ring, scale=scale, starts=starts),
        partial(ring_backward, group=ring, scale=scale, starts=starts),
    )


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
    rows: Sequence[slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `ring_attention`, outside autograd.

    With them, `ring_backward` needs no second forward. rows: q holds these of the s local tokens
    only, one after the other, and so do out and lse.
    """
    ring = as_ring(group)
    rank, size = (0, 1) if ring is None else (ring.rank, ring.size)
    s, documents = partial_attention.check(q, k, v, starts, size, rows)
    rows, backend = rows or [slice(0, s)], partial_attention.backend(q, documents)
    here, spare = (
        ((k, v), None) if ring is None else _pack(k, v)
    )  # KV of `source`, and of the rank before it once it has arrived
    for hop in range(size):
        transfer = ring.start(here, spare) if ring is not None and hop < size - 1 else None
        causal, others = zigzag.rows_of(zigzag.parts(rank, (rank - hop) % size, s, size, documents), rows)
        k_here, v_here = here
        if hop == 0:
            out, lse = partial_attention.forward_own(
                q, _pick(k_here, rows), _pick(v_here, rows), causal, scale, backend
            )
            if size > 1 or others:
                out = torch.empty_like(q, dtype=partial_attention.wide(q)).copy_(
                    out
                )  # the layout of q, so that the backward need not copy
        for part in others:
            partial_attention.merge_part(out, lse, q, k_here, v_here, part, scale, backend)
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
    return out.to(q.dtype), lse


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: Group,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
    rows: Sequence[slice] | None = None,
    sums: Tensor | None = None,
) -> Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as `ring_forward` gave them.

    rows: as there; dk and dv are then these rows' shares, in float32, to be added up. sums [2, b, g, s, d]:
    those of the rows before, to which these are added; dk and dv are then its halves.
    """
    ring = as_ring(group)
    rank, size = (0, 1) if ring is None else (ring.rank, ring.size)
    s, documents = partial_attention.check(q, k, v, starts, size, rows)
    backend = partial_attention.backend(q, documents)
    if ring is None and rows is None:
        return partial_attention.backward_own(
            dout, q, k, v, out, lse, zigzag.parts(0, 0, s, 1, documents), scale, backend
        )
    kv_dtype = k.dtype if rows is None else partial_attention.wide(k)
    rows = rows or [slice(0, s)]
    here, spare = ((k, v), None) if ring is None else _pack(k, v)
    # dKV visits the ranks as KV does, one hop behind: each adds its share and passes it on; CP hops bring it
    # home.
    dkv_here = (
        torch.zeros((2, *k.shape), dtype=partial_attention.wide(k), device=k.device) if sums is None else sums
    )
    dkv_spare = dkv_here if ring is None else torch.empty_like(dkv_here)
    dkv_transfer: Transfer | None = None
    for hop in range(size):
        transfer = ring.start(here, spare) if ring is not None and hop < size - 1 else None
        causal, others = zigzag.rows_of(zigzag.parts(rank, (rank - hop) % size, s, size, documents), rows)
        if sums is not None:
            others = zigzag.key_blocks(others, KEY_BLOCK)
        k_here, v_here = here
        shares: list[tuple[slice, Sequence[Tensor]]] = []
        if hop == 0:
            dq_own, *dkv_own = partial_attention.backward_own(
                dout, q, _pick(k_here, rows), _pick(v_here, rows), out, lse, causal, scale, backend
            )
            dq = dq_own.to(partial_attention.wide(q))
            sizes = [run.stop - run.start for run in rows]
            shares += zip(
                rows, zip(*(share.split(sizes, dim=2) for share in dkv_own), strict=True), strict=True
            )
            del dq_own, dkv_own
        for part in others:
            if dkv_transfer is None:
                _add(dkv_here, shares)  # none waits for the sums to arrive
            dq_share, dk_share, dv_share = partial_attention.part_gradients(
                dout, q, k_here, v_here, out, lse, part, scale, backend
            )
            dq[:, :, part.queries] += dq_share
            shares.append((part.keys, (dk_share, dv_share)))
        if dkv_transfer is not None:
            dkv_transfer.wait()
            dkv_here, dkv_spare = dkv_spare, dkv_here
        _add(dkv_here, shares)
        if ring is not None:
            dkv_transfer = ring.start(dkv_here, dkv_spare)
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
    if dkv_transfer is not None:
        dkv_transfer.wait()
    dk, dv = dkv_spare if sums is None or sums is dkv_spare else sums.copy_(dkv_spare)
    return dq.to(q.dtype), dk.to(kv_dtype), dv.to(kv_dtype)


def _add(sums: Tensor, shares: list[tuple[slice, Sequence[Tensor]]]) -> None:
    """Empties `shares` of the gradients of some keys and values into the whole [2, b, g, s, d]."""
    while shares:
        keys, dkv_share = shares.pop(0)
        for whole, share in zip(sums, dkv_share, strict=True):
            whole[:, :, keys] += share


def _pick(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """`rows` of x [b, g, s, d], one after the other; a view where it is one run."""
    return x[:, :, rows[0]] if len(rows) == 1 else torch.cat([x[:, :, run] for run in rows], dim=2)


def _pack(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as one buffer [2, b, g, s, d], so that a hop is one message, and an empty one to receive into."""
    packed = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)
    packed[0].copy_(k)
    packed[1].copy_(v)
    return packed, torch.empty_like(packed)
