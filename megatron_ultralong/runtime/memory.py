"""Memory available on a device: GPU, host and container limits."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

RESERVE = 0.05
"""Fraction of the machine's memory that is never used."""


def free_bytes(device: torch.device) -> int:
    """Bytes of `device` available to this rank: on a GPU, memory free or cached by torch; on a host, the
    rank's equal share."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_bytes() -> int:
    """Available bytes of host memory: of the machine, minus a reserve, and of the container if it has a
    limit."""
    memory = psutil.virtual_memory()
    available = int(memory.available - RESERVE * memory.total)
    group = Path("/sys/fs/cgroup")
    try:
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.split()[0] == "inactive_file"
        )
        return min(
            available,
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + cached,
        )
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return available
