"""Memory that may still be taken on a device."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

RESERVE = 0.05
"""Share of the machine's memory that is never taken."""


def free_bytes(device: torch.device) -> int:
    """Bytes of `device` that this rank may still take: of a GPU what is free or cached by torch, of a host
    its share among its ranks."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_bytes() -> int:
    """Bytes of host memory that may be taken: of the machine, less a reserve, and of the container where it
    has a limit."""
    memory = psutil.virtual_memory()
    found = int(memory.available - RESERVE * memory.total)
    group = Path("/sys/fs/cgroup")
    try:
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.split()[0] == "inactive_file"
        )
        return min(
            found,
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + cached,
        )
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return found
