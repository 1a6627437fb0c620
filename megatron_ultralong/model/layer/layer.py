"""The transformer layer: attention is computed once, all else in chunks of the sequence.

With memory.recompute=all_but_attention a layer keeps its input, the attention output and the logsumexp. The backward
recomputes norms, projections, RoPE and MLP, a chunk of tokens at a time, and hands the kept output to the
attention kernels' backward: the forward kernels run once a step (Li et al., DistFlashAttn, arXiv 2310.03294,
reorder checkpoints to the same end).

Shapes: s tokens of this context-parallel rank, t = s/TP of them on this rank with sequence parallelism (else
t = s), b sequences, H hidden size, h query heads and g KV heads of this tensor-parallel rank, d head
dimension; c of the t tokens make a chunk, and with sequence parallelism a linear gathers the same c rows of
every rank's stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.config import Memory
from megatron_ultralong.context_parallel.zigzag import Starts
from megatron_ultralong.model.layer import query_chunks
from megatron_ultralong.model.layer.gradients import Gradients, hand_down, leaf, place_for
from megatron_ultralong.model.layer.offload import HostStore, Rows

QKV = tuple[Tensor, Tensor, Tensor]


class Layer(TransformerLayer):
    """Megatron's layer, its parameters and their names; the way through it is ours."""

    def __init__(self, *args: Any, memory: Memory, store: HostStore, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory, self.store = memory, store
        self.parts = self.tp_group.size() if self.config.sequence_parallel else 1

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Starts | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [t, b, H] -> ([t, b, H], None). packed_seq_params: where the row's documents start
        (Megatron's block hands it on)."""
        x, starts = hidden_states, packed_seq_params
        if not torch.is_grad_enabled():
            return query_chunks.forward(self, x, starts) if self.memory.query_chunks else self._chunked(
                x, starts
            )[0], None
        if self.memory.recompute == "all_but_attention":
            kind = query_chunks.QueryChunked if self.memory.query_chunks else _KeptAttention
            return kind.apply(x, self, starts), None
        return self.after(
            x, self.self_attention.core_attention(*self.before(x, slice(0, len(x)), len(x), starts), starts)
        ), None

    # ---- the layer's two halves around attention, for any rows of it ----------------------------

    def before(self, x: Tensor, rows: slice, t: int, starts: Starts | None) -> QKV:
        """Norm, projection and RoPE of `rows` of t, whose hidden states are x [c, b, H] -> q [b, h, c TP, d],
        k and v [b, g, c TP, d]."""
        qkv = self.self_attention.get_query_key_value_tensors(self.input_layernorm(x), None)
        q, k, v = (part.permute(1, 2, 0, 3) for part in qkv)
        return self.self_attention.core_attention.rotate(q, k, rows, t, self.parts, starts) + (v,)

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Output projection and MLP with their residuals: x [c, b, H] and the attention of its rows [b, h, c
        TP, d] -> [c, b, H]."""
        b, h, s, d = out.shape
        x = x + self.self_attention.linear_proj(out.permute(2, 0, 1, 3).reshape(s, b, h * d))[0]
        return x + self.mlp(self.pre_mlp_layernorm(x))[0]

    # ---- chunks ---------------------------------------------------------------------------------

    def chunks(self, x: Tensor | Rows) -> Iterator[slice]:
        """The rows of x [t, b, H], at most `memory.layer_chunk` tokens (of all tensor-parallel ranks) at a
        time."""
        size = (
            max(1, self.memory.layer_chunk // (x.shape[1] * self.parts))
            if self.memory.layer_chunk
            else max(1, len(x))
        )
        return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))

    def select(self, x: Tensor, rows: slice) -> Tensor:
        """The view [b, h, TP, c, d] of x [b, h, s, d] that holds what a linear gathers for `rows`."""
        return x.unflatten(2, (self.parts, -1))[:, :, :, rows]

    def project(self, x: Tensor | Rows, starts: Starts | None, queries: bool = True) -> QKV:
        """`before` of all rows, chunk by chunk, into whole q, k and v; without `queries` q is empty."""
        whole: list[Tensor] = []
        for rows in reversed(list(self.chunks(x))):  # as `Rows` come fastest
            part = self.before(x[rows], rows, len(x), starts)
            if not queries:
                part = (part[0][:, :0], *part[1:])
            if rows.stop - rows.start == len(x):
                return part
            # [s, b, h, d] in memory, as the projection lays them out
            whole = whole or [
                y.new_empty(len(x) * self.parts, y.shape[0], y.shape[1], y.shape[3]).permute(1, 2, 0, 3)
                for y in part
            ]
            for to, y in zip(whole, part, strict=True):
                self.select(to, rows).copy_(self.select(y, slice(None)))
        q, k, v = whole
        return q, k, v

    def _chunked(self, x: Tensor, starts: Starts | None) -> tuple[Tensor, Tensor, Tensor]:
        """Without a graph: (hidden states, attention output [b, h, s, d], logsumexp [b, h, s])."""
        out, lse = self.self_attention.core_attention.forward_with_lse(*self.project(x, starts), starts)
        y = torch.empty_like(x)
        for rows in self.chunks(x):
            y[rows] = self.after(x[rows], self.select(out, rows).flatten(2, 3))
        return y, out, lse


class _KeptAttention(torch.autograd.Function):
    """The layer as one step of autograd. Only activations pass through it: parameters get their gradients by
    hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, starts: Starts | None) -> Tensor:
        y, out, lse = layer._chunked(x, starts)
        ctx.layer, ctx.starts, ctx.kept = layer, starts, None
        away = {"off": [], "layer_inputs": [x], "all": [x, out, lse]}[layer.memory.offload]
        if away:
            ctx.kept = layer.store.keep(away)
        ctx.save_for_backward(*[x, out, lse][len(away) :])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        layer, starts = ctx.layer, ctx.starts
        kept: list[Tensor] = [*(ctx.kept.get() if ctx.kept else []), *ctx.saved_tensors]
        x, out, lse = kept
        del kept
        ctx.kept = None
        attention = layer.self_attention.core_attention
        dx, dout = place_for(ctx, dy), torch.empty_like(out)
        gradients = Gradients(list(layer.parameters()))
        for rows in layer.chunks(x):
            with torch.enable_grad():
                x_c, out_c = leaf(x[rows]), leaf(layer.select(out, rows).flatten(2, 3))
                y = layer.after(x_c, out_c)
            dx[rows], dout_c = gradients.of([y], [x_c, out_c], [dy[rows]])
            layer.select(dout, rows).copy_(layer.select(dout_c, slice(None)))
        dqkv = attention.backward(dout, *layer.project(x, starts), out, lse, starts)
        del out, dout
        for rows in layer.chunks(x):
            with torch.enable_grad():
                x_c = leaf(x[rows])
                qkv = layer.before(x_c, rows, len(x), starts)
            dx[rows] += gradients.of(
                list(qkv), [x_c], [layer.select(grad, rows).flatten(2, 3) for grad in dqkv]
            )[0]
        gradients.hand_over()
        return hand_down(ctx, dx), None, None
