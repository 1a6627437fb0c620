"""Parameters' gradients over chunks of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class Gradients:
    """Gradients of parameters, summed over chunks in float32 and handed over once, as if there had been no chunks.

    Once, because Megatron's data parallel wrapper expects one gradient of a parameter in a backward pass.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def of(self, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Gradients of `inputs`, from `grads` of `outputs`; those of the parameters are kept."""
        found = torch.autograd.grad(outputs, [*inputs, *self.parameters], grads, allow_unused=True)
        for i, grad in enumerate(found[len(inputs):]):
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

    def hand_over(self) -> None:
        """Give each parameter its sum by way of autograd, so that hooks on it run."""
        with torch.enable_grad():
            for i, parameter in enumerate(self.parameters):
                total, self.sums[i] = self.sums[i], None
                if total is not None:
                    torch.autograd.backward([parameter.view_as(parameter)], [total.to(parameter.dtype)])


def leaf(x: Tensor) -> Tensor:
    """x as the start of a new graph."""
    return x.detach().requires_grad_()
