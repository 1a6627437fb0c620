"""Bandwidth and latency of each parallel group: all-reduce over the group, and hops of its ring.

All groups of a dimension are measured at the same time, as they communicate in training. Bandwidths are
bytes per second and direction of one rank: of an all-reduce of B bytes over n ranks, 2 (n - 1)/n B / seconds
(NCCL's "bus bandwidth"); of a hop, B / seconds. The best of several repeats counts, and the slowest rank of a
group.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_ultralong.check_cluster.findings import Findings, number_of_bytes, on_ranks, table
from megatron_ultralong.context_parallel.comm import ProcessGroupCommunicator
from megatron_ultralong.measure.timing import run_seconds
from megatron_ultralong.planning.hardware import gpu_named
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks

SIZES = {"cuda": (2**10, 2**20, 2**24, 2**28), "cpu": (2**10, 2**16, 2**20)}
"""Bytes of the messages; the first is for the latency, the last for the bandwidth that is judged."""
REPEATS = 8
SHARE_OF_BEST = 0.2
"""Of the best group of the same dimension and kind (inside a node, or across nodes). Groups share links, and
a busy host delays them: a factor of two or three is no fault."""
SHARE_OF_SHEET = 0.25
"""Of the data sheet's NVLink or InfiniBand bandwidth, on a known GPU."""


@dataclass(frozen=True, kw_only=True)
class GroupSpeed:
    """What was measured of one group."""

    dimension: str
    ranks: tuple[int, ...]
    inside: bool
    """Whether all of its ranks are on one host."""
    latency: float
    """Seconds of the smallest all-reduce."""
    all_reduce: tuple[float, ...]
    """Bytes per second at each size."""
    hop: tuple[float, ...]
    """Bytes per second from the previous rank, at each size."""


def check(ranks: Ranks, hosts: list[str]) -> Findings:
    """Measure the groups of every dimension with more than one rank. Every rank calls it."""
    rows = [("group", "number", "latency", "all-reduce", "hop")]
    speeds: list[GroupSpeed] = []
    for name in ("tp", "cp", "dp", "pp"):
        group = getattr(ranks.groups, name)
        if group.size() == 1:
            continue
        members = tuple(torch.distributed.get_process_group_ranks(group))
        of_dimension = _merged(name, agreement.gather((members, measure(group, ranks.device))), hosts)
        for inside in (True, False):
            alike = [speed for speed in of_dimension if speed.inside == inside]
            if alike:
                rows.append(_row(alike))
        speeds += of_dimension
    sizes = SIZES[ranks.device.type]
    if speeds:
        largest = number_of_bytes(sizes[-1])
        lines = (
            *table(rows),
            f"the slowest group of each kind; latency of {sizes[0]} bytes, bandwidth of {largest}",
        )
    else:
        lines = ("one rank in every group",)
    return Findings(
        title="links",
        lines=lines,
        figures={"message_bytes": sizes, "groups": [asdict(speed) for speed in speeds]},
        problems=tuple(_slow(speeds, hosts, ranks.device)),
    )


def measure(group: Any, device: torch.device) -> tuple[float, list[float], list[float]]:
    """(latency, all-reduce, hop) of this rank: seconds, and bytes per second at each size."""
    comm, n = ProcessGroupCommunicator(group), group.size()
    reduce_seconds: list[float] = []
    hop_seconds: list[float] = []
    for size in SIZES[device.type]:
        send, receive = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        numbers = torch.zeros(size // 4, device=device)

        def all_reduce(numbers: torch.Tensor = numbers) -> None:
            torch.distributed.all_reduce(numbers, group=group)

        def hop(send: torch.Tensor = send, receive: torch.Tensor = receive) -> None:
            comm.send_recv(send, receive).wait()

        for work, seconds in ((all_reduce, reduce_seconds), (hop, hop_seconds)):
            # The first connects the ranks.
            seconds.append(min([run_seconds(work, device) for _ in range(1 + REPEATS)][1:]))
    sizes = SIZES[device.type]
    return (
        reduce_seconds[0],
        [2 * (n - 1) / n * size / seconds for size, seconds in zip(sizes, reduce_seconds, strict=True)],
        [size / seconds for size, seconds in zip(sizes, hop_seconds, strict=True)],
    )


def _merged(name: str, measured: list[Any], hosts: list[str]) -> list[GroupSpeed]:
    """One entry for each group, of its slowest rank."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for members, values in measured:
        groups.setdefault(members, []).append(values)
    return [
        GroupSpeed(
            dimension=name,
            ranks=members,
            inside=len({hosts[rank] for rank in members}) == 1,
            latency=max(latency for latency, _, _ in values),
            all_reduce=tuple(min(at) for at in zip(*(reduced for _, reduced, _ in values), strict=True)),
            hop=tuple(min(at) for at in zip(*(hops for _, _, hops in values), strict=True)),
        )
        for members, values in groups.items()
    ]


def _row(alike: list[GroupSpeed]) -> tuple[str, str, str, str, str]:
    one = alike[0]
    return (
        f"{one.dimension} of {len(one.ranks)}, {'in a node' if one.inside else 'across nodes'}",
        str(len(alike)),
        f"{max(speed.latency for speed in alike) * 1e6:.0f} us",
        f"{number_of_bytes(min(speed.all_reduce[-1] for speed in alike))}/s",
        f"{number_of_bytes(min(speed.hop[-1] for speed in alike))}/s",
    )


def _slow(speeds: list[GroupSpeed], hosts: list[str], device: torch.device) -> list[str]:
    """A line for each group that is far slower than others of its kind, or than the data sheet."""
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    problems = []
    for speed in speeds:
        best = max(
            other.hop[-1]
            for other in speeds
            if (other.dimension, other.inside) == (speed.dimension, speed.inside)
        )
        where = f"{speed.dimension} group of {on_ranks(speed.ranks, hosts)}: {number_of_bytes(speed.hop[-1])}/s a hop"
        advice = (
            "see NCCL_IB_HCA and NCCL_SOCKET_IFNAME in environment.sh"
            if not speed.inside
            else "see nvidia-smi topo -m"
        )
        if speed.hop[-1] < SHARE_OF_BEST * best:
            problems.append(
                f"{where}, others of its kind {number_of_bytes(best)}/s; {advice}, or leave a slow host out"
            )
        elif gpu is not None:
            sheet = gpu.nvlink if speed.inside else gpu.infiniband
            if speed.hop[-1] < SHARE_OF_SHEET * sheet:
                link = "NVLink" if speed.inside else "InfiniBand"
                problems.append(f"{where}, {link} has {number_of_bytes(sheet)}/s by its data sheet; {advice}")
    return problems
