"""Many documents in one call of FlashAttention-2 on CUDA, which takes their cumulative lengths (cu_seqlens).

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

WORKSPACE_PADDING = 128
"""Rows by which each document of a call enlarges the float32 workspace of the backward. So a call takes at
most one document per that many tokens: the workspace is then at most twice that of one long document."""
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
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    for some in _calls(blocks, min(max(q.shape[2] // WORKSPACE_PADDING, 1), MAX_DOCUMENTS)):
        cu_seqlens, max_seqlen = _cu_seqlens(some, q.device)
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        rows = _rows(some)
        partial = torch.ops.aten._flash_attention_backward(
            *(_tokens_first(x[rows]) for x in (dout, q, k, v, out)),
            lse[rows].squeeze(0).contiguous(),
            *lengths,
            0.0,
            True,
            rng_state,
            rng_state[0],
            scale=scale,
        )
        for gradient, x in zip(gradients, partial, strict=True):
            gradient[rows] = _heads_first(x)
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


def _calls(blocks: Sequence[AttentionBlock], most: int) -> Iterator[Sequence[AttentionBlock]]:
    """`blocks`, at most `most` at a time."""
    return (blocks[first : first + most] for first in range(0, len(blocks), most))


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
