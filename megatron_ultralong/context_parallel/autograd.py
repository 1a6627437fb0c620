"""One autograd function for all ways of attention: they give (out, logsumexp) and take them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.context_parallel.kernels.select import Gradients

Forward: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (out, lse)."""
Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
"""(dout, q, k, v, out, lse) -> (dq, dk, dv)."""


def differentiable(q: Tensor, k: Tensor, v: Tensor, forward: Forward, backward: Backward) -> Tensor:
    """The output of `forward`, with `backward` as its derivative; q, k, v, out and lse are kept until then."""
    return _Attention.apply(q, k, v, forward, backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forward: Forward, backward: Backward) -> Tensor:
        out, lse = forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backward_of = backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.backward_of(dout, *ctx.saved_tensors), None, None
