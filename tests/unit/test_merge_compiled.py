"""The merge kernel compiled ahead of time for every GPU, dtype and form of call in use, without a GPU: by
Triton's compilers, which its wheel contains."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import merge_forms

triton = pytest.importorskip("triton", reason="needs Triton (make test-latest has it)")

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of partial outputs."""


class Pointer:
    """A tensor without data whose address is aligned as its place in the storage says."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self._x = x.shape, dtype, x

    def data_ptr(self) -> int:
        return self._x.storage_offset() * self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        return self._x.stride()

    def numel(self) -> int:
        return self._x.numel()


class Compiler:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def resources(cubin: bytes, path: Any) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory, which are not 0 where registers spill."""
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def test_no_form_spills(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    from megatron_ultralong.context_parallel.kernels import merge_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel, compiled = merge_triton._merge, []

    def compile_only(*args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        compiled.append(type(kernel).run(kernel, *args, grid=grid, warmup=True, **constants))

    monkeypatch.setattr(kernel, "run", compile_only)
    registers = {}
    calls = merge_forms.calls()
    for architecture in ARCHITECTURES:
        monkeypatch.setattr(triton.runtime.driver, "_active", Compiler(architecture))
        for dtype in DTYPES:
            compiled.clear()
            for out, lse, partial, partial_lse in calls:
                merge_triton.merge_(
                    *(Pointer(x, torch.float32) for x in (out, lse)),
                    Pointer(partial, dtype),
                    Pointer(partial_lse, torch.float32),
                )
            kernels = list({id(k): k for k in compiled}.values())
            assert len(kernels) > 3, "calls of several forms"
            used = [resources(k.asm["cubin"], tmp_path / "kernel.cubin") for k in kernels]
            assert all(one["STACK"] == one["LOCAL"] == 0 for one in used), (architecture, dtype, used)
            registers[f"sm_{architecture}, {dtype}"] = sorted(one["REG"] for one in used)
    for name, counts in registers.items():
        print(f"{name}: {counts} registers")
        record_property(name, counts)
