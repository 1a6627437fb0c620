"""A small file system of its own, to be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system in memory. Skips the test where only root may, or nobody."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill it with one file, `filler`, except for some bytes."""
    with (disk / "filler").open("ab") as file, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(disk).free - leave) > 0:
            file.write(bytes(min(free, 1 << 20)))
            file.flush()
