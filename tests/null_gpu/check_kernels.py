"""Limits of a launch, and what the attention kernels allocate."""

from __future__ import annotations

import pytest
import torch

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.kernels import varlen

CUDA = torch.device("cuda", 0)


def tensors(h: int, g: int, s: int, d: int = 64) -> list[torch.Tensor]:
    """q, k, v as the model has them, [s, 1, heads, d] in memory."""
    return [torch.empty(s, 1, n, d, device=CUDA, dtype=torch.bfloat16).permute(1, 2, 0, 3) for n in (h, g, g)]


@pytest.mark.parametrize("documents", [65_535, 65_536, 200_000])
def test_many_documents(documents: int) -> None:
    s = 2**18
    q, k, v = tensors(4, 1, s)
    blocks = zigzag.blocks_between(0, 0, s, 1, range(documents))
    out, lse = varlen.forward(q, k, v, blocks)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in varlen.backward(out, q, k, v, out, lse, blocks)] == [q.shape, k.shape, v.shape]
