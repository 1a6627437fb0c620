"""Memory of a device: how PyTorch allocates it on GPUs, how much is available, and limits of containers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

RESERVE = 0.05
"""Fraction of the machine's memory that is never used."""


ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables with settings of PyTorch's allocator, the first also for older versions."""


def grow_segments() -> None:
    """Let PyTorch's allocator grow its segments, unless the environment has settings of its own. PyTorch
    reads them at the first allocation on a GPU.

    Blocks of long sequences differ in size from phase to phase, and segments of fixed size would be left with
    holes.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def cuda_environment() -> str:
    """Return the environment variables that affect memory and overlap on GPUs."""
    names = (*(name for name in ALLOCATOR_SETTINGS if name in os.environ), "CUDA_DEVICE_MAX_CONNECTIONS")
    return ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in names)


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
    """Available bytes of host memory: of the machine, minus a reserve, and of every control group that limits
    this process (container, Slurm job)."""
    memory = psutil.virtual_memory()
    return min([int(memory.available - RESERVE * memory.total), *control_group_bytes()])


def control_group_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes left below the memory limit of each control group that this process is in, versions 1 and 2,
    from its own group to the root.

    membership: the process's groups, one per line: `0::/path` (version 2), `5:memory:/path` (version 1).
    mount: where the groups are visible; version 1 has a folder for each controller there. A group's page
    cache that can be dropped counts as left.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    left = []
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0" and not controllers:
            root, limit, used, cache = mount, "memory.max", "memory.current", "inactive_file"
            if not (root / "cgroup.controllers").is_file():  # beside version 1
                root = mount / "unified"
        elif "memory" in controllers.split(","):
            root, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host, of which only the root is visible here.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            left += _left_in(folder, limit, used, cache)
    return left


def _left_in(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    """Bytes left in one group, or nothing if it has no limit."""
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return []
    try:
        stat = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        stat = {}
    return [most - now + int(stat.get(cache, 0))]
