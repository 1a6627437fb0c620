"""Attention kernels that give the logsumexp and take one back: PyTorch's own, called by their aten names.

The backward takes the *final* output and logsumexp, over all keys of the sequence, with any part of the keys:
its gradients are then those of that part. This is what makes a ring possible without a second forward.

Shapes: q, out, dout [b, h, s, d]; k, v [b, g, t, d], h a multiple of g (KV heads are never expanded here);
lse [b, h, s]. Any strides. The backends:

    cpu     flash attention of the CPU
    flash   FlashAttention-2 of CUDA (or what `torch.nn.attention.activate_flash_attention_impl` put in its place)
    cudnn   cuDNN; the fastest on Hopper and later, not bit-reproducible in the backward
    eager   eager.py, for what the others do not take
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import eager

Backend = Literal["cpu", "flash", "cudnn", "eager"]
Gradients = tuple[Tensor, Tensor, Tensor]
"""(dq, dk, dv)."""
_HALF = (torch.bfloat16, torch.float16)
_OLDEST_CUDNN = 90501
"""Older ones want dout in the strides of out."""


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend for tensors of this kind. `torch.backends.cuda.enable_cudnn_sdp(False)` rules cuDNN out."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or dtype not in _HALF or head_dim % 8 or head_dim > 256:
        return "eager"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    cudnn = (torch.backends.cudnn.version() or 0) >= _OLDEST_CUDNN and torch.backends.cuda.cudnn_sdp_enabled()
    if hopper and cudnn and head_dim <= 128 and not torch.are_deterministic_algorithms_enabled():
        return "cudnn"
    return "flash"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over k and v -> (out in the dtype of q, lse in float32; float64 where q is).

    causal: query i sees keys 0..i (s must equal t). scale: of the logits, default d ** -0.5. backend: default
    `choose`. Without any key, out is zero and lse -inf. ValueError for shapes that do not fit.
    """
    _check(q, k, v, causal)
    if q.numel() == 0 or k.numel() == 0:  # the CPU kernel dies of a division by zero
        return torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=_lse_dtype(q), device=q.device)
    run = {"cpu": _cpu_forward, "flash": _flash_forward, "cudnn": _cudnn_forward, "eager": eager.forward}
    return run[backend or _choose(q, k)](
        _dense_rows(q), _dense_rows(k), _dense_rows(v), causal, _scale(q, scale)
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None = None,
    *,
    backend: Backend | None = None,
) -> Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v, of attention whose output and logsumexp over *all*
    keys are given."""
    _check(q, k, v, causal)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"{_shapes(dout=dout, out=out, lse=lse)} do not fit {_shapes(q=q)}")
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = {"cpu": _cpu_backward, "flash": _flash_backward, "cudnn": _cudnn_backward, "eager": eager.backward}
    # CUDA kernels read lse as if it were contiguous.
    dout, q, k, v, out = (_dense_rows(x) for x in (dout, q, k, v, out))
    return run[backend or _choose(q, k)](dout, q, k, v, out, lse.contiguous(), causal, _scale(q, scale))


def _choose(q: Tensor, k: Tensor) -> Backend:
    chosen = choose(q.device, q.dtype, q.shape[3])
    return (
        "flash" if chosen == "cudnn" and min(q.shape[2], k.shape[2]) == 1 else chosen
    )  # cuDNN wants two tokens at least


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    fits = (
        q.dim() == k.dim() == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
    )
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:  # the CPU kernel would read past the end
        raise ValueError(
            f"{_shapes(q=q, k=k, v=v)} are not [b, h, s, d], [b, g, t, d] twice, h a multiple of g"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention wants as many keys as queries, not {k.shape[2]} and {q.shape[2]}")


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())


def _dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: the CPU kernel silently gives wrong results otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# ---- one pair of functions a backend, all with the same arguments ------------------------------


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=None, scale=scale
    )


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is not
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        unused,
        unused[0],
        scale=scale,
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    # PyTorch keeps the built graph by the strides of q, k and v alone, so those of out and dout must follow
    # from them.
    if not _strides(q) == _strides(out) == _strides(dout):
        q, out, dout = q.contiguous(), out.contiguous(), dout.contiguous()
    if _cudnn_lse_dims(q.device) == 4:
        lse = lse.unsqueeze(-1)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        unused,
        unused,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """3 or 4: whether this version of PyTorch keeps cuDNN's trailing dimension of 1. Asked of the kernel
    itself, once."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _strides(x: Tensor) -> list[int]:
    """Strides that matter: those of dimensions longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
