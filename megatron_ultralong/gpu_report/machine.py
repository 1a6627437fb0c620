"""The machine that a report runs on: device, versions, compiler, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_ultralong import __version__
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.io import workers
from megatron_ultralong.measure.report import commit, device_name

REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "numpy",
    "einops",
    "psutil",
    "safetensors",
    "tokenizers",
    "tqdm",
)
OPTIONAL = {
    "triton": "partial results of the ring are merged by torch's own operations",
    "transformer-engine": "linear layers and norms are Megatron-Core's",
    "flash-attn": "ring-flash-attn runs with our kernels",
    "liger-kernel": "no row of its loss",
    "pytest": "tests/gpu is not run",
}
"""Packages without which something is not measured, and what."""
COMPILERS = ("gcc", "clang", "cc")
"""Triton compiles its launchers with one of them."""


def facts(device: torch.device) -> dict[str, Any]:
    """Return what identifies the machine and its software; None where something is not there.

    On a GPU this creates a CUDA context.
    """
    gpu = device.type == "cuda"
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    found: dict[str, Any] = {
        "device": device_name(device),
        "memory_bytes": psutil.virtual_memory().total,
        "host_memory_bytes": psutil.virtual_memory().total,
        "cores": workers.cores(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "compiler": next(filter(None, map(shutil.which, COMPILERS)), None),
        "kernel": kernels.choose(device, torch.bfloat16, 128),
        "python": platform.python_version(),
        "megatron_ultralong": __version__,
        "commit": commit(),
        **versions,
    }
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
    found["missing"] = missing(found, gpu)
    return found


def missing(found: dict[str, Any], gpu: bool) -> list[str]:
    """Return what is missing, each with its effect or remedy."""
    lines = [] if gpu else ["a GPU: the figures are not those of one"]
    required = [name for name in REQUIRED if not found[name]]
    if required:
        lines.append(f"{', '.join(required)}: needed; pip install them (megatron-core with --no-deps)")
    lines += [f"{name}: {effect}" for name, effect in OPTIONAL.items() if not found[name]]
    if gpu and not found["compiler"]:
        lines.append(f"a C compiler ({', '.join(COMPILERS)}): Triton kernels cannot be compiled")
    if gpu and not found["cudnn"]:
        lines.append("cuDNN: attention uses FlashAttention-2")
    return lines


def missing_line(found: dict[str, Any]) -> str:
    """Return one line that says what is missing."""
    return "missing: " + ("; ".join(found["missing"]) or "nothing")


def _version(package: str) -> str | None:
    """Version of an installed package. Megatron-Core may also be on the path without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = "megatron.core" if package == "megatron-core" else package.replace("-", "_")
        try:
            return "not a package, on the path" if importlib.util.find_spec(module) else None
        except ModuleNotFoundError:
            return None


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module\D*?([\d.]+)", text)
    return match[1] if match else None
