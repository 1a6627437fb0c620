"""Ring attention: exact causal attention over a sequence of which every rank holds two zigzag pieces.

Keys and values travel from rank to rank while queries stay (Liu et al., arXiv 2310.01889); the zigzag order (layout.py)
gives every rank the same work. The backward is its own ring: it takes the final output and logsumexp, so it never
computes the forward again (as FlashAttention's backward, arXiv 2205.14135), and the gradients of keys and values travel
with them, in float32, until they are home.

Shapes: S tokens of the whole sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d head dimension.
Memory beyond inputs and outputs, at any CP: two KV buffers [2, b, g, s, d] and the float32 output; in the backward also
dQ in float32 and two float32 dKV buffers. On the wire, a rank and layer: forward CP - 1 KV buffers; backward CP - 1 KV
buffers and CP float32 dKV buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel import kernels, layout
from megatron_ultralong.context_parallel.comm import Group, Ring, Transfer, as_ring
from megatron_ultralong.context_parallel.merge import merge_


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: Group, *, scale: float | None = None) -> Tensor:
    """Causal attention of q [b, h, s, d] over k, v [b, g, s, d] of all ranks of `group` -> [b, h, s, d]; differentiable.

    Any strides and floating dtype; h a multiple of g. Every rank of the group must call it, and run its backward, in the
    same order as the others. group: a torch ProcessGroup, a `comm.Ring`, or None for one rank that holds the whole
    sequence. scale: of the logits, default d ** -0.5. ValueError for shapes that do not fit.
    """
    return _RingAttention.apply(q, k, v, as_ring(group), scale)


def ring_forward(q: Tensor, k: Tensor, v: Tensor, group: Group, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `ring_attention`, outside autograd.

    With them, `ring_backward` needs no second forward.
    """
    ring = as_ring(group)
    if ring is None:
        return kernels.forward(q, k, v, True, scale)
    s = _check_shapes(q, k, v)
    here, spare = _pack(k, v)  # KV of `source`, and of the rank before it once it has arrived
    out = torch.empty_like(q, dtype=_wide(q))  # the layout of q, so that the backward need not copy
    for hop in range(ring.size):
        transfer = ring.start(here, spare) if hop < ring.size - 1 else None
        part = layout.part(ring.rank, (ring.rank - hop) % ring.size, s)
        k_part, v_part = here[:, :, :, part.keys]
        partial, partial_lse = kernels.forward(q[:, :, part.queries], k_part, v_part, part.causal, scale)
        if hop == 0:
            out.copy_(partial)
            lse = partial_lse
        else:
            merge_(out[:, :, part.queries], lse[:, :, part.queries], partial, partial_lse)
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
    return out.to(q.dtype), lse


def ring_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: Group, *,
                  scale: float | None = None) -> kernels.Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as `ring_forward` gave them."""
    ring = as_ring(group)
    if ring is None:
        return kernels.backward(dout, q, k, v, out, lse, True, scale)
    s = _check_shapes(q, k, v)
    here, spare = _pack(k, v)
    dq = torch.zeros_like(q, dtype=_wide(q))
    # dKV visits the ranks as KV does, one hop behind: each adds its share and passes it on; CP hops bring it home.
    dkv_here, dkv_spare = (torch.zeros_like(here, dtype=_wide(k)) for _ in range(2))
    dkv_transfer: Transfer | None = None
    for hop in range(ring.size):
        transfer = ring.start(here, spare) if hop < ring.size - 1 else None
        part = layout.part(ring.rank, (ring.rank - hop) % ring.size, s)
        rows = (slice(None), slice(None), part.queries)
        k_part, v_part = here[:, :, :, part.keys]
        dq_share, *dkv_share = kernels.backward(dout[rows], q[rows], k_part, v_part, out[rows], lse[rows], part.causal, scale)
        dq[rows] += dq_share
        if dkv_transfer is not None:
            dkv_transfer.wait()
            dkv_here, dkv_spare = dkv_spare, dkv_here
        for whole, share in zip(dkv_here, dkv_share, strict=True):
            whole[:, :, part.keys] += share
        dkv_transfer = ring.start(dkv_here, dkv_spare)
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
    assert dkv_transfer is not None
    dkv_transfer.wait()
    dk, dv = dkv_spare
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring | None, scale: float | None) -> Tensor:
        out, lse = ring_forward(q, k, v, ring, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *ring_backward(dout, q, k, v, out, lse, ctx.ring, scale=ctx.scale), None, None


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """s, or ValueError; the kernels check the rest."""
    if q.dim() != 4 or q.shape[2] % 2 or k.shape != v.shape or k.dtype != v.dtype or k.shape[2:] != q.shape[2:]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes} are not [b, h, s, d] and [b, g, s, d] twice, with s even and k, v of one dtype")
    return q.shape[2]


def _pack(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as one buffer [2, b, g, s, d], so that a hop is one message, and an empty one to receive into."""
    packed = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)
    packed[0].copy_(k)
    packed[1].copy_(v)
    return packed, torch.empty_like(packed)


def _wide(x: Tensor) -> torch.dtype:
    """Dtype to accumulate in: float32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)
