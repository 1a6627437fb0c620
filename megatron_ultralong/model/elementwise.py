"""SwiGLU and RMSNorm with hand-written backwards, which read and write less memory than autograd's.

Autograd's backward of a split into halves writes each half's gradient and then joins them in another tensor;
here both are written where they belong. On a CPU the work runs over blocks of rows that stay in the cache, so
that only inputs and results cross the memory bus; on CUDA SwiGLU is a Triton kernel (elementwise_triton.py)
where Triton can be used, and torch operations otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel.kernels.merge import why_not_triton

CPU_BLOCK = 2**19
"""Elements of a block of rows on a CPU: 2 MiB in float32."""


def row_blocks(x: Tensor, most: int | None = None) -> Iterator[slice]:
    """Iterate over the rows of x [n, ...] in blocks of at most `most` elements (None = all), on a CPU of at
    most `CPU_BLOCK`; at least one row at a time."""
    n, m = len(x), math.prod(x.shape[1:])
    limits = [limit for limit in (most, CPU_BLOCK if x.device.type == "cpu" else None) if limit is not None]
    size = max(1, min(limits) // max(1, m)) if limits else max(1, n)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def chosen_operations(device: torch.device, dtype: torch.dtype, transformer_engine: bool) -> dict[str, str]:
    """Return what computes each of a layer's operations between its matrix products, and why.

    transformer_engine: whether the model has its linears and norms (model/spec.py).
    """
    if transformer_engine:
        norm = "TransformerEngine, with the linear that follows"
    elif _own_norm(device, dtype):
        norm = "torch operations by blocks of rows: on a CPU torch has no kernel for it"
    else:
        norm = "torch.nn.functional.rms_norm"
    own = "torch operations, one buffer in the backward"
    if device.type == "cuda" and dtype in _TRITON_DTYPES:
        problem = why_not_triton(device)
        own = "a Triton kernel forward and backward" if problem is None else f"{own}: {problem}"
    return {"norm": norm, "SwiGLU": own, "RoPE": own, "residual": "torch operations"}


_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_triton(x: Tensor) -> bool:
    """Whether the kernels of elementwise_triton.py compute on x."""
    return x.is_cuda and x.dtype in _TRITON_DTYPES and why_not_triton(x.device) is None


# ---- SwiGLU ------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up of gate_up [..., 2 f] -> [..., f]: the gate's f columns are first.

    Keeps gate_up for the backward, and nothing else.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        x = gate_up.flatten(0, -2)  # [n, 2 f]
        gate, up = x.chunk(2, dim=-1)
        out = x.new_empty(gate.shape)
        if in_triton(x):
            from megatron_ultralong.model import elementwise_triton

            elementwise_triton.swiglu(x, out)
        else:
            for rows in row_blocks(x):
                torch.ops.aten.silu.out(gate[rows], out=out[rows]).mul_(up[rows])
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        x, dout = gate_up.flatten(0, -2), grad.flatten(0, -2)
        dx = torch.empty_like(x)
        if in_triton(x):
            from megatron_ultralong.model import elementwise_triton

            elementwise_triton.swiglu_backward(x, dout, dx)
            return dx.view_as(gate_up)
        gate, up = x.chunk(2, dim=-1)
        dgate, dup = dx.chunk(2, dim=-1)
        for rows in row_blocks(x):
            torch.mul(dout[rows], up[rows], out=dgate[rows])
            torch.ops.aten.silu_backward.grad_input(dgate[rows], gate[rows], grad_input=dgate[rows])
            torch.ops.aten.silu.out(gate[rows], out=dup[rows]).mul_(dout[rows])
        return dx.view_as(gate_up)


# ---- RMSNorm -----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32, result in
    x's dtype.

    PyTorch has one kernel for it on CUDA, forward and backward; on a CPU it has a dozen, in place of which
    float32 tensors go through `_RMSNorm`.
    """
    if x.dtype == weight.dtype and _own_norm(x.device, x.dtype):
        return _RMSNorm.apply(x, weight, eps)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _own_norm(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps): y = r x w, dw = sum over rows of r x dy, dx = r w dy - r^3 x
    sum(w x dy) / H."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows_nH = x.reshape(-1, x.shape[-1])
        r = torch.linalg.vector_norm(rows_nH, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        out = torch.empty_like(rows_nH)
        for rows in row_blocks(rows_nH):
            torch.mul(rows_nH[rows], r[rows, None], out=out[rows]).mul_(weight)
        ctx.save_for_backward(x, weight, r)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        x_nH, dy_nH = (y.reshape(-1, y.shape[-1]) for y in (x, grad))
        dx_nH = torch.empty_like(x_nH)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in row_blocks(x_nH):
            dx, dy, r_rows = dx_nH[rows], dy_nH[rows], r[rows]
            torch.mul(dy, x_nH[rows], out=dx)
            if dweight is not None:
                dweight.addmv_(dx.t(), r_rows)
            shift = torch.mv(dx, weight).mul_(r_rows.pow(3)).div_(-len(weight))
            torch.mul(dy, weight, out=dx).mul_(r_rows[:, None])
            dx.addcmul_(x_nH[rows], shift[:, None])
        return dx_nH.view(x.shape), dweight, None


# ---- RMSNorm of queries and keys ---------------------------------------------------------------

NORM_BLOCK = 2**24
"""Elements that the norm of queries and keys computes in float32 at a time: 64 MiB for each temporary."""


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (x / rms(x) * weight, 1 / rms(x)) over the last dimension, for a backward by
    `normalise_backward`.

    x: [s, ..., d] of any strides; the results are contiguous, [s, ..., d] in x's dtype and [s, ..., 1] in
    float32 (float64 for float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in row_blocks(x, NORM_BLOCK):
        torch.mul(x[rows], r[rows], out=out[rows]).mul_(weight)
    return out, r


def normalise_backward(dx: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Overwrite dx, the gradient of `normalise`'s result, with that of x, and return that of the weight."""
    dweight = torch.zeros(weight.shape, dtype=r.dtype, device=weight.device)
    w = weight.to(r.dtype)
    for rows in row_blocks(x, NORM_BLOCK):
        unit = x[rows] * r[rows]
        dy = dx[rows].to(r.dtype)
        dweight += (dy * unit).flatten(0, -2).sum(0)
        dy = dy * w
        shift = (dy * unit).mean(-1, keepdim=True)
        dx[rows] = dy.sub_(unit.mul_(shift)).mul_(r[rows])
    return dweight.to(weight.dtype)
