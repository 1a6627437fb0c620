"""Triton kernels without a GPU: run by its interpreter, and compiled ahead of time by the compilers in its
wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, dtype

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)


def interpret(code: str) -> None:
    """Run Python code with Triton's interpreter, which is chosen when Triton is imported: in a process of its
    own. Skips the test where Triton is not installed."""
    pytest.importorskip("triton", reason="needs Triton (make test-latest has it)")
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )


class Pointer:
    """A tensor without data whose address is aligned as its place in the storage says."""

    def __init__(self, x: Tensor, dtype: dtype) -> None:
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
        import triton

        self.target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compiled(
    kernels: Iterable[Any], calls: Callable[[], None], architecture: int, folder: Path
) -> list[dict[str, int]]:
    """Compile `kernels` for an architecture in every form in which `calls` launches them; return what each
    form takes: registers per thread, and bytes of stack and local memory, which are not 0 where registers
    spill."""
    import triton

    made: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setattr(triton.runtime.driver, "_active", Compiler(architecture))
        for kernel in kernels:

            def compile_only(
                *args: Any, kernel: Any = kernel, grid: Any, warmup: bool, **constants: Any
            ) -> None:
                one = type(kernel).run(kernel, *args, grid=grid, warmup=True, **constants)
                made[id(one)] = one

            patch.setattr(kernel, "run", compile_only)
        calls()
    return [_resources(one.asm["cubin"], folder / "kernel.cubin") for one in made.values()]


def _resources(cubin: bytes, path: Path) -> dict[str, int]:
    import triton

    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
