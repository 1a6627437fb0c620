"""A small file system of its own, to be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
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
    with contextlib.suppress(OSError), (disk / "filler").open("ab") as file:
        while (free := shutil.disk_usage(disk).free - leave) > 0:
            file.write(bytes(min(free, 1 << 20)))
            file.flush()


@contextlib.contextmanager
def kept_full(disk: Path) -> Iterator[None]:
    """Fill it again whenever something on it is removed, like another program that writes without end."""
    over = threading.Event()

    def filling() -> None:
        while not over.wait(0.01):
            fill(disk)

    fill(disk)
    thread = threading.Thread(target=filling)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        (disk / "filler").unlink(missing_ok=True)
