"""The transformer layer: Megatron's parameters, and a forward that is a function of its own.

The spec chooses that function (model/spec.py): everything in one graph (`forward_in_one_graph`), attention
computed once and everything else recomputed in chunks of the sequence (recompute.py), or queries and
attention in chunks too (query_chunks.py). This file has the parts that these are made of.

Shapes: s tokens of this context-parallel rank, t = s/TP of them on this rank with sequence parallelism
(otherwise t = s), b sequences, H hidden size, h query heads and g KV heads of this tensor-parallel rank, d
head dimension; c of the t tokens are a chunk, and with sequence parallelism a linear gathers the same c rows
of every rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ultralong.config import Memory
from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.model.adapters import Adapters
from megatron_ultralong.model.elementwise import swiglu
from megatron_ultralong.model.layer.offload import HostStore, OffloadedHiddenStates

QKV = tuple[Tensor, Tensor, Tensor]
LayerForward: TypeAlias = "Callable[[Layer, Tensor, Placement | None], Tensor]"
"""(layer, hidden states [t, b, H], document starts) -> hidden states [t, b, H]."""
HiddenStates: TypeAlias = Tensor | OffloadedHiddenStates
"""[t, b, H], on the device or in host memory."""


class Layer(TransformerLayer):
    """Megatron's layer, its parameters and their names; the forward is `layer_forward`."""

    def __init__(
        self,
        *args: Any,
        memory: Memory,
        store: HostStore,
        layer_forward: LayerForward,
        adapters: Callable[[], Adapters] | None = None,
        **kwargs: Any,
    ) -> None:
        """adapters: makes those of LoRA."""
        super().__init__(*args, **kwargs)
        self.memory, self.store, self.layer_forward = memory, store, layer_forward
        self.adapters: Adapters | None = None if adapters is None else adapters()
        self.tp_shards = self.tp_group.size() if self.config.sequence_parallel else 1
        """Shards of the sequence, one per tensor-parallel rank, that a linear gathers."""
        if self.config.qk_layernorm:
            attention = self.self_attention
            attention.core_attention.norms = (attention.q_layernorm, attention.k_layernorm)

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Placement | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [t, b, H] -> ([t, b, H], None). packed_seq_params: the placement of the row
        (Megatron's block passes it on)."""
        return self.layer_forward(self, hidden_states, packed_seq_params), None

    # ---- the layer's two halves around attention, for any rows of it ----------------------------

    def project_qkv(self, x: Tensor, rows: slice, t: int, placement: Placement | None) -> QKV:
        """Norm, projection, the norm of queries and keys if any, and RoPE of `rows` of t, whose hidden states
        are x [c, b, H] -> q [b, h, c TP, d], k and v [b, g, c TP, d]."""
        attention = self.self_attention
        x = self.input_layernorm(x)
        qkv = self.adapted("linear_qkv", attention.linear_qkv(x)[0], x)  # [c TP, b, (h + 2 g) d]
        kv_heads = attention.num_query_groups_per_partition
        return attention.core_attention.split_and_rotate(qkv, kv_heads, rows, t, self.tp_shards, placement)

    def output_and_mlp(self, x: Tensor, out: Tensor) -> Tensor:
        """Output projection and MLP with their residuals: x [c, b, H] and the attention output of its rows
        [b, h, c TP, d] -> [c, b, H]."""
        x, hidden = self.residual_and_hidden(x, out)
        return _add(x, self.adapted("linear_fc2", self.mlp.linear_fc2(hidden)[0], hidden))

    def residual_and_hidden(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The same up to the MLP's second linear: return what is added to its output [c, b, H], and its input
        [c TP, b, f]."""
        b, h, s, d = out.shape
        out = out.permute(2, 0, 1, 3).reshape(s, b, h * d)
        x = _add(x, self.adapted("linear_proj", self.self_attention.linear_proj(out)[0], out))
        normed = self.pre_mlp_layernorm(x)
        return x, swiglu(self.adapted("linear_fc1", self.mlp.linear_fc1(normed)[0], normed))

    def adapted(self, linear: str, y: Tensor, x: Tensor) -> Tensor:
        """Return y, a linear's output for x, with what its adapters add."""
        return y if self.adapters is None else self.adapters.add(linear, y, x)

    # ---- chunks of the sequence -----------------------------------------------------------------

    def chunks(self, x: HiddenStates) -> Iterator[slice]:
        """Iterate over the rows of x [t, b, H], at most `memory.layer_chunk` tokens (of all tensor-parallel
        ranks) at a time."""
        tokens = self.memory.layer_chunk
        size = max(1, tokens // (x.shape[1] * self.tp_shards)) if tokens else max(1, len(x))
        return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))

    def view_rows(self, x: Tensor, rows: slice) -> Tensor:
        """Return the view [b, h, TP, c, d] of x [b, h, s, d] that holds what a linear gathers for `rows`."""
        return x.unflatten(2, (self.tp_shards, -1))[:, :, :, rows]

    def project_qkv_in_chunks(
        self, x: HiddenStates, placement: Placement | None, queries: bool = True
    ) -> QKV:
        """`project_qkv` of all rows, chunk by chunk, into complete q, k and v; without `queries` q is
        empty."""
        complete: list[Tensor] = []
        for rows in reversed(list(self.chunks(x))):  # the order in which offloaded rows come back fastest
            qkv = self.project_qkv(x[rows], rows, len(x), placement)
            if not queries:
                qkv = (qkv[0][:, :0], *qkv[1:])
            if rows.stop - rows.start == len(x):
                return qkv
            # [s, b, h, d] in memory, as laid out by the projection
            complete = complete or [
                y.new_empty(len(x) * self.tp_shards, y.shape[0], y.shape[1], y.shape[3]).permute(1, 2, 0, 3)
                for y in qkv
            ]
            for buffer, y in zip(complete, qkv, strict=True):
                self.view_rows(buffer, rows).copy_(self.view_rows(y, slice(None)))
        q, k, v = complete
        return q, k, v

    def forward_in_chunks(self, x: Tensor, placement: Placement | None) -> tuple[Tensor, Tensor, Tensor]:
        """Without a graph: return (hidden states, attention output [b, h, s, d], logsumexp [b, h, s])."""
        core = self.self_attention.core_attention
        qkv = self.project_qkv_in_chunks(x, placement)
        out, lse = api.attention_forward(*qkv, core.groups, core.spec(placement))
        del qkv
        if next(self.chunks(x)) == slice(0, len(x)):
            # Without its base: the pipeline frees no view of another tensor.
            return self.output_and_mlp(x, out).detach(), out, lse
        y = torch.empty_like(x)
        for rows in self.chunks(x):
            y[rows] = self.output_and_mlp(x[rows], self.view_rows(out, rows).flatten(2, 3))
        return y, out, lse


def _add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, where y is the output of a linear; without a graph in its memory."""
    return x + y if torch.is_grad_enabled() else y.add_(x)


def forward_in_one_graph(layer: Layer, x: Tensor, placement: Placement | None) -> Tensor:
    """The layer in one graph: autograd stores every activation (memory.recompute none; full, where Megatron
    runs it again)."""
    if not torch.is_grad_enabled():
        return layer.forward_in_chunks(x, placement)[0]
    qkv = layer.project_qkv(x, slice(0, len(x)), len(x), placement)
    return layer.output_and_mlp(x, layer.self_attention.core_attention(*qkv, placement))
