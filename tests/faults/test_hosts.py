"""Several hosts on one machine: a link that is cut for a while, and for good."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from tests import processes
from tests.faults import hosts
from tests.train_tool import ROOT, SETTINGS, Tool, write_inputs

pytestmark = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))

PORT = 29500
LATE = 4.0
"""Seconds that a busy machine may take to print a line, or to start a thread."""


def until(holds: Callable[[], bool], seconds: float, what: Callable[[], str]) -> float:
    """Wait until it holds; return the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what()}"
        time.sleep(0.05)
    return time.monotonic() - began


# ---- ranks that only add, without torchrun -----------------------------------------------------


def store() -> None:
    """What torchrun does on its first host."""
    server = torch.distributed.TCPStore("0.0.0.0", PORT, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
    time.sleep(600)
    del server


def rank(hang_minutes: float, folder: Path) -> None:
    """A rank whose iterations are reductions over all ranks."""
    from megatron_ultralong.runtime import heartbeat as module
    from megatron_ultralong.runtime import launch

    module._ANSWER = timedelta(seconds=1.5)  # less than the cut
    heartbeat = module.Heartbeat()
    heartbeat.start(hang_minutes, 60)
    heartbeat.prepare_report(folder, lambda: "the last good checkpoint is /s/iter_0000100")
    launch.join(torch.device("cpu"), 60)
    total = torch.zeros(1)
    for iteration in range(1, 10**6):
        heartbeat.iteration(iteration)
        total += 1
        torch.distributed.all_reduce(total)
        print(f"iteration {iteration}", flush=True)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "cut"),
    [(2, 1), pytest.param(4, 0, marks=(pytest.mark.slow, pytest.mark.long))],
    ids=["two hosts", "store's of four"],
)
def test_ranks_on_hosts(tmp_path: Path, number: int, cut: int) -> None:
    """One rank a host; the link that is cut is that of a rank, or of the store."""
    limit = 9.0
    outputs = [tmp_path / f"{rank}.out" for rank in range(number)]
    errors = [tmp_path / f"{rank}.err" for rank in range(number)]

    def text() -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(tmp_path.glob("*.*")))

    def start(host: int, call: str, output: Path, **environment: str) -> processes.Popen:
        imports = "from pathlib import Path; from tests.faults import test_hosts"
        command = [sys.executable, "-c", f"{network.enter(host)}\n{imports}\ntest_hosts.{call}"]
        with output.open("w") as file, output.with_suffix(".err").open("w") as error:
            return processes.Popen(command, stdout=file, stderr=error, env={**os.environ, **environment})

    def iterations() -> int:
        return outputs[0].read_text().count("iteration")

    with hosts.Hosts(number) as network:
        server = start(0, "store()", store_said := tmp_path / "store.out")
        until(lambda: "ready" in store_said.read_text(), 120, text)
        environment = {
            "MASTER_ADDR": network.address(0),
            "MASTER_PORT": str(PORT),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "eth0",
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": str(number),
        }
        call = f"rank({limit / 60}, Path({str(tmp_path / 'hang')!r}))"
        ranks = [
            # A run of its own for each, as if they did not share a temporary folder.
            start(r, call, outputs[r], **environment, RANK=str(r), TORCHELASTIC_RUN_ID=f"{tmp_path} {r}")
            for r in range(number)
        ]
        until(lambda: iterations() > 20, 120, text)
        network.cut(cut)
        time.sleep(3)
        assert all(process.poll() is None for process in ranks), text()
        network.mend(cut)
        before = iterations()
        until(lambda: iterations() > before + 20, 30, text)

        network.cut(cut)
        took = until(lambda: all("error:" in path.read_text() for path in errors), 60, text)
        assert 0.7 * limit < took < limit + LATE, text()
        until(lambda: all(process.poll() == 1 for process in ranks), 30, text)
        server.kill()
    for rank, said in enumerate(path.read_text() for path in errors):
        if rank == 0:
            for lost in range(1, number):
                who = rf"rank {lost} \(host host-{lost}, process {ranks[lost].pid}\)"
                assert re.search(rf"error: no sign of life for \d+ s of {who}", said), said
        else:
            assert re.search(r"error: torchrun's store at 10.77.0.1:29500 has not answered for \d+ s", said)
            assert "this host does not see rank 0 on host host-0" in said
        assert "the last good checkpoint is /s/iter_0000100" in said
        assert "to resume, run the same command again on every host: " in said
        stacks = (tmp_path / "hang" / f"rank_{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank}, host host-{rank}, process {ranks[rank].pid}, iteration ")
        assert "in all_reduce" in stacks and "heartbeat.py" in stacks


# ---- training under torchrun -------------------------------------------------------------------


