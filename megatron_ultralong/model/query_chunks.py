"""The layer for the longest sequences: queries, attention and its output in chunks too, so that only keys and values exist whole.

Forward: keys and values of all tokens, then chunk by chunk norm, queries, attention, output projection and MLP. Backward: chunk by
chunk the same way back, the gradients of keys and values summed in float32, and at the end those through their projection. As in
layer.py attention is computed once: each chunk's output and logsumexp are kept, in host memory where memory.offload says so.

Shapes as in layer.py; a chunk is c of the t tokens of this rank, c TP of its s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel.layout import Starts
from megatron_ultralong.model.gradients import Gradients, leaf
from megatron_ultralong.model.offload import Kept

if TYPE_CHECKING:
    from megatron_ultralong.model.layer import Layer


def forward(layer: Layer, x: Tensor, starts: Starts | None, keep: list[Any] | None = None) -> Tensor:
    """The layer without a graph; each chunk's (attention output, logsumexp) goes to `keep`, where one is given, in order."""
    _, k, v = layer.project(x, starts, queries=False)
    y = torch.empty_like(x)
    for rows in layer.chunks(x):
        q = layer.before(x[rows], rows, len(x), starts)[0]
        out, lse = layer.self_attention.core_attention.forward_with_lse(q, k, v, starts, _local(layer, rows, len(x)))
        if keep is not None:
            keep.append(layer.store.keep([out, lse]) if layer.memory.offload == "attention" else (out, lse))
        y[rows] = layer.after(x[rows], out)
    return y


class QueryChunked(torch.autograd.Function):
    """The layer as one step of autograd. Only activations pass through it: parameters get their gradients by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, starts: Starts | None) -> Tensor:
        ctx.layer, ctx.starts, ctx.chunks = layer, starts, []
        y = forward(layer, x, starts, ctx.chunks)
        if layer.memory.offload == "off":
            ctx.save_for_backward(x)
        else:
            ctx.kept = layer.store.keep([x])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        layer, starts = ctx.layer, ctx.starts
        attention = layer.self_attention.core_attention
        if layer.memory.offload == "off":
            [x] = ctx.saved_tensors
        else:
            [x], ctx.kept = ctx.kept.get(), None
        _, k, v = layer.project(x, starts, queries=False)
        dk, dv = (torch.zeros_like(y, dtype=torch.promote_types(y.dtype, torch.float32)) for y in (k, v))
        dx = torch.empty_like(x)
        gradients = Gradients(list(layer.parameters()))
        for rows in reversed(list(layer.chunks(x))):  # in the order in which what was kept comes back
            out, lse = _back(ctx.chunks.pop())
            with torch.enable_grad():
                x_c, out_c = leaf(x[rows]), leaf(out)
                y = layer.after(x_c, out_c)
            dx[rows], dout = gradients.of([y], [x_c, out_c], [dy[rows]])
            with torch.enable_grad():
                x_c = leaf(x[rows])
                q = layer.before(x_c, rows, len(x), starts)[0]
            dq, dk_share, dv_share = attention.backward(dout, q.detach(), k, v, out, lse, starts, _local(layer, rows, len(x)))
            dk += dk_share
            dv += dv_share
            dx[rows] += gradients.of([q], [x_c], [dq])[0]
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        for rows in layer.chunks(x):
            with torch.enable_grad():
                x_c = leaf(x[rows])
                _, k_c, v_c = layer.before(x_c, rows, len(x), starts)
            dx[rows] += gradients.of([k_c, v_c], [x_c], [layer.select(grad, rows).flatten(2, 3) for grad in (dk, dv)])[0]
        gradients.hand_over()
        return dx, None, None


def _local(layer: Layer, rows: slice, t: int) -> list[slice]:
    """Where a chunk lies among the s tokens of this context-parallel rank: `rows` of every tensor-parallel rank's stretch of t."""
    return [slice(part * t + rows.start, part * t + rows.stop) for part in range(layer.parts)]


def _back(kept: Kept | Sequence[Tensor]) -> Sequence[Tensor]:
    return kept.get() if isinstance(kept, Kept) else kept
