"""Rotation of queries and keys, and their norm before it: angles that are exact at millions of positions, and
their application.

D head dimension, s positions of this rank. The frequencies come from the methods in the package `rope/`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel.host_values import copy_to_device
from megatron_ultralong.model.elementwise import in_triton, normalise, normalise_backward

_CHUNK = 2**20  # angles computed at a time: 8 MiB per float64 temporary


@torch.no_grad()
def cos_sin(positions: Tensor, inverse_frequencies: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of position x frequency, times the attention factor: each float32 [s, D/2] on the
    positions' device.

    positions: int64 or float64 [s], in any order. The product and its cosine are float64: in float32 the
    product alone would be off by 0.125 rad at 4M positions.
    """
    if positions.dtype not in (torch.int64, torch.float64) or positions.dim() != 1:
        raise ValueError(
            f"positions must be int64 or float64 [s], not {positions.dtype} {list(positions.shape)}"
        )
    frequencies = copy_to_device(inverse_frequencies.double(), positions.device)
    cos = torch.empty(len(positions), len(frequencies), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    rows = max(1, _CHUNK // len(frequencies))
    for start in range(0, len(positions), rows):
        angles = torch.outer(positions[start : start + rows].double(), frequencies)  # float64 [rows, D/2]
        cos[start : start + rows] = torch.cos(angles).mul_(attention_factor)
        sin[start : start + rows] = angles.sin_().mul_(attention_factor)
    return cos, sin


class FrequencyGradient(NamedTuple):
    """Where the backward of a rotation adds the gradient of the frequencies."""

    total: Tensor
    """float64 [D/2]: summed over layers, heads, positions and micro-batches."""
    positions: Tensor
    """Positions that are rotated, float64 [s]."""


class HeadNorm(NamedTuple):
    """RMSNorm of each head's queries and keys (Qwen3), over the head dimension."""

    q_weight: Tensor
    """[D]."""
    k_weight: Tensor
    """[D]."""
    eps: float


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, gradient: FrequencyGradient | None = None) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by its angle (rotate-half order, as Hugging Face stores q and k).

    x: [..., s, d], any float dtype and strides; cos and sin: float32 [s, d/2] of `cos_sin`, which get no
    gradient. Computed in float32 (float64 for float64 x), returned in x's dtype. The backward rotates by the
    negative angles and needs only cos and sin.

    gradient: for frequencies that are trained; x is [b, h, s, d] then. It is a sum beside autograd's graph,
    because no parameter may pass through a layer's recomputation (model/layer/recompute.py); each rotation of
    a step has one backward, however often its forward runs.
    """
    if x.shape[-2:] != (cos.shape[-2], 2 * cos.shape[-1]) or sin.shape != cos.shape:
        raise ValueError(f"x {list(x.shape)} does not fit cos {list(cos.shape)} and sin {list(sin.shape)}")
    return _Rotation.apply(x, cos, sin, 1, gradient)


def split_and_rotate(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    gradient: FrequencyGradient | None = None,
    norm: HeadNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into queries, keys and values, and apply `norm`, if any, and RoPE to the first two.

    qkv: [s, b, g (r + 2) d], for each of the g = `kv_heads` KV heads its r queries, its key and its value, as
    Megatron orders them; cos, sin and gradient as in `apply_rope`. Returns q [b, g r, s, d], k and v
    [b, g, s, d], each [s, b, heads, d] in memory; v is a view of qkv. The backward writes all three gradients
    into one buffer.
    """
    _, b, width = qkv.shape
    if width % (kv_heads * 2 * cos.shape[-1]) or len(qkv) != len(cos) or sin.shape != cos.shape:
        raise ValueError(
            f"qkv {list(qkv.shape)} of {kv_heads} KV heads does not fit cos {list(cos.shape)} and sin {list(sin.shape)}"
        )
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    return _SplitAndRotate.apply(
        qkv, kv_heads, cos, sin, gradient, 0.0 if norm is None else norm.eps, *weights
    )


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, direction: int, gradient: FrequencyGradient | None
    ) -> Tensor:
        ctx.direction, ctx.gradient = direction, gradient
        out = torch.empty_like(x)
        _rotate(x, cos, sin, direction, out)
        # Attention keeps the rotated tensor too, so that saving it takes no memory.
        ctx.save_for_backward(cos, sin, *(() if gradient is None else (out,)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin, *rotated = ctx.saved_tensors
        if rotated:
            _add_frequency_gradient(ctx.gradient, rotated[0], grads[0])
        return _Rotation.apply(grads[0], cos, sin, -ctx.direction, None), None, None, None, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        gradient: FrequencyGradient | None,
        eps: float,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.gradient = qkv.shape, qkv.dtype, gradient
        heads = qkv.unflatten(2, (kv_heads, -1, 2 * cos.shape[-1]))  # [s, b, g, r + 2, d]
        rotated, inverse_rms = [], []
        for x, weight in zip(_queries_and_keys(heads), weights, strict=True):
            if weight is not None:
                x, r = normalise(x, weight, eps)
                inverse_rms.append(r)
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            _rotate(x, *_by_token(cos, sin), 1, out)
            rotated.append(out)
        ctx.heads = heads.shape[2:]
        q, k, v = (x.flatten(2, 3).permute(1, 2, 0, 3) for x in (*rotated, heads[:, :, :, -1:]))
        # Attention keeps q and k too, and qkv as v, so that saving them takes no memory.
        ctx.normed, ctx.saves_rotated = bool(inverse_rms), gradient is not None
        ctx.save_for_backward(
            cos,
            sin,
            *((q, k) if ctx.saves_rotated else ()),
            *((qkv, *weights, *inverse_rms) if ctx.normed else ()),
        )
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        if ctx.saves_rotated:
            for out, grad in zip(saved[:2], grads, strict=False):
                if grad is not None:
                    _add_frequency_gradient(ctx.gradient, out, grad)
        dqkv = torch.empty(ctx.shape, dtype=ctx.dtype, device=cos.device)
        heads = dqkv.unflatten(2, ctx.heads)
        parts = (*_queries_and_keys(heads), heads[:, :, :, -1:])
        for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            if grad is None:
                part.zero_()
                continue
            grad = grad.permute(2, 0, 1, 3).unflatten(2, part.shape[2:4])
            if i < 2:
                _rotate(grad, *_by_token(cos, sin), -1, part)
            else:
                part.copy_(grad)
        dweights: list[Tensor | None] = [None, None]
        if ctx.normed:
            qkv, *norms = saved[-5:]  # and both weights, both inverse_rms
            inputs = _queries_and_keys(qkv.unflatten(2, ctx.heads))
            for i, (x, part) in enumerate(zip(inputs, parts, strict=False)):
                if grads[i] is not None:
                    dweights[i] = normalise_backward(part, x, norms[i], norms[2 + i])
        return dqkv, None, None, None, None, None, *dweights


def _queries_and_keys(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Views [s, b, g, r, d] and [s, b, g, 1, d] of heads [s, b, g, r + 2, d]."""
    return heads[:, :, :, :-2], heads[:, :, :, -2:-1]


def _by_token(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [s, d/2] as [s, 1, 1, 1, d/2]."""
    return cos[:, None, None, None], sin[:, None, None, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> None:
    """Write x, rotated by `direction` times the angles, to `out`, which shares no memory with x.

    Angles by token (`_by_token`) are a Triton kernel's where there is one.
    """
    if cos.dim() == 5 and cos.dtype == torch.float32 and in_triton(x):
        from megatron_ultralong.model import elementwise_triton

        elementwise_triton.rotate(x, cos, sin, direction, out)
        return
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    if out.dtype == torch.promote_types(x.dtype, cos.dtype):
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
        torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
        return
    # Type promotion computes bf16 x float32 in float32 without a float32 copy of x, and rounds the result
    # once.
    out[..., :half] = torch.mul(first, cos).addcmul_(second, sin, value=-direction)
    out[..., half:] = torch.mul(second, cos).addcmul_(first, sin, value=direction)


@torch.no_grad()
def _add_frequency_gradient(gradient: FrequencyGradient, rotated: Tensor, grad: Tensor) -> None:
    """Add the gradient of the frequencies from that of the rotated queries or keys, both [b, h, s, d].

    A pair (y1, y2) turns by dy1 = -y2, dy2 = y1 with its angle. Summed over sequences and heads one by one,
    in float32 (float64 for float64), then over positions in float64.
    """
    dtype = torch.float64 if rotated.dtype == torch.float64 else torch.float32
    half = rotated.shape[-1] // 2
    angles = torch.zeros(rotated.shape[-2], half, dtype=dtype, device=rotated.device)
    for y, dy in zip(rotated.flatten(0, 1), grad.flatten(0, 1), strict=True):
        angles.addcmul_(dy[:, half:], y[:, :half]).addcmul_(dy[:, :half], y[:, half:], value=-1)
    gradient.total.add_(gradient.positions @ angles.double())