class Training:
    """`tools/train.py` under one torchrun with two ranks on each host."""

    def __init__(self, network: hosts.Hosts, number: int, folder: Path, *settings: str) -> None:
        self._outputs = [folder / f"{time.monotonic()}-{host}.txt" for host in range(number)]
        self.started = []
        for host, output in enumerate(self._outputs):
            torchrun = ["-m", "torch.distributed.run", "--nnodes", number, "--nproc-per-node", 2]
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"host-0:{PORT}", "--rdzv-id", "hosts"]
            inputs = ["--load-hf", folder / "base", "--data", folder / "rows", "--save", folder / "run"]
            tool = [
                "tools/train.py",
                "--recipe",
                "tiny",
                "--set",
                *SETTINGS,
                "parallel.tp=2",
                "parallel.cp=2",
            ]
            command = [*network.on(host), sys.executable, *torchrun, *meeting, *tool, *settings, *inputs]
            with output.open("w") as file:
                self.started.append(
                    subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=file, stderr=file)
                )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for torchrun in self.started:
            torchrun.wait()

    def processes(self) -> list[psutil.Process]:
        """All that run: each torchrun with its ranks."""
        alive = []
        for torchrun in self.started:
            if torchrun.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    main = psutil.Process(torchrun.pid)
                    alive += [*main.children(recursive=True), main]
        return alive

    def text(self, host: int = 0) -> str:
        return self._outputs[host].read_text()

    def all_text(self) -> str:
        return "\n".join(f"host {host}: {self.text(host)[-5000:]}" for host in range(len(self._outputs)))

    def losses(self) -> dict[int, float]:
        return {
            int(n): float(x) for n, x in re.findall(r"\] iteration +(\d+)/.*lm loss: (\S+) ", self.text())
        }

    def reach(self, iteration: int, seconds: float) -> None:
        def there() -> bool:
            assert all(torchrun.poll() is None for torchrun in self.started), self.all_text()
            return max(self.losses(), default=0) >= iteration

        until(there, seconds, self.all_text)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("number", "cut"), [(2, 1), (4, 0)])
def test_training_on_hosts(tmp_path: Path, number: int, cut: int) -> None:
    """TP inside a host, CP and DP across; the host that is cut off for good is another's, and the store's."""
    limit = 75.0  # TCP sends again up to 51 s after a link was cut, if it was for 25 s
    inputs = write_inputs(tmp_path)
    with Tool(inputs, tmp_path / "one", "train.iterations=2000", "train.save_every=0", timeout=600) as tool:
        tool.wait_for("] iteration   40/2000")
        expected = {n: line["loss"] for n, line in tool.iterations().items()}
    settings = ("train.iterations=2000", "train.save_every=4", f"runtime.hang_minutes={limit / 60}")
    with hosts.Hosts(number) as network:
        with Training(network, number, inputs, *settings) as training:
            training.reach(6, 600)
            everything = training.processes()
            network.cut(number - 1)
            time.sleep(25)
            stopped_at = max(training.losses())
            network.mend(number - 1)
            training.reach(stopped_at + 6, 120)
            network.cut(cut)
            sides = [host for host in range(number) if host != cut], [cut]
            took = until(
                lambda: all(any("error: " in training.text(host) for host in side) for side in sides),
                limit + 60,
                training.all_text,
            )
            assert 0.7 * limit < took < limit + LATE, training.all_text()
            assert all(torchrun.wait(60) for torchrun in training.started), training.all_text()
            _, left = psutil.wait_procs(everything, timeout=10)
            assert not left, training.all_text()
            first = dict(training.losses())
            for host in range(number):
                for line in re.findall(r".*error: .*", training.text(host)):
                    assert line.startswith("[rank ") or "traceback" in line, line
            alone, together = training.text(cut), training.text(sides[0][0])
            silent = sides[0] if cut == 0 else [cut]  # seen from the store's host
            for host in silent:
                named = rf"no sign of life for \d+ s of rank {2 * host}-{2 * host + 1} \(host host-{host}, "
                assert re.search(named, training.text(0)), training.text(0)
            lost = "rank 0-1 on host host-0"
            for host in silent:
                assert "has not answered for" in training.text(host) and lost in training.text(host)
            for text in (alone, together):
                assert "/run/iter_" in text
                command = re.search(r"to resume, run the same command again on every host: (.*)", text)
                assert command and "torch.distributed.run --nnodes" in command[1]
            network.mend(cut)
        with Training(network, number, inputs, *settings) as training:
            training.reach(max(first) + 2, 600)
            second = training.losses()
            for host in range(number):
                training.started[host].send_signal(signal.SIGTERM)
            psutil.wait_procs(training.processes(), timeout=60)
    assert 1 < min(second) <= max(first) + 1, (
        "it resumed from a checkpoint, and lost at most one save interval"
    )
    for losses in (first, second):
        known = [n for n in losses if n in expected]
        assert known and [losses[n] for n in known] == pytest.approx([expected[n] for n in known], rel=1e-4)
