"""Gradients over chunks of a sequence: those of parameters, and of hidden states in one buffer from layer to
layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class ChunkedBackward:
    """Backward passes over chunks of a sequence: parameter gradients are summed in float32 and reach the
    parameters once, as if there had been no chunks.

    Once, because Megatron's data-parallel wrapper expects one gradient per parameter in a backward pass.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def backward(
        self, outputs: Sequence[Tensor | GradientEdge], inputs: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of `inputs`, given `grads` of `outputs`; add those of the parameters to the
        sums."""
        all_grads = torch.autograd.grad(outputs, [*inputs, *self.parameters], grads, allow_unused=True)
        for parameter, grad in zip(self.parameters, all_grads[len(inputs) :], strict=True):
            if grad is not None:
                self.add(parameter, grad)
        return list(all_grads[: len(inputs)])  # type: ignore[arg-type]

    def add(self, parameter: torch.nn.Parameter, grad: Tensor) -> None:
        """Add a gradient of one of the parameters to its sum."""
        i = next(i for i, known in enumerate(self.parameters) if known is parameter)
        total = self.sums[i]
        if total is None:
            self.sums[i] = grad
        elif total.dtype == torch.float32:
            total += grad
        else:
            self.sums[i] = total.float() + grad

    def accumulate_into_params(self, scale: Tensor | None = None) -> None:
        """Give each parameter its sum, times `scale`, through autograd, so that its hooks run."""
        with torch.enable_grad():
            for i, parameter in enumerate(self.parameters):
                total, self.sums[i] = self.sums[i], None
                if total is not None:
                    total = total if scale is None else total * scale
                    torch.autograd.backward([parameter.view_as(parameter)], [total.to(parameter.dtype)])


def reuse_or_allocate(ctx: Any, dy: Tensor) -> Tensor:
    """Return the buffer for the gradient of an autograd function's input: dy, the gradient of its output, if
    nobody else can hold dy; otherwise a new tensor.

    Autograd may pass one gradient to several functions (of an addition, say), so dy may be overwritten only
    if `mark_reusable` said so.
    """
    return dy if ctx.metadata.pop(_REUSABLE, None) == dy.data_ptr() else torch.empty_like(dy)


def mark_reusable(ctx: Any, dx: Tensor) -> Tensor:
    """Return dx, the gradient of the first input of ctx, after telling the function that made this input that
    it may overwrite it.

    Nobody else may hold dx. It reaches that function itself, or as part of a sum: autograd adds in place only
    to what it alone holds, so nobody else holds the sum either.
    """
    made_by = ctx.next_functions[0][0]
    if made_by is not None:
        made_by.metadata[_REUSABLE] = dx.data_ptr()
    return dx


_REUSABLE = "megatron_ultralong: address of a gradient that may be overwritten"


def leaf(x: Tensor) -> Tensor:
    """Return x as the start of a new graph."""
    return x.detach().requires_grad_()
