"""Python on the null GPU: a CUDA whose kernels compute nothing (stub/), on a machine without a GPU.

What runs for real is the host's side: PyTorch's C++ dispatch, its caching allocator (so peak memory at full
size), the checks of FlashAttention, cuDNN's graphs, NCCL's calls, launch limits, streams and events. Values
on the device are zeros or undefined.

    python -m tests.null_gpu.machine SCRIPT-OR-OPTIONS...    as `python ...`, on the null GPU
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).parent / "stub"
LIBRARIES = {
    "libnullgpu.so": ("common.cpp", "runtime.cpp", "libraries.cpp"),
    "libcuda.so.1": ("common.cpp", "driver.cpp"),
}
MEMORY = 4 * 2**30
"""Resident bytes at which a process is ended: memory that should only have been reserved was written to."""


def why_not() -> str | None:
    """Return in one line why the null GPU cannot be used here, or None."""
    if sys.platform != "linux":
        return "the null GPU needs Linux"
    if torch.version.cuda is None:
        return "the null GPU needs a PyTorch built for CUDA (make test-latest has one)"
    if torch.cuda.is_available():
        return "this machine has a GPU of its own"
    if shutil.which("g++") is None:
        return "the null GPU needs g++"
    if _headers() is None:
        return "the null GPU needs CUDA's headers (the triton package has them)"
    return None


def _headers() -> Path | None:
    """A complete folder of CUDA's headers: of the toolkit's wheels or of Triton, which needs them too."""
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [*sorted(packages.glob("nvidia/*/include")), packages / "triton/backends/nvidia/include"]
    needed = ("cuda_runtime_api.h", "crt/host_defines.h")
    return next((folder for folder in folders if all((folder / name).exists() for name in needed)), None)


def build() -> Path:
    """Return the folder of the stub's libraries, compiled once for every state of its sources."""
    sources = b"".join(path.read_bytes() for path in sorted(STUB.iterdir()))
    name = f"null-gpu-{os.getuid()}-{hashlib.sha256(sources).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for library, files in LIBRARIES.items():
            compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", f"-I{_headers()}"]
            subprocess.run(
                [*compiler, *(STUB / file for file in files), "-o", f"{temporary}/{library}", "-ldl"],
                check=True,
            )
        shutil.copytree(temporary, made := Path(tempfile.mkdtemp(dir=folder.parent)), dirs_exist_ok=True)
    try:
        made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(made)
    return folder


def environment() -> dict[str, str]:
    """Return the environment in which a Python process finds the null GPU."""
    folder = str(build())
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "LD_PRELOAD": f"{folder}/libnullgpu.so",
        "LD_LIBRARY_PATH": folder,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # required by deterministic algorithms
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # the stub has no virtual memory
    }


def run(words: Sequence[str], timeout: float = 600.0, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python *words` on the null GPU, with `settings` in its environment; the output is text, errors
    included. Raises subprocess.TimeoutExpired after `timeout` seconds."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment() | {"NULL_GPU_LOG": log.name} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=_watch, args=(process,), daemon=True).start()
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(list(words), process.returncode, output)


def _watch(process: subprocess.Popen[str]) -> None:
    """End the process when it and its children hold more than `MEMORY`."""
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            family = (parent, *parent.children(recursive=True))
            held = sum(p.memory_info().rss for p in family)
            if held > MEMORY:  # pages that forked processes share, counted once
                held = sum(p.memory_full_info().pss for p in family)
        except psutil.Error:
            return
        if held > MEMORY:
            print(f"null GPU: ended a process that held {held / 2**30:.1f} GiB", file=sys.stderr)
            process.kill()
        time.sleep(0.1)


if __name__ == "__main__":
    reason = why_not()
    if reason:
        sys.exit(reason)
    os.execvpe(sys.executable, [sys.executable, *sys.argv[1:]], environment())
