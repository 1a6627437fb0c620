"""The layer for the longest sequences: queries, attention and its output in chunks too, so that only keys and
values exist whole.

Forward: keys and values of all tokens, then chunk by chunk norm, queries, attention, output projection and
MLP. Backward: chunk by chunk the same way back, the gradients of keys and values summed in float32, and at
the end those through their projection. As in layer.py attention is computed once: each chunk's output and
logsumexp are kept, in host memory where memory.offload says so, and so is the input, which then comes back a
chunk at a time.

Whole tensors, a token (H hidden size, g KV heads of head dimension d, e bytes of an element, with a
context-parallel ring more): forward input, output, keys and values, (2 H + 2 g d) e; backward keys, values
and their float32 gradients, and one buffer in which the gradient of the output becomes that of the input
(gradients.py), (H + 2 g d) e + 2 g d 4. 20 KiB each in bf16 in Llama-3.1-8B.

Shapes as in layer.py; a chunk is c of the t tokens of this rank, c TP of its s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel.zigzag import Starts
from megatron_ultralong.model.layer.gradients import Gradients, hand_down, leaf, place_for
from megatron_ultralong.model.layer.offload import Kept, Rows

if TYPE_CHECKING:
    from megatron_ultralong.model.layer.layer import Layer


class _Keeping:
    """What a layer keeps for its backward, where memory.offload says."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        away, self.store = layer.memory.offload, layer.store
        self.rows = Rows(self.store, x.shape) if away != "off" else None
        self.attention_away = away == "all"
        self.chunks: list[Kept | Sequence[Tensor]] = []
        self._last: Kept | None = None

    def input(self, rows: slice, x: Tensor) -> None:
        if self.rows is not None:
            self.rows.keep(rows, x)

    def attention(self, out: Tensor, lse: Tensor) -> None:
        if self.attention_away:
            self._last = self.store.keep_after(self._last, [out, lse])
        self.chunks.append(self._last or (out, lse))

    def pop(self) -> Sequence[Tensor]:
        """(attention output, logsumexp) of the last chunk that was not asked for."""
        kept = self.chunks.pop()
        return kept.get() if isinstance(kept, Kept) else kept


def forward(layer: Layer, x: Tensor, starts: Starts | None, keeping: _Keeping | None = None) -> Tensor:
    """The layer without a graph; what a backward needs goes to `keeping`."""
    _, k, v = layer.project(x, starts, queries=False)
    y = torch.empty_like(x)
    for rows in layer.chunks(x):
        if keeping is not None:
            keeping.input(rows, x[rows])  # goes out while attention is computed
        q = layer.before(x[rows], rows, len(x), starts)[0]
        out, lse = layer.self_attention.core_attention.forward_with_lse(
            q, k, v, starts, _local(layer, rows, len(x))
        )
        if keeping is not None:
            keeping.attention(out, lse)
        y[rows] = layer.after(x[rows], out)
    # A chunk on its way out holds the whole of x, beside which the next layer would have its own.
    layer.store.leave()
    return y


class QueryChunked(torch.autograd.Function):
    """The layer as one step of autograd. Only activations pass through it: parameters get their gradients by
    hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, starts: Starts | None) -> Tensor:
        ctx.layer, ctx.starts, ctx.keeping = layer, starts, _Keeping(layer, x)
        if ctx.keeping.rows is None:
            ctx.save_for_backward(x)
        return forward(layer, x, starts, ctx.keeping)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        layer, starts = ctx.layer, ctx.starts
        keeping, ctx.keeping = ctx.keeping, None
        attention = layer.self_attention.core_attention
        x: Tensor | Rows = ctx.saved_tensors[0] if keeping.rows is None else keeping.rows
        _, k, v = layer.project(x, starts, queries=False)
        dtype = k.dtype
        dkv = torch.zeros((2, *k.shape), dtype=torch.promote_types(dtype, torch.float32), device=k.device)
        dx = place_for(ctx, dy)  # chunk by chunk the one gradient becomes the other
        gradients = Gradients(list(layer.parameters()))
        for rows in reversed(list(layer.chunks(x))):  # in the order in which what was kept comes back
            here, (out, lse) = x[rows], keeping.pop()
            with torch.enable_grad():
                x_c, out_c = leaf(here), leaf(out)
                y = layer.after(x_c, out_c)
            dx[rows], dout = gradients.of([y], [x_c, out_c], [dy[rows]])
            with torch.enable_grad():
                x_c = leaf(here)
                q = layer.before(x_c, rows, len(x), starts)[0]
            dq, _, _ = attention.backward(
                dout, q.detach(), k, v, out, lse, starts, _local(layer, rows, len(x)), dkv
            )
            dx[rows] += gradients.of([q], [x_c], [dq])[0]
        del k, v
        for rows in reversed(list(layer.chunks(x))):
            with torch.enable_grad():
                x_c = leaf(x[rows])
                _, k_c, v_c = layer.before(x_c, rows, len(x), starts)
            shares = [layer.select(grad, rows).flatten(2, 3).to(dtype) for grad in dkv]
            dx[rows] += gradients.of([k_c, v_c], [x_c], shares)[0]
        gradients.hand_over()
        return hand_down(ctx, dx), None, None


def _local(layer: Layer, rows: slice, t: int) -> list[slice]:
    """Where a chunk lies among the s tokens of this context-parallel rank: `rows` of every tensor-parallel
    rank's stretch of t."""
    return [slice(part * t + rows.start, part * t + rows.stop) for part in range(layer.parts)]
