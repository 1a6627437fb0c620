"""Limits of a launch, and what the attention kernels allocate."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_ultralong.context_parallel.kernels import merge, varlen
from megatron_ultralong.measure.bytes_moved import BytesMoved
from megatron_ultralong.model.elementwise import swiglu
from megatron_ultralong.model.rotary_embedding import split_and_rotate
from tests.packed import own_blocks

CUDA = torch.device("cuda", 0)


def tensors(h: int, g: int, s: int, d: int = 64) -> list[torch.Tensor]:
    """q, k, v as the model has them, [s, 1, heads, d] in memory."""
    return [torch.empty(s, 1, n, d, device=CUDA, dtype=torch.bfloat16).permute(1, 2, 0, 3) for n in (h, g, g)]


@pytest.mark.parametrize("documents", [65_535, 65_536, 200_000])
def test_many_documents(documents: int) -> None:
    s = 2**18
    q, k, v = tensors(4, 1, s)
    blocks = own_blocks(range(documents), s)
    out, lse = varlen.forward(q, k, v, blocks)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in varlen.backward(out, q, k, v, out, lse, blocks)] == [q.shape, k.shape, v.shape]


def merged(s: int) -> torch.Tensor:
    out, lse = torch.zeros(1, 2, s, 64, device=CUDA), torch.zeros(1, 2, s, device=CUDA)
    merge.merge_(out, lse, out.bfloat16(), lse.clone())
    return out


def test_triton_compiles_from_several_threads() -> None:
    """Every size is a kernel of its own: one token, a divisor of 16, none."""
    assert merge.why_not_triton(CUDA) is None
    with ThreadPoolExecutor(8) as pool:
        sizes = [1, 16, 17] * 8
        assert [x.shape[2] for x in pool.map(merged, sizes)] == sizes


def test_bytes_of_triton_kernels_are_counted() -> None:
    n, f, s, g, d = 32, 64, 16, 2, 8
    x, qkv = (torch.empty(m, 1, w, device=CUDA, requires_grad=True) for m, w in ((n, 2 * f), (s, 4 * g * d)))
    cos = torch.empty(s, d // 2, device=CUDA)
    with BytesMoved() as counted:
        (swiglu(x), *split_and_rotate(qkv, g, cos, cos))
    assert counted.by_operation == {
        "_swiglu": 4 * 3 * n * f,
        "_rotate": 4 * (2 * s * 3 * g * d + 4 * s * d // 2),
    }


def test_triton_without_a_c_compiler(tmp_path: Path) -> None:
    """With nothing in its cache Triton needs one; then plain operations merge."""
    code = "from tests.null_gpu.check_kernels import CUDA, merge, merged; merged(16); print(merge.why_not_triton(CUDA))"
    environment = {**os.environ, "PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("CC", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("Triton failed: Failed to find C compiler"), done.stderr
