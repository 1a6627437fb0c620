"""memory.recompute=all_but_attention: attention is computed once, everything else again in the backward.

A layer keeps its input, the attention output and the logsumexp, on the device or where memory.offload says.
The backward recomputes norms, projections, RoPE and MLP, one chunk of tokens at a time, and passes the kept
output to the backward of the attention kernels: their forward runs once per step (Li et al., DistFlashAttn,
arXiv 2310.03294, reorder checkpoints to the same end).

Shapes as in layer.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.model.layer.gradients import ChunkedBackward, leaf, mark_reusable, reuse_or_allocate
from megatron_ultralong.model.layer.layer import Layer


def forward_all_but_attention(layer: Layer, x: Tensor, placement: Placement | None) -> Tensor:
    """The layer, x [t, b, H] -> [t, b, H]; its backward recomputes all but attention."""
    if not torch.is_grad_enabled():
        return layer.forward_in_chunks(x, placement)[0]
    return _RecomputeAllButAttention.apply(x, layer, placement)


def backward_output_and_mlp(
    layer: Layer, chunked: ChunkedBackward, x: Tensor, out: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Recompute `layer.output_and_mlp` of x [c, b, H] and out [b, h, c TP, d], and return their gradients,
    given dy [c, b, H].

    The output itself is not needed, so that of the MLP's second linear, where it is Megatron's own, only the
    backward is computed.
    """
    with torch.enable_grad():
        x, out = leaf(x), leaf(out)
        residual, hidden = layer.residual_and_hidden(x, out)
        linear = layer.mlp.linear_fc2
        if not isinstance(linear, RowParallelLinear):
            y = residual + layer.adapted("linear_fc2", linear(hidden)[0], hidden)
            dx, dout = chunked.backward([y], [x, out], [dy])
            return dx, dout
        residual = layer.adapted("linear_fc2", residual, hidden)  # of which the linear's output is the rest
    # [c TP, b, H]
    dy_all = gather_from_sequence_parallel_region(dy, group=layer.tp_group) if layer.tp_shards > 1 else dy
    if linear.weight.requires_grad:
        chunked.add(linear.weight, dy_all.flatten(0, 1).t().matmul(hidden.detach().flatten(0, 1)))
    if linear.bias is not None and linear.bias.requires_grad:
        chunked.add(linear.bias, dy.flatten(0, 1).sum(0))  # of this rank's tokens only, as autograd's
    dhidden = dy_all.matmul(linear.weight)
    edge = torch.autograd.graph.get_gradient_edge(hidden)
    del hidden, dy_all  # not needed any more: of the size of the MLP
    dx, dout = chunked.backward([residual, edge], [x, out], [dy, dhidden])
    return dx, dout


class _RecomputeAllButAttention(torch.autograd.Function):
    """Only activations pass through autograd here: parameters get their gradients from ChunkedBackward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, placement: Placement | None) -> Tensor:
        y, out, lse = layer.forward_in_chunks(x, placement)
        ctx.layer, ctx.placement, ctx.offloaded = layer, placement, None
        to_host = {"off": [], "layer_inputs": [x], "all": [x, out, lse]}[layer.memory.offload]
        if to_host:
            ctx.offloaded = layer.store.offload(to_host)
        ctx.save_for_backward(*[x, out, lse][len(to_host) :])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        layer, placement = ctx.layer, ctx.placement
        saved: list[Tensor] = [*(ctx.offloaded.fetch() if ctx.offloaded else []), *ctx.saved_tensors]
        x, out, lse = saved
        del saved
        ctx.offloaded = None
        core = layer.self_attention.core_attention
        dx, dout = reuse_or_allocate(ctx, dy), torch.empty_like(out)
        chunked = ChunkedBackward(list(layer.parameters()))
        for rows in layer.chunks(x):
            out_c = layer.view_rows(out, rows).flatten(2, 3)
            dx[rows], dout_c = backward_output_and_mlp(layer, chunked, x[rows], out_c, dy[rows])
            del out_c
            layer.view_rows(dout, rows).copy_(layer.view_rows(dout_c, slice(None)))
        q, k, v = layer.project_qkv_in_chunks(x, placement)
        dqkv = api.attention_backward(dout, q, k, v, out, lse, core.groups, core.spec(placement))
        del q, k, v, out, dout
        for rows in layer.chunks(x):
            with torch.enable_grad():
                x_c = leaf(x[rows])
                qkv_c = layer.project_qkv(x_c, rows, len(x), placement)
            dqkv_c = [layer.view_rows(grad, rows).flatten(2, 3) for grad in dqkv]
            dx[rows] += chunked.backward(list(qkv_c), [x_c], dqkv_c)[0]
        chunked.accumulate_into_params()
        return mark_reusable(ctx, dx), None, None
