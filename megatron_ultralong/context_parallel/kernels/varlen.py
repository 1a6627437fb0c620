"""Many documents in one call of FlashAttention on CUDA, which takes their cumulative lengths (cu_seqlens).

Shapes: h query heads, g KV heads, s tokens of one packed row (b = 1), d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.host_values import copy_to_device
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.zigzag import AttentionBlock

TOKENS_PER_DOCUMENT = 1024
"""A call of the backward takes at most one document per that many tokens: each enlarges its float32 workspace
by up to 128 rows, all together by at most an eighth."""
MAX_DOCUMENTS = 65_535
"""Documents of one call: its kernels have one for each along the second dimension of their grid."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[AttentionBlock], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `select.forward_diagonal`, for b = 1 on CUDA in half precision; several calls if there are very many
    documents."""
    if len(blocks) <= MAX_DOCUMENTS:
        return _forward(q, k, v, blocks, scale)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for some in _calls(blocks, MAX_DOCUMENTS):
        rows = _rows(some)
        out[rows], lse[rows] = _forward(q[rows], k[rows], v[rows], some, scale)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Sequence[AttentionBlock],
    scale: float | None = None,
) -> QKVGradients:
    """As `select.backward_diagonal`, under the conditions of `forward`; several calls if the documents are
    very short."""
    calls = list(_calls(blocks, min(max(q.shape[2] // TOKENS_PER_DOCUMENT, 1), MAX_DOCUMENTS)))
    if len(calls) == 1:
        return _backward(dout, q, k, v, out, lse, blocks, scale)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for some in calls:
        rows = _rows(some)
        dout_, q_, k_, v_, out_, lse_ = (x[rows] for x in (dout, q, k, v, out, lse))
        partial = _backward(dout_, q_, k_, v_, out_, lse_, some, scale)
        for gradient, x in zip(gradients, partial, strict=True):
            gradient[rows] = x
        del partial, x
    return gradients


def _forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[AttentionBlock], scale: float | None
) -> tuple[Tensor, Tensor]:
    """`forward` in one call."""
    cu_seqlens, max_seqlen = _cu_seqlens(blocks, q.device)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out, lse = torch.ops.aten._flash_attention_forward(
        *(_tokens_first(x) for x in (q, k, v)), *lengths, 0.0, True, False, scale=scale
    )[:2]
    return _heads_first(out), lse.unsqueeze(0)  # lse is returned as [h, s]


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Sequence[AttentionBlock],
    scale: float | None,
) -> QKVGradients:
    """`backward` in one call."""
    cu_seqlens, max_seqlen = _cu_seqlens(blocks, q.device)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(_tokens_first(x) for x in (dout, q, k, v, out)),
        lse.squeeze(0).contiguous(),
        *lengths,
        0.0,
        True,
        rng_state,
        rng_state[0],
        scale=scale,
    )
    return _heads_first(dq), _heads_first(dk), _heads_first(dv)


def _calls(blocks: Sequence[AttentionBlock], most: int) -> Iterator[Sequence[AttentionBlock]]:
    """`blocks` in equal parts of at most `most`."""
    calls = -(-len(blocks) // most)
    bounds = [len(blocks) * call // calls for call in range(calls + 1)]
    return (blocks[first:stop] for first, stop in pairwise(bounds))


def _rows(blocks: Sequence[AttentionBlock]) -> tuple[slice, slice, slice]:
    """The index of the tokens of `blocks` in [1, h, s, ...]."""
    return (slice(None), slice(None), slice(blocks[0].queries.start, blocks[-1].queries.stop))


def _cu_seqlens(blocks: Sequence[AttentionBlock], device: torch.device) -> tuple[Tensor, int]:
    """(cumulative document lengths from 0: int32 [documents + 1], an upper bound of the longest)."""
    first = blocks[0].queries.start
    bounds = [block.queries.start - first for block in blocks] + [blocks[-1].queries.stop - first]
    # At least 2: for single queries FlashAttention has a path of its own, meant for decoding.
    longest = max(2, *(b - a for a, b in pairwise(bounds)))
    return copy_to_device(torch.tensor(bounds, dtype=torch.int32), device), longest


def _tokens_first(x: Tensor) -> Tensor:
    """[1, h, s, d] -> [s, h, d], its last dimension contiguous."""
    x = x.squeeze(0).transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """[s, h, d] -> [1, h, s, d]."""
    return x.transpose(0, 1).unsqueeze(0)
