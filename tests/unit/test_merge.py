"""Merging two partial attentions: the Triton kernel, run by Triton's interpreter, against the plain
operations and float64."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from megatron_ultralong.context_parallel import kernels
from megatron_ultralong.context_parallel.kernels import merge
from tests.triton_tools import interpret

# b, h, s, d: whole and ragged blocks of tokens, head dimensions that are no power of two, one token
SHAPES = [(1, 2, 64, 32), (2, 3, 130, 20), (1, 1, 1, 8), (2, 1, 65, 96), (1, 2, 0, 8)]
CPU = torch.device("cpu")
LAYOUTS = ("tokens first", "heads first", "rows")


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "tokens first"
) -> list[torch.Tensor]:
    """(out, lse, partial, partial_lse) in one of the layouts of tests/merge_forms.py; logsumexps that differ
    by thousands, some -inf.

    tokens first: as the projections and FlashAttention lay them out. heads first: as Ulysses and generation.
    rows: the last s tokens of longer tensors, so that addresses are not aligned.
    """
    b, h, s, d = shape
    generator = torch.Generator().manual_seed(b * h * d + s)
    more = 3 if layout == "rows" else 0

    def rand(heads_first: bool) -> torch.Tensor:
        if heads_first:
            return torch.randn(b, h, more + s, d, generator=generator)[:, :, more:]
        return torch.randn(more + s, b, h, d, generator=generator).permute(1, 2, 0, 3)[:, :, more:]

    out = rand(layout == "heads first")
    # "rows" merges a partial output of another layout.
    partial = rand(layout != "tokens first").to(dtype, memory_format=torch.preserve_format)
    lse, partial_lse = (
        torch.randn(b, h, more + s, generator=generator)[:, :, more:] * scale for scale in (2.0, 2000.0)
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
        for dtype, layout in product((torch.float32, torch.bfloat16, torch.float16), LAYOUTS):
            given = inputs(shape, dtype, device, layout)
            want = expected(*given)
            partials = [x.clone() for x in given[2:]]
            assert merge(*given) is None  # type: ignore[operator]
            for x, y in zip(given[:2], want, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
            assert torch.equal(given[2], partials[0]) and torch.equal(given[3], partials[1])


def test_plain_operations() -> None:
    check(merge.merge_)


def test_triton_kernel_in_the_interpreter() -> None:
    interpret(
        "from tests.unit.test_merge import check; "
        "from megatron_ultralong.context_parallel.kernels.merge_triton import merge_; check(merge_)"
    )


# ---- where Triton cannot be used ----------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Triton without a C compiler, not tried out yet; an entry per attempt to launch its kernel."""
    attempts: list[int] = []

    def fails(*given: torch.Tensor) -> None:
        attempts.append(len(given))
        time.sleep(0.05)
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nand more lines")

    module = SimpleNamespace(merge_=fails)
    monkeypatch.setitem(sys.modules, f"{kernels.__name__}.merge_triton", module)
    monkeypatch.setattr(kernels, "merge_triton", module, raising=False)
    merge._try_triton.cache_clear()
    yield attempts
    merge._try_triton.cache_clear()


def test_without_a_c_compiler(launches: list[int]) -> None:
    for shape in SHAPES[:2]:
        given = inputs(shape, torch.bfloat16, "cpu")
        want = expected(*given)
        merge.merge_(*(x.as_subclass(OnGpu) for x in given))
        for x, y in zip(given[:2], want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
    assert launches == [4], "tried out once"
    assert merge.why_not_triton(CPU) == "Triton failed: Failed to find C compiler. Please specify via CC"


def test_tried_out_by_one_of_several_threads(launches: list[int]) -> None:
    with ThreadPoolExecutor(8) as pool:
        reasons = set(pool.map(merge.why_not_triton, [CPU] * 8))
    assert launches == [4] and len(reasons) == 1


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{kernels.__name__}.merge_triton", None)
    monkeypatch.delattr(kernels, "merge_triton", raising=False)
    merge._try_triton.cache_clear()
    assert merge.why_not_triton(CPU) == "Triton is not installed"
    merge._try_triton.cache_clear()
