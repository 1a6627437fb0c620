"""Memory limits of control groups, as containers and Slurm set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultralong.runtime import memory

GIB = 2**30


def group(folder: Path, limit: str, used: int, cached: int = 0, version: int = 2) -> None:
    """Write the files of one group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[
        version
    ]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 17\n{key} {cached}\n")


def left(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "cgroup").write_text(membership)
    return memory.control_group_bytes(tmp_path / "cgroup", tmp_path / "mount")


def test_version_2(tmp_path: Path) -> None:
    """A Slurm step has no limit, its job has one, and so has the machine's slice above it."""
    mount = tmp_path / "mount"
    group(mount, "max", 50)
    (mount / "cgroup.controllers").write_text("memory\n")
    group(mount / "slurm", str(100 * GIB), 90 * GIB)
    group(mount / "slurm" / "job_7", str(32 * GIB), 30 * GIB, cached=3 * GIB)
    group(mount / "slurm" / "job_7" / "step_0", "max", 1)
    assert left(tmp_path, "0::/slurm/job_7/step_0\n") == [5 * GIB, 10 * GIB]
    # A container without a namespace of its own sees the host's path, but only its own group, as the root.
    group(mount, str(8 * GIB), 2 * GIB)
    assert left(tmp_path, "0::/docker/0123\n") == [6 * GIB]
    assert left(tmp_path, "0::/\n") == [6 * GIB]


def test_version_1(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    group(mount / "memory", str(2**63 - 4096), 5, version=1)
    group(mount / "memory" / "slurm" / "job_7", str(16 * GIB), 20 * GIB, cached=6 * GIB, version=1)
    lines = "12:cpuset:/\n5:cpu,memory:/slurm/job_7\n1:name=systemd:/init\n0::/init\n"
    assert left(tmp_path, lines) == [2 * GIB, 2**63 - 4096 - 5]


@pytest.mark.parametrize("membership", ["", "odd line\n", "0::/\n", "5:memory:/../../etc\n"])
def test_nothing_to_read(tmp_path: Path, membership: str) -> None:
    assert left(tmp_path, membership) == []
    assert memory.control_group_bytes(tmp_path / "none", tmp_path) == []


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.host_bytes()
    assert whole > 0
    monkeypatch.setattr(memory, "control_group_bytes", lambda: [2**40, 12345])
    assert memory.host_bytes() == 12345
