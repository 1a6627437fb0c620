"""AdamW whose state is in host memory, for measuring complete training steps of models larger than the GPU
allows."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from megatron_ultralong.measure import timing


class HostAdam:
    """AdamW for weights on a device, with float32 weights and both moments in host memory.

    Gradients are copied to pinned host memory and the new weights are copied back. `seconds` has the time of
    each step.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()
        self._weights = list(parameters)
        self._pinned = [
            torch.empty(p.shape, dtype=p.dtype, pin_memory=device.type == "cuda") for p in parameters
        ]
        # One optimizer per weight, so that only one weight's float32 gradient exists at a time.
        self._masters = [p.detach().float().cpu().clone().requires_grad_() for p in parameters]
        self._adams = [torch.optim.AdamW([master], lr=1e-5, fused=True) for master in self._masters]

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights and set their gradients to zero."""
        timing.synchronize(self.device)
        start = time.perf_counter()
        for weight, pinned in zip(self._weights, self._pinned, strict=True):
            assert weight.grad is not None
            pinned.copy_(weight.grad, non_blocking=True)
            weight.grad.zero_()
        timing.synchronize(self.device)
        for weight, pinned, master, adam in zip(
            self._weights, self._pinned, self._masters, self._adams, strict=True
        ):
            master.grad = pinned.float()
            adam.step()
            master.grad = None
            weight.copy_(pinned.copy_(master), non_blocking=True)
        timing.synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
