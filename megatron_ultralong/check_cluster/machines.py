"""Versions, devices, network adapters, memory and environment of every rank, and where they differ."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_ultralong import __version__
from megatron_ultralong.check_cluster.findings import Findings, by_value, number_of_bytes, on_ranks
from megatron_ultralong.runtime import memory

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
SAME_ENVIRONMENT = (
    "NCCL_",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
)
"""Environment variables, by the begin of their name, that all ranks should have in common."""
LEAST_SHM = 10**9
"""Bytes of /dev/shm: NCCL and the data loader share memory between processes there."""
MOST_IN_USE = 2 * 10**9
"""Bytes of a GPU in use before this program has used any: contexts and displays take less."""


def gathered(device: torch.device, folder: Path) -> dict[str, Any]:
    """What identifies this rank's machine and software."""
    gpu = device.type == "cuda"
    versions: dict[str, str | None] = {"python": platform.python_version(), "megatron_ultralong": __version__}
    versions |= {name: _version(name) for name in PACKAGES}
    versions |= {"driver": _driver(), "cuda": torch.version.cuda}
    if gpu:
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["cudnn"] = str(torch.backends.cudnn.version())
    free, total = torch.cuda.mem_get_info(device) if gpu else (0, 0)
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "adapters": adapters(),
        "interfaces": interfaces(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(SAME_ENVIRONMENT)
        },
        "host_memory": psutil.virtual_memory().total,
        "host_memory_left": memory.host_bytes(),
        "gpu_memory": total,
        "gpu_memory_in_use": total - free,
        "shm_left": _free("/dev/shm"),
        "disk_left": _free(folder),
    }


def check(machines: list[dict[str, Any]], hosts: list[str], folder: Path) -> Findings:
    """Compare what all ranks have gathered."""
    problems, lines = [], []
    for name in machines[0]["versions"]:
        lines.append(_line(name, [machine["versions"].get(name) for machine in machines]))
        problems += _differs(name, [machine["versions"].get(name) for machine in machines], hosts)
    lines.append(_line("device", [machine["device"] for machine in machines]))
    problems += _differs("device", [machine["device"] for machine in machines], hosts)
    of_hosts = [tuple(f"{name} {rate}" for name, rate in machine["adapters"]) for machine in machines]
    lines.append(_line("InfiniBand or RoCE", [", ".join(one) or "none" for one in of_hosts]))
    lines.append(_line("Ethernet", [", ".join(machine["interfaces"]) or "none" for machine in machines]))
    counts = [len(one) for one in of_hosts]
    for count, ranks in list(by_value(counts).items())[1:]:
        usual = next(iter(by_value(counts)))
        problems.append(
            f"{on_ranks(ranks, hosts)}: {count} active InfiniBand ports, others have {usual}; check its cables and drivers, "
            "or leave this node out"
        )
    for name in sorted({name for machine in machines for name in machine["environment"]}):
        problems += _differs(name, [machine["environment"].get(name) for machine in machines], hosts)
    per_host: dict[str, int] = {}
    for host in hosts:
        per_host[host] = per_host.get(host, 0) + 1
    if len(set(per_host.values())) > 1:
        listed = ", ".join(f"{host} {number}" for host, number in list(per_host.items())[:4])
        problems.append(f"ranks per host differ: {listed}; start the same --nproc-per-node on every host")
    for name, what in (
        ("host_memory_left", "host memory free"),
        ("shm_left", "/dev/shm free"),
        ("disk_left", f"{folder} free"),
    ):
        values = [machine[name] for machine in machines]
        lines.append(
            f"{what}: {number_of_bytes(min(values))} at least, {number_of_bytes(max(values))} at most"
        )
    if machines[0]["gpu_memory"]:
        used = [machine["gpu_memory_in_use"] for machine in machines]
        sizes = [machine["gpu_memory"] for machine in machines]
        lines.append(
            f"GPU memory: {number_of_bytes(min(sizes))}, of which {number_of_bytes(max(used))} at most in use"
        )
        for rank, amount in enumerate(used):
            if amount > MOST_IN_USE:
                problems.append(
                    f"{on_ranks([rank], hosts)}: {number_of_bytes(amount)} of its GPU are in use by other processes; end them"
                )
    short = [rank for rank, machine in enumerate(machines) if machine["shm_left"] < LEAST_SHM]
    if short:
        left = number_of_bytes(min(machines[rank]["shm_left"] for rank in short))
        problems.append(
            f"{on_ranks(short, hosts)}: {left} free in /dev/shm, {number_of_bytes(LEAST_SHM)} are needed; "
            "give the container more (docker --shm-size, a memory volume)"
        )
    return Findings(
        title="machines", lines=tuple(lines), figures={"machines": machines}, problems=tuple(problems)
    )


def adapters(root: Path = Path("/sys/class/infiniband")) -> list[tuple[str, str]]:
    """Active InfiniBand or RoCE ports of this host with their rates: ("mlx5_0", "400 Gb/sec (4X NDR)")."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        try:
            if "ACTIVE" in (port / "state").read_text():
                found.append((port.parts[-3], (port / "rate").read_text().strip()))
        except OSError:
            continue
    return found


def interfaces(root: Path = Path("/sys/class/net")) -> list[str]:
    """Network interfaces of this host that are up and belong to a device, with Mbit/s: "eth0 100000"."""
    found = []
    for interface in sorted(root.glob("*")):
        try:
            if not (interface / "device").exists() or (interface / "operstate").read_text().strip() != "up":
                continue
            speed = (interface / "speed").read_text().strip()
        except OSError:  # some drivers have no speed
            speed = ""
        found.append(interface.name if speed in ("", "-1") else f"{interface.name} {speed}")
    return found


def _line(name: str, values: list[Any]) -> str:
    groups = by_value(values)
    first, *others = [str(value or "none") for value in groups]
    return f"{name}: {first}" + (f" (differs on {len(others)} more)" if others else "")


def _differs(name: str, values: list[Any], hosts: list[str]) -> list[str]:
    (usual, _), *others = by_value(values).items()
    return [
        f"{name} differs: {usual or 'none'}, but {value or 'none'} on {on_ranks(ranks, hosts)}; use one environment on all nodes"
        for value, ranks in others
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        found = re.search(r"Kernel Module\D*?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "cpu"


def _free(folder: str | Path) -> int:
    """Bytes that may still be written; 0 where there is no such folder."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize
