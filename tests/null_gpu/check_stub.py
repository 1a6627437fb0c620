"""What the other checks rely on: the stub's device, its memory, its limits and its log."""

from __future__ import annotations

import pytest
import torch

CUDA = torch.device("cuda", 0)


def test_memory_is_reserved_and_not_touched() -> None:
    before = torch.cuda.memory_allocated()
    x = torch.empty(2**34, device=CUDA)
    assert torch.cuda.memory_allocated() - before == 2**36
    x.zero_()
    del x
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**38, device=CUDA)


def test_host_values_come_back() -> None:
    assert torch.arange(5).to(CUDA).tolist() == [0, 1, 2, 3, 4]


def test_launch_limits() -> None:
    q = torch.empty(70_000, 1, 2, 64, device=CUDA, dtype=torch.bfloat16)  # grid.y is the batch
    with pytest.raises(torch.AcceleratorError, match="invalid configuration"):
        torch.ops.aten._scaled_dot_product_flash_attention(*(q.transpose(1, 2),) * 3)
    torch.ones(1, device=CUDA)  # the error was taken
