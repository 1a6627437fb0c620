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


def test_ranks_on_two_hosts(tmp_path: Path) -> None:
    limit = 9.0
    files = {name: tmp_path / name for name in ("store", "0.out", "0.err", "1.out", "1.err")}

    def text() -> str:
        return "\n".join(
            f"{name}: {path.read_text()[-3000:]}" for name, path in files.items() if path.exists()
        )

    def start(host: int, call: str, out: str, **environment: str) -> processes.Popen:
        source = (
            f"{network.enter(host)}\nfrom pathlib import Path; from tests.faults import test_hosts; {call}"
        )
        with (tmp_path / out).open("w") as file, (tmp_path / f"{out[0]}.err").open("a") as errors:
            return processes.Popen(
                [sys.executable, "-c", source], stdout=file, stderr=errors, env={**os.environ, **environment}
            )

    with hosts.Hosts(2) as network:
        server = start(0, "test_hosts.store()", "store")
        until(lambda: "ready" in files["store"].read_text(), 60, text)
        environment = {
            "MASTER_ADDR": network.address(0),
            "MASTER_PORT": str(PORT),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": str(tmp_path),
            "GLOO_SOCKET_IFNAME": "eth0",
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": "2",
        }
        call = f"test_hosts.rank({limit / 60}, Path({str(tmp_path / 'hang')!r}))"
        ranks = [start(r, call, f"{r}.out", **environment, RANK=str(r)) for r in range(2)]

        def iterations() -> int:
            return files["0.out"].read_text().count("iteration")

        until(lambda: iterations() > 20, 60, text)
        network.cut(1)
        time.sleep(3)
        assert [process.poll() for process in ranks] == [None, None], text()
        network.mend(1)
        before = iterations()
        until(lambda: iterations() > before + 20, 30, text)

        network.cut(1)
        errors = [files["0.err"], files["1.err"]]
        took = until(lambda: all("error:" in path.read_text() for path in errors), 60, text)
        assert 0.7 * limit < took < limit + LATE, text()
        until(lambda: all(process.poll() == 1 for process in ranks), 20, text)
        first, second = (path.read_text() for path in errors)
        assert re.search(
            rf"error: no sign of life for \d+ s of rank 1 \(host host-1, process {ranks[1].pid}\)", first
        )
        assert re.search(r"error: torchrun's store at 10.77.0.1:29500 has not answered for \d+ s", second)
        assert "this host does not see rank 0 on host host-0" in second
        for number, said in enumerate((first, second)):
            assert "the last good checkpoint is /s/iter_0000100" in said
            assert "to resume, run the same command again on every host: " in said
            stacks = (tmp_path / "hang" / f"rank_{number}.txt").read_text()
            assert stacks.startswith(
                f"rank {number}, host host-{number}, process {ranks[number].pid}, iteration "
            )
            assert "in all_reduce" in stacks and "heartbeat.py" in stacks
        server.kill()


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
            training.reach(6, 400)
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
            training.reach(max(first) + 2, 400)
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
