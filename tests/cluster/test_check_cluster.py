"""tools/check_cluster.py: what a sound cluster shows, and faults that are planted one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ultralong.check_cluster import clocks, links, machines, run, same_step, shared_folder, topology
from megatron_ultralong.check_cluster.findings import on_ranks, ranges
from megatron_ultralong.config import Parallel, Runtime
from megatron_ultralong.runtime import launch
from tests import processes
from tests.spawn import run_ranks

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def hosts_named(*names: str) -> Iterator[None]:
    """The ranks are on these hosts."""
    here = names[int(os.environ["RANK"])]
    with mock.patch("socket.gethostname", lambda: here):
        yield


def slow_hop(self: Any, send: Any, receive: Any) -> Any:
    if self.group.size() == 2 and torch.distributed.get_process_group_ranks(self.group) == [1, 3]:
        time.sleep(0.05)
    return HOP(self, send, receive)


HOP = links.ProcessGroupCommunicator.send_recv


def faults(rank: int, folder: Path) -> dict[str, tuple[AbstractContextManager[Any], str]]:
    """What is planted on this rank, and what the verdict says."""
    nothing = contextlib.nullcontext()
    steady, here = same_step.step, rank == 3
    version, ports = machines._version, [("mlx5_0", "400 Gb/sec (4X NDR)"), ("mlx5_1", "400 Gb/sec (4X NDR)")]

    def other_torch(name: str) -> str | None:
        return "2.12.0" if name == "torch" else version(name)

    def wrong_step(device: Any) -> dict[str, float]:
        right = steady(device)
        return right | {"loss": right["loss"] * 1.001}

    return {
        "version": (
            mock.patch.object(machines, "_version", other_torch) if here else nothing,
            r"torch differs: 2\.\S+, but 2\.12\.0 on rank 3 \(node-b\); use one environment on all nodes",
        ),
        "adapter": (
            mock.patch.object(machines, "adapters", lambda: ports[: 1 if here else 2]),
            r"rank 3 \(node-b\): 1 active InfiniBand ports, others have 2; check its cables",
        ),
        "memory": (
            mock.patch.object(
                machines, "_free", lambda place: 64 * 2**20 if here and place == "/dev/shm" else 10**12
            ),
            r"rank 3 \(node-b\): 67\.1 MB free in /dev/shm, 1 GB are needed; give the container more",
        ),
        "environment": (
            mock.patch.dict("os.environ", {"NCCL_IB_HCA": "mlx5_0"} if here else {}),
            r"NCCL_IB_HCA differs: none, but mlx5_0 on rank 3 \(node-b\)",
        ),
        "clock": (
            mock.patch.object(clocks.time, "time", lambda: NOW() + 5.0) if rank in (2, 3) else nothing,
            r"the clock of node-b is \+[45]\.\d+ s from that of node-a \(to 0\.\d+ s\); start chrony or ntpd there",
        ),
        "folder": (
            mock.patch.object(shared_folder, "WAIT", 2.0),
            r"is not shared: rank 3 \(node-b\) sees no file that rank 0 wrote; give --shared, and --save in training, ",
        ),
        "link": (
            mock.patch.object(links.ProcessGroupCommunicator, "send_recv", slow_hop),
            r"cp group of rank 1,3 \(node-a, node-b\): \S+ [kM]B/s a hop, others of its kind \S+ [MG]B/s; see NCCL_IB_HCA",
        ),
        "step": (
            mock.patch.object(same_step, "step", wrong_step) if here else nothing,
            r"rank 3 \(node-b\): loss \S+ where other ranks have \S+ for the same input; replace this device",
        ),
        "unsteady product": (
            mock.patch.object(same_step.torch, "equal", lambda a, b: False) if here else nothing,
            r"rank 3 \(node-b\): the same matrix product gives different results; replace this device",
        ),
    }


NOW = time.time


def four_ranks(rank: int, world: int, folder: Path) -> None:
    ranks = launch.start(Runtime(device="cpu"), Parallel(tp=2, cp=2))
    links.SHARE_OF_BEST = 0.05  # the cores are shared with other tests
    with hosts_named("node-a", "node-a", "node-b", "node-b"):
        sound = run.check_all(ranks, folder)
        assert [one.title for one in sound if one.problems] == [], run.text(sound, ranks)
        assert run.verdict(sound, ranks) == "verdict: ready, 4 ranks, TP 2 x PP 1 x CP 2 x DP 1"
        text = run.text(sound, ranks)
        assert all(len(line) <= 80 for line in text.splitlines()), text
        for line in (
            r"cp rings: 2 of 2 ranks; 2 hops leave a host at most \(least possible: 2\)",
            r"tp of 2, in a node +2 +\d+ us +\S+ [MG]B/s +\S+ [MG]B/s",
            r"cp of 2, across nodes +2 +\d+ us",
            r"largest difference from node-a: [+-]0\.\d\d ms|largest difference from node-a: [+-]\d+\.\d\d ms",
        ):
            assert re.search(line, text), text
        speeds = {(one["dimension"], one["ranks"]) for one in sound[4].figures["groups"]}
        assert speeds == {("tp", (0, 1)), ("tp", (2, 3)), ("cp", (0, 2)), ("cp", (1, 3))}
        assert sound[1].figures["offset_seconds"]["node-b"][1] > 0, "a round trip takes time"
        assert not list(folder.iterdir()), "its files are removed"
        for name, (planted, said) in faults(rank, folder).items():
            with planted:
                found = run.check_all(
                    ranks, folder / "elsewhere" if name == "folder" and rank == 3 else folder
                )
            verdict = run.verdict(found, ranks)
            assert re.search(rf"verdict: not ready[^:]*: .*{said}", verdict), (name, verdict)
            assert "\n" not in verdict and run.text(found, ranks).splitlines()[-1] == verdict
            others = [one for one in found if one.problems]
            assert len(others) == 1, (name, [one.problems for one in others])
    with hosts_named("node-a", "node-b", "node-a", "node-b"):
        (found,) = [one for one in run.check_all(ranks, folder) if one.problems]
        assert found.problems[0].startswith(
            "2 tp groups span hosts, the first is rank 0-1 (node-a, node-b); choose"
        )


@pytest.mark.slow
def test_sound_and_faulty(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    run_ranks(four_ranks, 4, tmp_path / "shared")


def test_the_tool(tmp_path: Path) -> None:
    file = tmp_path / "new" / "check.json"
    call = f"""
