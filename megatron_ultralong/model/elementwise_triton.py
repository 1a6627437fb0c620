"""SwiGLU and the rotation of queries and keys as Triton kernels: every element is read once and written once,
arithmetic is float32, and nothing is allocated.

n rows, f columns of the gate; s tokens, d head dimension, half of d cosines a token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ultralong.context_parallel.kernels.merge_triton import launching

COLUMNS = 1024
"""Columns of SwiGLU per program."""
HEADS = 16
"""Heads of a token per program, at most."""


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up of gate_up [n, 2 f] to out [n, f]."""
    n, f = out.shape
    if out.numel() == 0:
        return
    with launching:
        _swiglu[(n, triton.cdiv(f, COLUMNS))](
            gate_up, out, f, *gate_up.stride(), *out.stride(), COLUMNS=COLUMNS
        )


def swiglu_backward(gate_up: Tensor, dout: Tensor, dgate_up: Tensor) -> None:
    """Write the gradient of gate_up [n, 2 f], given that of the result, dout [n, f], to dgate_up."""
    n, f = dout.shape
    if dout.numel() == 0:
        return
    with launching:
        _swiglu_backward[(n, triton.cdiv(f, COLUMNS))](
            gate_up,
            dout,
            dgate_up,
            f,
            *gate_up.stride(),
            *dout.stride(),
            *dgate_up.stride(),
            COLUMNS=COLUMNS,
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> None:
    """Rotate the pairs (x[i], x[i + d/2]) of x [s, b, g, r, d] by `direction` times their angles into out of
    the same shape, which shares no memory with x. cos and sin: float32 [s, 1, 1, 1, d/2] with equal
    strides."""
    s, b, g, r, d = x.shape
    heads = b * g * r
    if x.numel() == 0:
        return
    block = min(HEADS, triton.next_power_of_2(heads))
    with launching:
        _rotate[(s, triton.cdiv(heads, block))](
            x,
            cos,
            sin,
            out,
            float(direction),
            heads,
            g,
            r,
            d // 2,
            *x.stride(),
            *out.stride(),
            cos.stride()[0],
            cos.stride()[4],
            BLOCK=block,
            WIDTH=triton.next_power_of_2(d // 2),
        )


@triton.jit
def _swiglu(gate_up, out, f, x_n, x_f, out_n, out_f, COLUMNS: tl.constexpr):
    # int64: a chunk of a million tokens has more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < f
    at = gate_up + row * x_n + column * x_f
    gate = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(at + f * x_f, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * out_n + column * out_f, gate * tl.sigmoid(gate) * up, mask=valid)


@triton.jit
def _swiglu_backward(gate_up, dout, dgate_up, f, x_n, x_f, dout_n, dout_f, dx_n, dx_f, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < f
    at = gate_up + row * x_n + column * x_f
    gate = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(at + f * x_f, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(dout + row * dout_n + column * dout_f, mask=valid, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    to = dgate_up + row * dx_n + column * dx_f
    tl.store(to, grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=valid)
    tl.store(to + f * dx_f, grad * gate * sigmoid, mask=valid)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    direction,
    heads,
    g,
    r,
    half,
    x_s,
    x_b,
    x_g,
    x_r,
    x_d,
    out_s,
    out_b,
    out_g,
    out_r,
    out_d,
    cos_s,
    cos_d,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < half
    valid = (head < heads)[:, None] & used[None, :]

    cosine = tl.load(cos + token * cos_s + column * cos_d, mask=used, other=0.0)[None, :]
    sine = tl.load(sin + token * cos_s + column * cos_d, mask=used, other=0.0)[None, :] * direction
    sequence, group, query = head // (g * r), head // r % g, head % r
    x_at = x + token * x_s + (sequence * x_b + group * x_g + query * x_r)[:, None] + (column * x_d)[None, :]
    first = tl.load(x_at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x_at + half * x_d, mask=valid, other=0.0).to(tl.float32)
    out_at = (
        out
        + token * out_s
        + (sequence * out_b + group * out_g + query * out_r)[:, None]
        + (column * out_d)[None, :]
    )
    tl.store(out_at, first * cosine - second * sine, mask=valid)
    tl.store(out_at + half * out_d, second * cosine + first * sine, mask=valid)
