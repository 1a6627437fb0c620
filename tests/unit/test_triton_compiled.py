"""Triton kernels compiled ahead of time for every GPU, dtype and form of call in use, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import merge_forms
from tests.triton_tools import ARCHITECTURES, Pointer, compiled

pytest.importorskip("triton", reason="needs Triton (make test-latest has it)")


def check(
    kernels: list[Any],
    calls: Callable[[torch.dtype], None],
    dtypes: tuple[torch.dtype, ...],
    forms: int,
    folder: Path,
    record_property: Any,
) -> None:
    """`calls` launches the kernels with tensors of a dtype, in at least `forms` forms, none of which
    spills."""
    for architecture, dtype in product(ARCHITECTURES, dtypes):
        used = compiled(kernels, lambda dtype=dtype: calls(dtype), architecture, folder)
        assert len(used) >= forms, "calls of several forms"
        assert all(one["STACK"] == one["LOCAL"] == 0 for one in used), (architecture, dtype, used)
        registers = sorted(one["REG"] for one in used)
        print(f"sm_{architecture}, {dtype}: {registers} registers")
        record_property(f"sm_{architecture}, {dtype}", registers)


def test_merge(tmp_path: Path, record_property: Any) -> None:
    from megatron_ultralong.context_parallel.kernels import merge_triton

    calls = merge_forms.calls()

    def launch(dtype: torch.dtype) -> None:
        for out, lse, partial, partial_lse in calls:
            merge_triton.merge_(
                *(Pointer(x, torch.float32) for x in (out, lse)),
                Pointer(partial, dtype),
                Pointer(partial_lse, torch.float32),
            )

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    check([merge_triton._merge], launch, dtypes, 4, tmp_path, record_property)


def test_elementwise(tmp_path: Path, record_property: Any) -> None:
    """Of 8B widths at TP 1 and 8, whole and in chunks, and of odd sizes."""
    from megatron_ultralong.model import elementwise_triton

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def launch(dtype: torch.dtype) -> None:
        for rows, f in ((2**20, 14_336), (4096, 1792), (77, 1001)):
            gate_up, out = Pointer(meta(rows, 2 * f), dtype), Pointer(meta(rows, f), dtype)
            elementwise_triton.swiglu(gate_up, out)
            elementwise_triton.swiglu_backward(gate_up, out, gate_up)
        for (s, b, g, r), d in product(((2**20, 1, 8, 4), (4096, 1, 1, 4), (77, 2, 3, 3)), (128, 64, 80)):
            heads = meta(s, b, g, r + 2, d)
            cos = Pointer(meta(s, d // 2)[:, None, None, None], torch.float32)
            for x in (heads[:, :, :, :-2], heads[:, :, :, -2:-1]):
                out = Pointer(meta(*x.shape), dtype)
                elementwise_triton.rotate(Pointer(x, dtype), cos, cos, 1, out)
                elementwise_triton.rotate(out, cos, cos, -1, Pointer(x, dtype))

    kernels = [elementwise_triton._swiglu, elementwise_triton._swiglu_backward, elementwise_triton._rotate]
    check(kernels, launch, (torch.bfloat16, torch.float32), 12, tmp_path, record_property)
