"""Stand-ins of sbatch, srun, scancel, scontrol and squeue: `slurm_program.py STATE NAME ARGUMENTS`.

STATE is the folder of tests/cluster/slurm.py, which starts the jobs. As with real Slurm, srun ends its step
at a SIGTERM of its own; scancel --signal reaches all processes of the steps, or with --batch the batch script
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.slurm_options import Refused, in_script, parse

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def write(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.rename(path)


def jobs(state: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in sorted((state / "jobs").glob("*.json"))}


def change(folder: Path, job: int, /, **values: Any) -> None:
    path = folder / "jobs" / f"{job}.json"
    write(path, json.loads(path.read_text()) | values)


def send(pids: list[int], number: int, everything: bool = True) -> None:
    """Send a signal to processes, and to all that they have started."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(pid)
            for process in [main, *(main.children(recursive=True) if everything else [])]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def step_pids(state: Path, job: int) -> list[int]:
    return [pid for path in (state / "steps").glob(f"{job}.*") for pid in json.loads(path.read_text())]


def sbatch(state: Path, words: list[str]) -> None:
    given, rest = parse("sbatch", words)
    if not rest or not Path(rest[0]).is_file():
        raise Refused(f"sbatch: error: Unable to open file {rest[:1]}")
    text = Path(rest[0]).read_text()
    if not text.startswith("#!"):
        raise Refused("sbatch: error: This does not look like a batch script")
    of_script, odd = parse("sbatch", in_script(text))
    if odd:
        raise Refused(f"sbatch: error: {odd} in #SBATCH lines")
    options = of_script | given
    if int(options.get("nodes", "1").split("-")[-1]) > len(json.loads((state / "hosts").read_text())):
        raise Refused(
            "sbatch: error: Batch job submission failed: Requested node configuration is not available"
        )
    known = jobs(state)
    for job in options.get("dependency", "afterok").split(":")[1:]:
        if int(job) not in known:
            raise Refused("sbatch: error: Batch job submission failed: Job dependency problem")
    job = max(known, default=0) + 1
    spooled = state / f"script-{job}"  # as real Slurm: the script runs as a copy elsewhere
    spooled.write_text(text)
    environment = {**os.environ, "SLURM_SUBMIT_DIR": os.getcwd()}
    write(
        state / "jobs" / f"{job}.json",
        {
            "state": "PENDING",
            "options": options,
            "command": ["bash", str(spooled), *rest[1:]],
            "environment": environment,
            "folder": options.get("chdir", os.getcwd()),
            "restarts": 0,
        },
    )
    print(job if "parsable" in options else f"Submitted batch job {job}")


def srun(state: Path, words: list[str]) -> None:
    options, command = parse("srun", words)
    if "SLURM_JOB_ID" not in os.environ:
        raise Refused("srun: the scripts call it inside of jobs")
    job, all_nodes = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    nodes = int(options.get("nodes", all_nodes))
    tasks = int(options.get("ntasks", nodes * int(options.get("ntasks-per-node", "1"))))
    if nodes > all_nodes or tasks != nodes:
        raise Refused("srun: error: Unable to create step: More processors requested than permitted")
    on = json.loads((state / "hosts").read_text())
    first = jobs(state)[job]["hosts"]
    step = sum(1 for _ in (state / "steps").glob(f"{job}.*"))
    running = []
    printing = threading.Lock()

    def show(task: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with printing:
                sys.stdout.write(f"{task}: {line}" if "label" in options else line)
                sys.stdout.flush()

    for task in range(nodes):
        environment = {
            **os.environ,
            "SLURM_PROCID": str(task),
            "SLURM_NODEID": str(task),
            "SLURM_STEP_ID": str(step),
        }
        running.append(
            subprocess.Popen(
                [*on[first[task]], *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    pids = [process.pid for process in running]
    write(state / "steps" / f"{job}.{step}", pids)
    for number in (signal.SIGTERM, signal.SIGHUP):  # "forcing job termination"
        signal.signal(number, lambda *_: send(pids, signal.SIGKILL))
    threads = [threading.Thread(target=show, args=pair) for pair in enumerate(running)]
    for thread in threads:
        thread.start()
    while None in (codes := [process.poll() for process in running]):
        if options.get("kill-on-bad-exit") not in (None, "0") and any(codes):
            send([process.pid for process in running if process.poll() is None], signal.SIGTERM)
            time.sleep(2)
            send([process.pid for process in running if process.poll() is None], signal.SIGKILL)
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    write(state / "steps" / f"{job}.{step}", [])
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def scancel(state: Path, words: list[str]) -> None:
    options, chosen = parse("scancel", words)
    for job in map(int, chosen):
        known = jobs(state).get(job)
        if known is None:
            raise Refused(f"scancel: error: Kill job error on job id {job}: Invalid job id specified")
        if "signal" not in options:
            change(state, job, state="CANCELLED")
            send([*step_pids(state, job), *known.get("pids", [])], signal.SIGKILL)
            continue
        number = signal.Signals[f"SIG{options['signal'].removeprefix('SIG')}"]
        if "batch" in options or "full" in options:
            send(known["batch"], number, everything="full" in options)
        if "batch" not in options:
            send(step_pids(state, job), number)


def scontrol(state: Path, words: list[str]) -> None:
    _, rest = parse("scontrol", words)
    if rest[:2] == ["show", "hostnames"]:
        names = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", rest[2])
        listed = range(int(names[2]), int(names[3]) + 1) if names else []
        print("\n".join(f"{names[1]}{n}" for n in listed) if names else rest[2])
    elif rest[:1] == ["requeue"]:
        if "requeue" not in jobs(state)[int(rest[1])]["options"]:
            raise Refused("Requested operation is presently disabled for job")
        change(state, int(rest[1]), requeue=True)
    else:
        raise Refused(f"scontrol: invalid keyword {rest}")


def squeue(state: Path, words: list[str]) -> None:
    options, _ = parse("squeue", words)
    known = jobs(state)
    chosen = [int(job) for job in options["jobs"].split(",")]
    if not any(job in known for job in chosen):
        raise Refused("slurm_load_jobs error: Invalid job id specified")
    assert options["format"] == "%i" and "noheader" in options
    for job in chosen:
        if job in known and known[job]["state"] not in ENDED:
            print(job)


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    with (folder / "calls").open("a") as calls:
        calls.write(f"{name} {' '.join(sys.argv[3:])}\n")
    try:
        {"sbatch": sbatch, "srun": srun, "scancel": scancel, "scontrol": scontrol, "squeue": squeue}[name](
            folder, sys.argv[3:]
        )
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(1)
