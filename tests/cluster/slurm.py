"""A stand-in of Slurm's controller: starts jobs of the stand-in sbatch on hosts in network namespaces, or on
this machine alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cluster.slurm_program import ENDED, change, jobs, send, step_pids

ROOT = Path(__file__).parents[2]
PROGRAMS = ("sbatch", "srun", "scancel", "scontrol", "squeue")


class Slurm:
    """`on`: for each host the beginning of a command that runs there."""

    def __init__(self, folder: Path, on: list[list[str]]) -> None:
        self.state, self.bin = folder / "slurm", folder / "bin"
        for path in (self.state / "jobs", self.state / "steps", self.bin):
            path.mkdir(parents=True)
        (self.state / "hosts").write_text(json.dumps(on))
        self._on = on
        for name in PROGRAMS:
            program = self.bin / name
            run = f"exec {sys.executable} -m tests.cluster.slurm_program {self.state} {name}"
            program.write_text(f'#!/bin/bash\nexport PYTHONPATH={ROOT}\n{run} "$@"\n')
            program.chmod(0o755)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Slurm:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        for job, batch in self._running.items():
            send([*step_pids(self.state, job), batch.pid], signal.SIGKILL)
            batch.wait()

    def job(self, number: int) -> dict[str, Any]:
        return jobs(self.state)[number]

    def states(self) -> dict[str, str]:
        """The state of each job by name, the last of that name."""
        return {job["options"]["job-name"]: job["state"] for job in jobs(self.state).values()}

    def near_time_limit(self, number: int) -> None:
        """Send what the job's --signal asks for, as when its time limit is that near."""
        flags, name = re.fullmatch(r"(?:(\w+):)?(\w+)@\d+", self.job(number)["options"]["signal"]).groups()
        assert flags == "B"
        send(self.job(number)["batch"], signal.Signals[f"SIG{name}"], everything=False)

    def _run(self) -> None:
        while not self._ending.wait(0.05):
            for job, batch in list(self._running.items()):
                if batch.poll() is not None:
                    self._ended(job, batch.returncode)
            known = jobs(self.state)
            for number, job in known.items():
                if job["state"] == "PENDING":
                    self._start_or_cancel(number, job, known)

    def _start_or_cancel(self, number: int, job: dict[str, Any], known: dict[int, dict[str, Any]]) -> None:
        after = [
            known[int(other)]["state"] for other in job["options"].get("dependency", "afterok").split(":")[1:]
        ]
        if any(state in ("FAILED", "CANCELLED") for state in after):
            if job["options"].get("kill-on-invalid-dep") == "yes":
                change(self.state, number, state="CANCELLED")
            return
        nodes = int(job["options"].get("nodes", 1))
        busy = {host for other in self._running for host in self.job(other)["hosts"]}
        free = [host for host in range(len(self._on)) if host not in busy]
        if len(free) < nodes or any(state not in ENDED for state in after):
            return
        self._start(number, job, free[:nodes])

    def _start(self, number: int, job: dict[str, Any], on: list[int]) -> None:
        options = job["options"]
        names = f"host-{on[0]}" if len(on) == 1 else f"host-[{on[0]}-{on[-1]}]"
        environment = job["environment"] | {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_JOB_NODELIST": names,
            "SLURM_JOB_NUM_NODES": str(len(on)),
            "SLURM_NNODES": str(len(on)),
            "SLURM_NTASKS": str(len(on)),
        }
        if job["restarts"]:  # not set before the first restart
            environment["SLURM_RESTART_COUNT"] = str(job["restarts"])
        change(self.state, number, state="RUNNING", hosts=on, requeue=False)
        output = options["output"].replace("%j", str(number)).replace("%x", options["job-name"])
        with open(output, "a" if options.get("open-mode") == "append" else "w") as file:
            batch = subprocess.Popen(
                [*self._on[on[0]], *job["command"]],
                cwd=job["folder"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._running[number] = batch
        change(self.state, number, batch=[batch.pid])

    def _ended(self, number: int, code: int) -> None:
        batch = self._running.pop(number)
        send(step_pids(self.state, number), signal.SIGKILL)
        with_session(batch.pid)
        job = self.job(number)
        if job["requeue"]:
            change(self.state, number, state="PENDING", restarts=job["restarts"] + 1)
        elif job["state"] == "RUNNING":
            change(self.state, number, state="COMPLETED" if code == 0 else "FAILED", code=code)


def with_session(session: int) -> None:
    """Kill what a job has left behind, as Slurm does when its script has ended."""
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


def wait_until(holds: Any, seconds: float, what: Any) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what()}"
        time.sleep(0.05)
