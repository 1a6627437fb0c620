"""Gradients over chunks of a sequence: those of parameters, and of hidden states in one buffer from layer to
layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Gradients:
    """Gradients of parameters, summed over chunks in float32 and handed over once, as if there had been no
    chunks.

    Once, because Megatron's data parallel wrapper expects one gradient of a parameter in a backward pass.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def of(self, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Gradients of `inputs`, from `grads` of `outputs`; those of the parameters are kept."""
        found = torch.autograd.grad(outputs, [*inputs, *self.parameters], grads, allow_unused=True)
        for i, grad in enumerate(found[len(inputs) :]):
            if grad is None:
                continue
            total = self.sums[i]
            if total is None:
                self.sums[i] = grad
            elif total.dtype == torch.float32:
                total += grad
            else:
                self.sums[i] = total.float() + grad
        return list(found[: len(inputs)])  # type: ignore[arg-type]

    def hand_over(self, scale: Tensor | None = None) -> None:
        """Give each parameter its sum, times `scale`, by way of autograd, so that hooks on it run."""
        with torch.enable_grad():
            for i, parameter in enumerate(self.parameters):
                total, self.sums[i] = self.sums[i], None
                if total is not None:
                    total = total if scale is None else total * scale
                    torch.autograd.backward([parameter.view_as(parameter)], [total.to(parameter.dtype)])


def place_for(ctx: Any, dy: Tensor) -> Tensor:
    """Where a step of autograd puts the gradient of its input: over dy, that of its output, where nobody else
    can hold dy; else a new tensor.

    Autograd hands one gradient to several steps (an addition, say), so dy may be written to only where
    `hand_down` said so.
    """
    return dy if ctx.metadata.pop(_HANDED, None) == dy.data_ptr() else torch.empty_like(dy)


def hand_down(ctx: Any, dx: Tensor) -> Tensor:
    """dx, to be returned by the backward of ctx as the gradient of its first input: the step that made that
    input may overwrite it.

    dx must be held by nobody else. It reaches that step itself, or as part of a sum: autograd adds in place
    only to what it alone holds, so the sum is nobody else's either.
    """
    made_by = ctx.next_functions[0][0]
    if made_by is not None:
        made_by.metadata[_HANDED] = dx.data_ptr()
    return dx


_HANDED = "megatron_ultralong: address of a gradient"


def leaf(x: Tensor) -> Tensor:
    """x as the start of a new graph."""
    return x.detach().requires_grad_()
