"""Attention with logsumexp in plain tensor operations, a block of queries at a time: for what no fused kernel
supports.

float32 on CUDA, for tests; slow at any length that matters. Shapes: b sequences, h query heads in g groups
(KV heads) of r = h/g, s queries, t keys, d head dimension; c queries per block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype

BLOCK = 512
"""Queries whose scores (float32 [b, h, BLOCK, t]) are alive at a time."""


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As `select.forward`; computed in float32, or in float64 if q is."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=accumulation_dtype(q), device=q.device)
    for start in range(0, q.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        scores = _scores(q[:, :, block], k, causal, scale, start)  # [b, g, r, c, t]
        lse[:, :, block] = scores.logsumexp(-1).flatten(1, 2)
        out[:, :, block] = (scores.softmax(-1) @ v.to(scores.dtype).unsqueeze(2)).flatten(1, 2)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> QKVGradients:
    """As `select.backward`; computed in float32, or in float64 if q is."""
    dtype, kv_heads = accumulation_dtype(q), k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for start in range(0, q.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        q_, dout_, out_, lse_ = (
            x[:, :, block].to(dtype).unflatten(1, (kv_heads, -1)) for x in (q, dout, out, lse)
        )
        p = (_scores(q[:, :, block], k, causal, scale, start) - lse_.unsqueeze(-1)).exp()  # [b, g, r, c, t]
        delta = (dout_ * out_).sum(-1, keepdim=True)
        ds = p * (dout_ @ v.to(dtype).unsqueeze(2).mT - delta) * scale  # [b, g, r, c, t]
        dq[:, :, block] = (ds @ k.to(dtype).unsqueeze(2)).flatten(1, 2)
        dk += (ds.mT @ q_).sum(2)
        dv += (p.mT @ dout_).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, start: int) -> Tensor:
    """Scaled logits of queries `start` and following: [b, g, r, c, t]."""
    dtype = accumulation_dtype(q)
    scores = q.to(dtype).unflatten(1, (k.shape[1], -1)) @ k.to(dtype).unsqueeze(2).mT * scale
    if causal:
        rows = torch.arange(start, start + q.shape[2], device=q.device)
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows[:, None], -math.inf)
    return scores
