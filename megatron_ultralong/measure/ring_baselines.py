"""Two baselines for the ring, in zigzag order and with the same kernels: they merge partial results
differently.

`te_style` follows the schedule of TransformerEngine's ring, as far as it is publicly known: every hop's
output is kept in the dtype of q until the last hop, and all are weighted by their logsumexps at the end;
every hop has its own KV buffer; gradients are summed in the dtype of q. `naive` merges each hop into an
output in the dtype of q. Neither is that library's code: what it fuses into kernels is done by single torch
operations here, so errors and memory of these rows say more than their times.

Shapes: s tokens of this rank, h query heads, g KV heads, d head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.comm import Communicator
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.placement import Placement


def te_style(ring: Communicator, placement: Placement | None) -> tuple[Any, Any]:
    """Return (forward, backward) of this rank; packed documents are not supported."""
    assert placement is None
    return partial(_forward_kept, ring=ring), partial(_backward, ring=ring, keep_buffers=True)


def naive(ring: Communicator, placement: Placement | None) -> tuple[Any, Any]:
    """Return (forward, backward) of this rank; packed documents are not supported."""
    assert placement is None
    return partial(_forward_merged, ring=ring), partial(_backward, ring=ring, keep_buffers=False)


def _forward_kept(q: Tensor, k: Tensor, v: Tensor, ring: Communicator) -> tuple[Tensor, Tensor]:
    s, size = q.shape[2], ring.size
    buffers = [torch.stack((k, v))] + [q.new_empty((2, *k.shape)) for _ in range(size - 1)]
    kept = []
    for hop in range(size):
        transfer = ring.send_recv(buffers[hop], buffers[hop + 1]) if hop < size - 1 else None
        part = zigzag.block_between(ring.rank, (ring.rank - hop) % size, s)
        k_here, v_here = buffers[hop]
        kept.append(
            (
                part.queries,
                *kernels.forward(
                    q[:, :, part.queries], k_here[:, :, part.keys], v_here[:, :, part.keys], part.causal
                ),
            )
        )
        if transfer is not None:
            transfer.wait()
    lse = kept[0][2].clone()
    for rows, _, part_lse in kept[1:]:
        lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
    out = torch.zeros_like(q)
    for rows, part_out, part_lse in kept:
        out[:, :, rows] += (part_out * (part_lse - lse[:, :, rows]).exp().unsqueeze(-1)).to(q.dtype)
    return out, lse


def _forward_merged(q: Tensor, k: Tensor, v: Tensor, ring: Communicator) -> tuple[Tensor, Tensor]:
    s, size = q.shape[2], ring.size
    here = torch.stack((k, v))
    spare = torch.empty_like(here)
    out, lse = torch.empty(0), torch.empty(0)
    for hop in range(size):
        transfer = ring.send_recv(here, spare) if hop < size - 1 else None
        part = zigzag.block_between(ring.rank, (ring.rank - hop) % size, s)
        k_here, v_here = here
        part_out, part_lse = kernels.forward(
            q[:, :, part.queries], k_here[:, :, part.keys], v_here[:, :, part.keys], part.causal
        )
        if hop == 0:
            out, lse = part_out.clone(), part_lse.clone()
        else:
            rows = part.queries
            weight = torch.sigmoid(part_lse - lse[:, :, rows]).unsqueeze(-1).to(q.dtype)
            out[:, :, rows] += weight * (part_out - out[:, :, rows])
            lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ring: Communicator,
    keep_buffers: bool,
) -> QKVGradients:
    """Send keys round the ring together with their gradients, both in the dtype of q.

    keep_buffers: new KV and gradient buffers for every hop, instead of two in total.
    """
    s, size = q.shape[2], ring.size
    here = torch.stack((k, v))
    spare, dq, dkv = torch.empty_like(here), torch.zeros_like(q), torch.zeros_like(here)
    dkv_spare = torch.empty_like(dkv)
    kept = []
    for hop in range(size):
        transfer = ring.send_recv(here, spare) if hop < size - 1 else None
        part = zigzag.block_between(ring.rank, (ring.rank - hop) % size, s)
        (k_here, v_here), rows, keys = here, part.queries, part.keys
        dq_part, *dkv_part = kernels.backward(
            dout[:, :, rows],
            q[:, :, rows],
            k_here[:, :, keys],
            v_here[:, :, keys],
            out[:, :, rows],
            lse[:, :, rows],
            part.causal,
        )
        dq[:, :, rows] += dq_part
        for whole, share in zip(dkv, dkv_part, strict=True):
            whole[:, :, keys] += share
        ring.send_recv(dkv, dkv_spare).wait()  # follows the keys; after `size` hops it is back
        dkv, dkv_spare = dkv_spare, dkv
        if transfer is not None:
            transfer.wait()
            here, spare = spare, here
            if keep_buffers and hop < size - 2:
                kept.append((spare, dkv_spare))
                spare, dkv_spare = torch.empty_like(here), torch.empty_like(dkv)
    return dq, dkv[0], dkv[1]
