"""The deterministic backward of FlashAttention-2, in as much memory as the other one takes.

Where PyTorch asks for deterministic algorithms, FlashAttention-2 allocates one float32 dQ for each of
(SMs + b h - 1) / (b h) splits: 33 with 4 heads on an H100. For as many times fewer queries at a time, all of
them together are as large as one dQ. The gradients of keys and values are summed in float32, always in the
same order.

Shapes as in select.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import flash_versions
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype

FEWEST_ROWS = 1024
"""Fewer queries at a time would not occupy a GPU."""

QKVGradients = tuple[Tensor, Tensor, Tensor]
KernelBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], QKVGradients]
"""As `aten.flash_backward`."""


def splits(q: Tensor, documents: int = 1) -> int:
    """Return for how many splits FlashAttention-2's backward allocates dQ.

    documents: in one call, with b = 1.
    """
    if not q.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return 1
    if flash_versions.active() != "flash":  # the newer ones let thread blocks add to one dQ in turn
        return 1
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    heads = max(q.shape[0], documents) * q.shape[1]
    return (multiprocessors + heads - 1) // heads


def rows_at_a_time(s: int, splits: int) -> int:
    """Return how many of s queries to pass to a call, so that all its splits are as large as one of s."""
    return max(FEWEST_ROWS, -(-s // splits))


def backward_by_rows(
    run: KernelBackward,
    rows_per_call: int,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> QKVGradients:
    """As `run`, which is called with `rows_per_call` queries at a time."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in (k, v))
    for rows in _ranges(q.shape[2], rows_per_call):
        dout_c, q_c, out_c, lse_c = (x[:, :, rows] for x in (dout, q, out, lse))
        dq_c = torch.zeros_like(q_c, dtype=accumulation_dtype(q))
        # The rows' own keys, under the causal mask, and all keys before them.
        own = [(rows, True), (slice(0, rows.start), False)] if causal else [(slice(0, k.shape[2]), False)]
        for keys, diagonal in own:
            if keys.start == keys.stop:
                continue
            dq_part, dk_part, dv_part = run(
                dout_c, q_c, k[:, :, keys], v[:, :, keys], out_c, lse_c.contiguous(), diagonal, scale
            )
            dq_c += dq_part
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
            del dq_part, dk_part, dv_part
        dq[:, :, rows] = dq_c
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _ranges(s: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, s)) for start in range(0, s, size))
