"""examples/cluster under a stand-in Slurm: on two hosts in network namespaces from documents to the report,
with a stop in the middle; and what its jobs do when they are stopped, time out or fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Slurm, wait_until
from tests.cluster.slurm_options import Refused, in_script, parse
from tests.faults import hosts

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}Question: {{ message.content }}\n{% endif %}{% endfor %}"
)
PIPELINE = 40
"""Iterations of pretraining: more than are trained before it is stopped."""


def submit(slurm: Slurm | None, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", CLUSTER / "slurm.sh"],
        env=environment | {"PATH": f"{slurm.bin}:{path}" if slurm else path} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def inputs(folder: Path) -> dict[str, str]:
    """The demo's model with a chat template, documents and conversations."""
    base = folder / "base"
    shutil.copytree(ROOT / "examples" / "demo" / "base", base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    words = "the sky is blue today and the grass is green in spring while a small boat rests by the river . "
    documents = [{"text": f"{number} {words * 40}"} for number in range(12)]
    talk = [
        {"role": "user", "content": "What colour has the sky?"},
        {"role": "assistant", "content": "blue, today"},
    ]
    for name, lines in (("text", documents), ("chat", [{"messages": talk}] * 8)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"MODEL": str(base), "TEXT": str(folder / "text.jsonl"), "CHAT": str(folder / "chat.jsonl")}


def test_stand_ins_take_what_slurm_takes() -> None:
    for script in CLUSTER.glob("*.sh"):
        parse("sbatch", in_script(script.read_text()))
    header = in_script((CLUSTER / "job.sh").read_text())
    assert {"--mem=0", "--requeue", "--open-mode=append", "--exclusive"} <= set(header)
    for words in (["--memory=0"], ["--signal=TERM@soon"], ["--requeue=yes"], ["--mem"], ["-N2"]):
        with pytest.raises(Refused):
            parse("sbatch", words)


@pytest.mark.slow
@pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))
def test_a_run_on_two_hosts(tmp_path: Path) -> None:
    """Stopped in the middle of pretraining, submitted again, finished, exported and evaluated."""
    runs = tmp_path / "runs"
    small = "train.seq_length=1K train.global_batch=2 train.warmup=0 train.log_every=1 runtime.device=cpu"
    settings = {
        **inputs(tmp_path),
        "RECIPE": "tiny_extend",
        "RUNS": str(runs),
        "EXTRA": f"{small} train.iterations={PIPELINE}",
        "EXTRA_SFT": f"{small.replace('1K', '512')} train.iterations=2",
        "NODES": "2",
        "GPUS_PER_NODE": "1",
        "LENGTHS": "512,1K",
        "SAMPLES": "1",
        "OMP_NUM_THREADS": "1",
    }
    with hosts.Hosts(2) as network, Slurm(tmp_path, [network.on(0), network.on(1)]) as slurm:

        def said() -> str:
            logs = "\n".join(
                f"{log.name}: {log.read_text()[-4000:]}" for log in sorted((runs / "logs").glob("*.log"))
            )
            return f"{slurm.states()}\n{logs}"

        first = submit(slurm, **settings)
        assert first.returncode == 0, first.stderr
        assert re.findall(
            r"^(\w+): job (\d+), (\d) nodes(?:, after job (\d+))?;", first.stdout, re.MULTILINE
        ) == [
            ("data", "1", "1", ""),
            ("pretrain", "2", "2", "1"),
            ("sft", "3", "2", "2"),
            ("export", "4", "1", "3"),
            ("evaluate", "5", "2", "3"),
        ]
        second = submit(slurm, **settings)
        assert second.returncode == 2 and "error: jobs 1 2 3 4 5 of" in second.stderr, second.stderr

        log = runs / "logs" / "pretrain-2.log"
        wait_until(lambda: log.is_file() and re.search(r"iteration +3/", log.read_text()), 200, said)
        assert slurm.states()["runs-data"] == "COMPLETED"
        assert "verdict: ready, 2 ranks, TP 1 x PP 1 x CP 2 x DP 1" in log.read_text(), said()
        scancel = [slurm.bin / "scancel", "--signal=TERM", "--batch", "2"]
        subprocess.run(scancel, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        wait_until(lambda: slurm.job(5)["state"] == "CANCELLED", 120, said)
        assert slurm.job(2)["code"] == 75 and "stopped as asked" in log.read_text(), said()
        assert (slurm.job(3)["state"], slurm.job(4)["state"]) == ("CANCELLED", "CANCELLED")
        saved = int((runs / "pretrain" / "latest_checkpointed_iteration.txt").read_text())
        assert 3 <= saved < PIPELINE
        # An agent of torchrun whose peer has ended first logs that, and exits with 0.
        ours = [line for line in said().splitlines() if "torch/distributed/elastic/agent" not in line]
        assert not any("Traceback" in line or "error:" in line for line in ours), said()
        for task in (0, 1):  # both hosts in the job's log, and each in one of its own
            assert re.search(rf"^{task}: ", log.read_text(), re.MULTILINE)
            assert (runs / "logs" / f"pretrain-2-host-{task}.log").is_file()

        again = submit(slurm, **settings)
        assert again.returncode == 0 and "data:" not in again.stdout, again.stderr
        wait_until(lambda: set(slurm.states().values()) <= {"COMPLETED", "FAILED", "CANCELLED"}, 500, said)
        assert set(slurm.states().values()) == {"COMPLETED"}, said()
        complete = submit(slurm, **settings)
        assert complete.stdout.startswith(f"complete: {runs}/hf"), complete
    log = runs / "logs" / "pretrain-6.log"
    assert "verdict:" not in log.read_text(), "the nodes are checked once"
    assert f"iteration {saved}, {2 * saved} sequences consumed" in log.read_text()
    assert (runs / "pretrain" / f"iter_{PIPELINE:07d}").is_dir() and (runs / "sft" / "iter_0000002").is_dir()
    assert (runs / "hf" / "model.safetensors").is_file() or list((runs / "hf").glob("*.safetensors"))
    for name in ("before", "after"):
        result = json.loads((runs / name / "niah" / "niah.json").read_text())
        assert {score["length"] for score in result["scores"]} == {512, 1024}, "the trained length"
        assert (runs / name / "niah" / "niah.png").is_file()
    calls = (slurm.state / "calls").read_text()
    assert re.search(r"srun --nodes=2 .*tools/evaluate.py niah --load .*/sft .*--tp 1 --pp 1", calls)
    report = (runs / "report" / "report.md").read_text()
    assert "| before |" in report and "| after |" in report


# ---- a job's end, with stand-ins for what it runs ----------------------------------------------


TORCHRUN = """#!{python}
# Its rank, a child, saves an iteration and waits; it answers a request to stop as tools/train.py does.
import json, os, pathlib, signal, sys, time
rank = os.fork()
if rank:
    signal.signal(signal.SIGTERM, lambda *_: os.kill(rank, signal.SIGTERM))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0)
if "--save" not in sys.argv:
    print("ran", *sys.argv, flush=True)
    sys.exit(0)
save = pathlib.Path(sys.argv[sys.argv.index("--save") + 1])
file = pathlib.Path({folder!r}, "behaviour")
behaviour = file.read_text()
save.mkdir(parents=True, exist_ok=True)
stopping = []
if behaviour != "deaf":
    signal.signal(signal.SIGUSR1, lambda *_: stopping.append(1))
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
latest = save / "latest_checkpointed_iteration.txt"
done = int(latest.read_text()) if latest.exists() else 0
print("training", flush=True)
if behaviour == "fails":
    sys.exit("no such device")
if behaviour == "finishes":
    (save / "iter_0000060").mkdir(exist_ok=True)
    sys.exit(0)
while not stopping:
    time.sleep(0.02)
if file.read_text() != "saves nothing":
    latest.write_text(str(done + 1))
with open(save / "metrics.jsonl", "a") as file:
    print(json.dumps(dict(kind="stop", iteration=done, reason="asked to stop")), file=file)
"""


class Jobs:
    """A run of pretraining alone whose torchrun is a stand-in, on one host of this machine."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self.runs, self.slurm = folder, folder / "runs", slurm
        (slurm.bin / "torchrun").write_text(TORCHRUN.format(python=sys.executable, folder=str(folder)))
        (slurm.bin / "torchrun").chmod(0o755)
        self.settings = {
            **inputs(folder),
            "RECIPE": "tiny_extend",
            "RUNS": str(self.runs),
            "ROWS": str(folder / "rows"),
            "CHAT": "",
            "NODES": "2",
            "GPUS_PER_NODE": "1",
            "CHECK": "no",
        }
        (folder / "rows.json").write_text("{}")

    def start(self, behaviour: str) -> tuple[int, Path]:
        """Submit; return the job of pretraining and its log, when it trains or has ended."""
        (self.folder / "behaviour").write_text(behaviour)
        done = submit(self.slurm, **self.settings)
        assert done.returncode == 0, done.stderr
        job = int(re.findall(r"pretrain: job (\d+)", done.stdout)[0])
        log = self.runs / "logs" / f"pretrain-{job}.log"
        self.until(lambda: log.is_file() and "training" in log.read_text())
        return job, log

    def until(self, holds: Any) -> None:
        wait_until(holds, 60, lambda: "\n".join(log.read_text() for log in self.runs.glob("logs/*.log")))

    def ended(self, job: int) -> dict[str, Any]:
        self.until(lambda: self.slurm.job(job)["state"] not in ("PENDING", "RUNNING"))
        return self.slurm.job(job)


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    small = {
        "RECIPE": "tiny_extend",
        "NODES": "2",
        "GPUS_PER_NODE": "1",
        "RUNS": str(tmp_path / "runs"),
        **given,
    }
    with Slurm(tmp_path, [["env"], ["env"]]) as slurm:
        for changed, said in (
            ({"MODEL": "nowhere"}, r"MODEL=\S+nowhere is no Hugging Face directory"),
            ({"ROWS": "rows"}, r"ROWS=\S+/rows: no packed rows there"),
            ({"TEXT": "no*.jsonl"}, r"TEXT=\S+/no\*\.jsonl: no such file"),
            ({"EXTRA": "train.sequence=1K"}, r".*train\.sequence"),
            ({"NODES": "3"}, r"NODES=3: 3 x 1 GPUs are no multiple of the 2 of one replica of tiny_extend"),
            ({"RECIPE": "ultralong_9m"}, r".*ultralong_9m"),
            ({"CONTAINER": "docker"}, r"CONTAINER=docker: give pyxis, enroot or apptainer"),
            ({"GPU_OPTIONS": "--part=h100"}, r"Slurm refused the pretrain job"),
        ):
            done = submit(slurm, **small | changed)
            assert done.returncode == 2, (changed, done)
            assert re.fullmatch(rf"error: {said}.*", done.stderr.splitlines()[-1]), (changed, done.stderr)
        assert set(slurm.states().values()) == {"CANCELLED"}, "those before a refused one"
        dry = submit(slurm, **small, DRY_RUN="yes")
        assert dry.returncode == 0 and dry.stderr.count(" sbatch --parsable ") == 5, dry
    assert submit(None, **small).returncode == 2
    for script in ("job.sh", "ssh.sh"):
        done = subprocess.run(["bash", CLUSTER / script], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done


def test_how_jobs_end(tmp_path: Path) -> None:
    with Slurm(tmp_path, [["env"], ["env"]]) as slurm:
        jobs = Jobs(tmp_path, slurm)

        # Near its time limit: saved and requeued with the same id and log; the jobs after it still wait.
        job, log = jobs.start("trains")
        slurm.near_time_limit(job)
        jobs.until(lambda: log.read_text().count("training") == 4)  # twice on both hosts
        assert slurm.job(job)["restarts"] == 1 and "requeued at its time limit" in log.read_text()
        assert f"(job {job}, restart 1)" in log.read_text()
        assert slurm.states()["runs-export"] == slurm.states()["runs-evaluate"] == "PENDING"
        # Again, but nothing has been saved since.
        (tmp_path / "behaviour").write_text("saves nothing")
        slurm.near_time_limit(job)
        assert jobs.ended(job)["code"] == 75
        assert "not requeued: nothing was saved" in log.read_text() and slurm.job(job)["restarts"] == 1

        # Asked to stop by the user: not requeued, a code of its own, and no job after it.
        job, log = jobs.start("trains")
        send = [slurm.bin / "scancel", "--signal=TERM", "--batch", str(job)]
        subprocess.run(send, check=True)
        assert jobs.ended(job)["code"] == 75
        assert "stopped as asked" in log.read_text() and "requeued" not in log.read_text()
        jobs.until(lambda: slurm.states()["runs-evaluate"] == "CANCELLED")

        # A failure: its code, and not requeued.
        job, log = jobs.start("fails")
        assert jobs.ended(job)["code"] == 1
        assert re.search(r"failed before its last iteration \(exit code \d+\)", log.read_text()), (
            log.read_text()
        )
        assert "no such device" in log.read_text() and "requeued" not in log.read_text()

        # A failure that follows a request to stop is no clean stop.
        job, log = jobs.start("deaf")
        for path in (slurm.state / "steps").glob(f"{job}.*"):
            for pid in json.loads(path.read_text()):
                os.killpg(pid, signal.SIGKILL)
        assert jobs.ended(job)["code"] == 1, log.read_text()

        # Complete.
        job, log = jobs.start("finishes")
        assert jobs.ended(job)["code"] == 0
