"""Ring attention: exact causal attention over a sequence of which every rank holds two zigzag chunks.

Keys and values travel from rank to rank while queries stay (Liu et al., arXiv 2310.01889); the zigzag order
(zigzag.py) gives every rank the same work. The backward is a ring of its own: it takes the final output and
logsumexp, so it never computes the forward again (as FlashAttention's backward, arXiv 2205.14135), and the
gradients of keys and values travel with them, in float32, until they are back on their own rank. The keys of
a packed row do not go round: they are sent to the ranks that need them (exchange.py).

Shapes: S tokens of the complete sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d
head dimension. Memory beyond inputs and outputs, at any CP: two KV buffers [2, b, g, s, d] and the float32
output; in the backward also dQ in float32 and two float32 dKV buffers. Sent per rank and layer: forward CP -
1 KV buffers; backward CP - 1 KV buffers and CP float32 dKV buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import exchange, zigzag
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator, Transfer, receive_buffer
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype
from megatron_ultralong.context_parallel.zigzag import AttentionBlock


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, ring: Communicator, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return (out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `api.attention`."""
    for hop, (blocks, (k_hop, v_hop)) in enumerate(hops(k, v, ring, spec)):
        if hop == 0:
            out, lse = kernels.forward_diagonal(q, k_hop, v_hop, blocks, spec)
            # In the memory layout of q, so that the backward need not copy.
            out = torch.empty_like(q, dtype=accumulation_dtype(q)).copy_(out)
        else:
            for block in blocks:
                kernels.merge_past(out, lse, q, k_hop, v_hop, block, spec)
        del k_hop, v_hop  # before the next hop takes memory
    return out.to(q.dtype), lse


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ring: Communicator,
    spec: AttentionSpec,
) -> QKVGradients:
    """Return gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as returned by `ring_forward`."""
    dkv = gradient_sum(exchange.gradient_zeros(k), ring, spec)
    for hop, (blocks, (k_hop, v_hop)) in enumerate(hops(k, v, ring, spec)):
        if hop == 0:
            dq, *dkv_own = kernels.backward_diagonal(dout, q, k_hop, v_hop, out, lse, blocks, spec)
            dq = dq.to(accumulation_dtype(q))
            dkv.add(slice(None), dkv_own)
            del dkv_own
        else:
            for block in blocks:
                dq_block, *dkv_block = kernels.backward_past(dout, q, k_hop, v_hop, out, lse, block, spec)
                dq[:, :, block.queries] += dq_block
                dkv.add(block.keys, dkv_block)
        del k_hop, v_hop
        dkv.send()
    dk, dv = dkv.home()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def hops(
    k: Tensor, v: Tensor, ring: Communicator | None, spec: AttentionSpec
) -> Iterator[tuple[list[AttentionBlock], Sequence[Tensor]]]:
    """Yield (blocks, (K, V)): what this rank's queries see of its own keys, in diagonal blocks, and then of
    those of other ranks, in past blocks; keys valid until the next step."""
    if spec.placement is not None:
        schedule = spec.placement.schedules[0 if ring is None else ring.rank]
        if ring is None:
            yield schedule.own, (k, v)
        else:
            yield from exchange.arrivals(k, v, ring, schedule)
        return
    rank = 0 if ring is None else ring.rank
    for source, kv in rotate(k, v, ring):
        yield [zigzag.block_between(rank, source, k.shape[2])], kv


def gradient_sum(
    total: Tensor, ring: Communicator | None, spec: AttentionSpec
) -> RotatingSum | exchange.ReturnedSum:
    """Return what adds up dKV of this rank's keys [2, b, g, s, d] over the hops of `hops`."""
    if spec.placement is None or ring is None:
        return RotatingSum(total, ring)
    return exchange.ReturnedSum(total, ring, spec.placement.schedules[ring.rank])


def rotate(k: Tensor, v: Tensor, ring: Communicator | None) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield (rank, its (K, V)) for every rank, this one first, then the one before it, and so on.

    The next hop is in flight while the caller computes with what was yielded, which is valid until the next
    step. K and V are one buffer, so that a hop is one message.
    """
    if ring is None:
        yield 0, (k, v)
        return
    here = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)
    here[0].copy_(k)
    here[1].copy_(v)
    arriving = receive_buffer(here.shape, here.dtype, here.device)
    for hop in range(ring.size):
        transfer = ring.send_recv(here, arriving) if hop < ring.size - 1 else None
        yield (ring.rank - hop) % ring.size, here
        if transfer is not None:
            transfer.wait()
            here, arriving = arriving, here


class RotatingSum:
    """dKV on its way round the ring, one hop behind KV: each rank adds its share and forwards the sum; after
    CP hops it is back on its own rank. Without a ring, a plain sum."""

    def __init__(self, total: Tensor, ring: Communicator | None) -> None:
        """total [2, b, g, s, d], to which is added in place."""
        self._ring = ring
        self._here = total
        self._arriving = total if ring is None else receive_buffer(total.shape, total.dtype, total.device)
        self._transfer: Transfer | None = None
        self._pending: list[tuple[slice, Sequence[Tensor]]] = []

    def add(self, keys: slice, dkv: Sequence[Tensor]) -> None:
        """Add (dk, dv) of these keys: at once, or if the sum is still on its way, when it has arrived."""
        self._pending.append((keys, dkv))
        if self._transfer is None:
            self._add_pending()

    def send(self) -> None:
        """Forward the sum, with the shares of this rank."""
        if self._transfer is not None:
            self._transfer.wait()
            self._here, self._arriving = self._arriving, self._here
        self._add_pending()
        if self._ring is not None:
            self._transfer = self._ring.send_recv(self._here, self._arriving)

    def home(self) -> Tensor:
        """Return the complete dKV [2, b, g, s, d] of this rank's own keys."""
        if self._transfer is not None:
            self._transfer.wait()
        return self._arriving

    def _add_pending(self) -> None:
        while self._pending:
            keys, dkv = self._pending.pop(0)
            for total, share in zip(self._here, dkv, strict=True):
                total[:, :, keys] += share
