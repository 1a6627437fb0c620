"""Which FlashAttention answers PyTorch's flash operators on CUDA: PyTorch's own FlashAttention-2, or 3 or 4.

The newer ones are packages of their own, flash_attn_3 (Hopper) and flash-attn-4 (Hopper, Blackwell). PyTorch
puts them in place of its kernels (`torch.nn.attention.activate_flash_attention_impl`, PyTorch 2.13), for
whole rows and for cu_seqlens alike, so that aten.py and varlen.py call every version in the same way. The
choice holds for the process, as PyTorch's other switches of attention kernels do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from contextlib import suppress

import torch.nn.attention

from megatron_ultralong.context_parallel.attention_spec import Backend

PYTORCH_NAMES: dict[Backend, str] = {"flash3": "FA3", "flash4": "FA4"}
"""The names in PyTorch's registry."""
PACKAGES: dict[Backend, str] = {"flash3": "flash_attn_3", "flash4": "flash-attn-4"}


def active() -> Backend:
    """Return the version that is in use."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return next((backend for backend, name in PYTORCH_NAMES.items() if name == current), "flash")


def installed(version: Backend) -> bool:
    """Return whether PyTorch knows `version` and its package is there; neither is imported."""
    known: list[str] = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    module = {"flash3": "flash_attn_interface", "flash4": "flash_attn"}[version]
    return PYTORCH_NAMES[version] in known and importlib.util.find_spec(module) is not None


def activate(version: Backend) -> None:
    """Put `version` ("flash", "flash3", "flash4") in place of the one in use.

    Raises what PyTorch or the package raise; the version in use is then PyTorch's own.
    """
    if active() != "flash":
        torch.nn.attention.restore_flash_attention_impl()
    if version != "flash":
        torch.nn.attention.activate_flash_attention_impl(PYTORCH_NAMES[version])


def package_version(version: Backend) -> str:
    """Return the name of `version` with the version of its package, for messages."""
    number = version[-1]
    with suppress(importlib.metadata.PackageNotFoundError):
        return (
            f"FlashAttention-{number} ({PACKAGES[version]} {importlib.metadata.version(PACKAGES[version])})"
        )
    return f"FlashAttention-{number}"