import os
from megatron_ultralong.commands.check_cluster import main
from megatron_ultralong.runtime import cli
if {{different}}:
    os.environ["NCCL_IB_HCA"] = "mlx5_" + os.environ["RANK"]
if __name__ == "__main__":
    cli.main(lambda: main(["--cp", "2", "--device", "cpu", "--shared", {str(tmp_path)!r}, "--json", {str(file)!r}]))
"""
    done = processes.torchrun([sys.executable, "-c", call.format(different=False)], 2, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\nverdict: ready, 2 ranks, TP 1 x PP 1 x CP 2 x DP 1\n")
    values = json.loads(file.read_text())
    assert values["ready"] and values["layout"] == {"tp": 1, "pp": 1, "cp": 2, "dp": 1, "world": 2}
    assert values["checks"]["machines"]["machines"][0]["versions"]["torch"]
    assert values["checks"]["links"]["groups"][0]["ranks"] == [0, 1]
    done = processes.torchrun([sys.executable, "-c", call.format(different=True)], 2, cwd=ROOT)
    assert (
        done.returncode == 1
        and "NCCL_IB_HCA differs: mlx5_0, but mlx5_1 on rank 1" in done.stdout.splitlines()[-1]
    )
    assert json.loads(file.read_text())["ready"] is False
    assert "Traceback" not in done.stderr, done.stderr


def test_rank_order() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    straight = topology.check({"cp": [tuple(range(8))], "tp": [(0,)]}, hosts)
    assert not straight.problems and straight.figures["cp_rings"][0]["leave_a_host"] == 2
    mixed = topology.check({"cp": [(0, 4, 1, 5, 2, 6, 3, 7)], "tp": [(0,)]}, hosts)
    assert mixed.problems[0].startswith(
        "cp ring of rank 0-7 (a, b): 8 of 8 hops leave a host, 2 in the best order; start"
    )
    inside = topology.check({"cp": [(0, 1, 2, 3)], "tp": [(0, 1)]}, hosts)
    assert not inside.problems and inside.figures["cp_rings"][0]["least"] == 0
    assert ranges([8, 0, 1, 3]) == "0-1,3,8"
    assert on_ranks([0, 1, 2, 3], ["a", "b", "c", "d"]) == "rank 0-3 (a, b, 2 more)"


def test_adapters(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert machines.adapters(tmp_path) == [("mlx5_0", "400 Gb/sec (4X NDR)")]
    assert machines.adapters(tmp_path / "nothing") == []
    for name, state in (("eth0", "up"), ("eth1", "down"), ("lo", "up")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(f"{state}\n")
        (tmp_path / "net" / name / "speed").write_text("100000\n")
        if name != "lo":
            (tmp_path / "net" / name / "device").mkdir()
    assert machines.interfaces(tmp_path / "net") == ["eth0 100000"]
    (tmp_path / "net" / "eth0" / "speed").write_text("-1\n")  # not known
    assert machines.interfaces(tmp_path / "net") == ["eth0"]
    (tmp_path / "net" / "eth0" / "speed").unlink()
    assert machines.interfaces(tmp_path / "net") == ["eth0"]


@pytest.mark.parametrize("number", [999, 1000, 67108864, 10**12])
def test_bytes_are_short(number: int) -> None:
    from megatron_ultralong.check_cluster.findings import number_of_bytes

    assert len(number_of_bytes(number)) <= 8
