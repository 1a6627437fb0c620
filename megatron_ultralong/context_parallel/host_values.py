"""Values computed on the host, like the bounds of documents, as tensors on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_to_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Return x, a small tensor, on `device`; if that is a GPU, the host does not wait for its earlier work.

    Copies from page-locked memory, which PyTorch keeps until the copy has ended; for a copy from pageable
    memory it would wait.
    """
    to = torch.device("cpu" if device is None else device)
    if x.device.type == "cpu" and to.type == "cuda":
        return x.pin_memory().to(to, non_blocking=True)
    return x.to(to)
