"""memory.query_chunks, for the longest sequences: queries, attention and its output in chunks too, so that of
a layer only keys and values exist for all tokens at once.

Forward: keys and values of all tokens, then chunk by chunk norm, queries, attention, output projection and
MLP. Backward: chunk by chunk in reverse, the gradients of keys and values summed in float32, and at the end
those through their projection. As in recompute.py attention is computed once: each chunk's output and
logsumexp are kept, in host memory if memory.offload says so, and so is the input, which then comes back one
chunk at a time.

Tensors over all tokens, per token (H hidden size, g KV heads of head dimension d, e bytes per element; more
with a context-parallel ring): forward input, output, keys and values, (2 H + 2 g d) e; backward keys, values
and their float32 gradients, and one buffer in which the gradient of the output becomes that of the input
(gradients.py), (H + 2 g d) e + 2 g d 4. 20 KiB each in bf16 in Llama-3.1-8B.

Shapes as in layer.py; a chunk is c of the t tokens of this rank, c TP of its s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.model.layer.gradients import ChunkedBackward, leaf, mark_reusable, reuse_or_allocate
from megatron_ultralong.model.layer.layer import HiddenStates, Layer
from megatron_ultralong.model.layer.offload import OffloadedHiddenStates, OffloadedTensors
from megatron_ultralong.model.layer.recompute import backward_output_and_mlp


def forward_query_chunks(layer: Layer, x: Tensor, placement: Placement | None) -> Tensor:
    """The layer, x [t, b, H] -> [t, b, H], with queries in chunks forward and backward."""
    if not torch.is_grad_enabled():
        return _forward(layer, x, placement)
    return _QueryChunks.apply(x, layer, placement)


class _SavedChunks:
    """What a layer keeps of each chunk for its backward, on the device or where memory.offload says."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        offload, self.store = layer.memory.offload, layer.store
        self.offloaded_input = OffloadedHiddenStates(self.store, x.shape) if offload != "off" else None
        self.offload_attention = offload == "all"
        self.attention: list[OffloadedTensors | Sequence[Tensor]] = []
        self._last: OffloadedTensors | None = None

    def save_input(self, rows: slice, x: Tensor) -> None:
        if self.offloaded_input is not None:
            self.offloaded_input.offload(rows, x)

    def save_attention(self, out: Tensor, lse: Tensor) -> None:
        if self.offload_attention:
            self._last = self.store.offload_after(self._last, [out, lse])
        self.attention.append(self._last or (out, lse))

    def pop_attention(self) -> Sequence[Tensor]:
        """Return (attention output, logsumexp) of the last chunk not yet popped."""
        saved = self.attention.pop()
        return saved.fetch() if isinstance(saved, OffloadedTensors) else saved


def _forward(
    layer: Layer, x: Tensor, placement: Placement | None, saved: _SavedChunks | None = None
) -> Tensor:
    """The layer without a graph; what a backward needs goes to `saved`."""
    core = layer.self_attention.core_attention
    _, k, v = layer.project_qkv_in_chunks(x, placement, queries=False)
    y = torch.empty_like(x)
    for rows in layer.chunks(x):
        if saved is not None:
            saved.save_input(rows, x[rows])  # copied out while attention is computed
        q = layer.project_qkv(x[rows], rows, len(x), placement)[0]
        spec = core.spec(placement, _local_rows(layer, rows, len(x)))
        out, lse = api.attention_forward(q, k, v, core.groups, spec)
        if saved is not None:
            saved.save_attention(out, lse)
        y[rows] = layer.output_and_mlp(x[rows], out)
    # A chunk whose copy is in flight keeps all of x alive, in addition to the input of the following layer.
    layer.store.drop_device_copies()
    return y


class _QueryChunks(torch.autograd.Function):
    """Only activations pass through autograd here: parameters get their gradients from ChunkedBackward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, placement: Placement | None) -> Tensor:
        ctx.layer, ctx.placement, ctx.saved = layer, placement, _SavedChunks(layer, x)
        if ctx.saved.offloaded_input is None:
            ctx.save_for_backward(x)
        return _forward(layer, x, placement, ctx.saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        layer, placement = ctx.layer, ctx.placement
        saved, ctx.saved = ctx.saved, None
        core = layer.self_attention.core_attention
        x: HiddenStates = ctx.saved_tensors[0] if saved.offloaded_input is None else saved.offloaded_input
        _, k, v = layer.project_qkv_in_chunks(x, placement, queries=False)
        dtype = k.dtype
        dkv = torch.zeros((2, *k.shape), dtype=accumulation_dtype(k), device=k.device)
        dx = reuse_or_allocate(ctx, dy)  # chunk by chunk, dy is overwritten with dx
        chunked = ChunkedBackward(list(layer.parameters()))
        for rows in reversed(list(layer.chunks(x))):  # the order in which offloaded tensors come back
            x_rows, (out, lse) = x[rows], saved.pop_attention()
            dx[rows], dout = backward_output_and_mlp(layer, chunked, x_rows, out, dy[rows])
            with torch.enable_grad():
                x_c = leaf(x_rows)
                q = layer.project_qkv(x_c, rows, len(x), placement)[0]
            spec = core.spec(placement, _local_rows(layer, rows, len(x)))
            dq = api.attention_backward_rows(dout, q.detach(), k, v, out, lse, core.groups, spec, dkv)
            dx[rows] += chunked.backward([q], [x_c], [dq])[0]
        del k, v
        for rows in reversed(list(layer.chunks(x))):
            with torch.enable_grad():
                x_c = leaf(x[rows])
                _, k_c, v_c = layer.project_qkv(x_c, rows, len(x), placement)
            dkv_c = [layer.view_rows(grad, rows).flatten(2, 3).to(dtype) for grad in dkv]
            dx[rows] += chunked.backward([k_c, v_c], [x_c], dkv_c)[0]
        chunked.accumulate_into_params()
        return mark_reusable(ctx, dx), None, None


def _local_rows(layer: Layer, rows: slice, t: int) -> list[slice]:
    """A chunk's ranges among the s tokens of this context-parallel rank: `rows` of every tensor-parallel
    rank's shard of t."""
    return [slice(shard * t + rows.start, shard * t + rows.stop) for shard in range(layer.tp_shards)]
