"""PyTorch's own attention kernels, called by their aten names because these return the logsumexp and take it
back.

One pair of functions per backend, all with the same arguments; select.py describes and checks them. The last
dimension of every tensor is contiguous, and so is lse.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import deterministic

QKVGradients = deterministic.QKVGradients
"""(dq, dk, dv)."""


# ---- flash attention of the CPU -----------------------------------------------------------------


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=None, scale=scale
    )


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> QKVGradients:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
    )


# ---- FlashAttention-2 of CUDA -------------------------------------------------------------------


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> QKVGradients:
    splits = deterministic.splits(q)
    rows = deterministic.rows_at_a_time(q.shape[2], splits)
    if splits == 1 or rows >= q.shape[2]:
        return _flash_backward(dout, q, k, v, out, lse, causal, scale)
    return deterministic.backward_by_rows(_flash_backward, rows, dout, q, k, v, out, lse, causal, scale)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> QKVGradients:
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    lengths = (None, None, q.shape[2], k.shape[2])  # cumulative: none; longest
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, *lengths, 0.0, causal, rng_state, rng_state[0], scale=scale
    )


# ---- cuDNN --------------------------------------------------------------------------------------


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(q.shape[:3])


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> QKVGradients:
    # PyTorch caches the built graph by the strides of q, k and v alone, so those of out and dout must follow
    # from them.
    if not _strides(q) == _strides(out) == _strides(dout):
        q, out, dout = q.contiguous(), out.contiguous(), dout.contiguous()
    if cudnn_lse_dims(q.device) == 4:
        lse = lse.unsqueeze(-1)
    rng_state = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which is off
    lengths = (None, None, q.shape[2], k.shape[2])  # cumulative: none; longest
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, rng_state, rng_state, None, *lengths, 0.0, causal, scale=scale
    )


@functools.cache
def cudnn_lse_dims(device: torch.device) -> int:
    """Return 3 or 4: whether this version of PyTorch keeps cuDNN's trailing dimension of 1. Found by calling
    the kernel once."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _strides(x: Tensor) -> list[int]:
    """The strides that matter: those of dimensions longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
