"""Merging two partial attentions: the Triton kernel, run by Triton's interpreter, against the plain
operations and float64."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ultralong.context_parallel.kernels.merge import merge_

ROOT = Path(__file__).parents[2]
# b, h, s, d: whole and ragged blocks of tokens, head dimensions that are no power of two, one token
SHAPES = [(1, 2, 64, 32), (2, 3, 130, 20), (1, 1, 1, 8), (2, 1, 65, 96), (1, 2, 0, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """(out, lse, partial, partial_lse): views of other layouts, logsumexps that differ by thousands, some
    -inf."""
    b, h, s, d = shape
    generator = torch.Generator().manual_seed(b * h * d + s)
    out = torch.randn(s, b, h, d, generator=generator).permute(1, 2, 0, 3)
    partial = torch.randn(b, h, s, d, generator=generator).to(dtype)
    lse, partial_lse = (
        torch.randn(b, h, s + 3, generator=generator)[:, :, 3:] * scale for scale in (2.0, 2000.0)
    )
    partial_lse[:, :, ::5] = -math.inf
    partial_lse[:, :, 1::5] = lse[:, :, 1::5] + 0.5
    return [x.to(device) for x in (out, lse, partial, partial_lse)]


def expected(
    out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
) -> list[torch.Tensor]:
    out, lse, partial, partial_lse = (x.double() for x in (out, lse, partial, partial_lse))
    both = torch.stack([lse, partial_lse])
    weights = both.softmax(0).unsqueeze(-1)
    return [weights[0] * out + weights[1] * partial, both.logsumexp(0)]


def check(merge: object, device: str = "cpu") -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(shape, dtype, device)
            want = expected(*given)
            partials = [x.clone() for x in given[2:]]
            assert merge(*given) is None  # type: ignore[operator]
            for x, y in zip(given[:2], want, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
            assert torch.equal(given[2], partials[0]) and torch.equal(given[3], partials[1])


def test_plain_operations() -> None:
    check(merge_)


def test_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    # The interpreter is chosen when Triton is imported, so it gets a process of its own.
    code = (
        "from tests.unit.test_merge import check; "
        "from megatron_ultralong.context_parallel.kernels.merge_triton import merge_; check(merge_)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
