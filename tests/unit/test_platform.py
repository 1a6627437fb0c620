"""What only Linux has, taken away: the library goes on with less, as on macOS. Few files use it."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.evaluate.code_sandbox import program
from megatron_ultralong.gpu_report import machine
from megatron_ultralong.io import workers
from megatron_ultralong.measure.report import device_name
from megatron_ultralong.runtime import cli, hang_report, memory

PACKAGE = Path(__file__).parents[2] / "megatron_ultralong"

LINUX_ONLY = {
    r"\bsched_\w+": {"io/workers.py"},
    r"\bprctl\b": {"runtime/cli.py", "evaluate/code_sandbox/program.py"},
    r'"/(proc|sys)\b|f"/proc/': {
        "runtime/memory.py",
        "runtime/hang_report.py",
        "measure/report.py",
        "gpu_report/machine.py",
        "check_cluster/machines.py",
    },
    r"\b(pidfd|renameat2|signalfd|memfd|splice|sendfile|epoll|inotify)\w*|posix_f\w+|O_DIRECT|O_TMPFILE": set(),
    "/dev/shm": {"check_cluster/machines.py"},  # of a cluster's nodes, which run Linux
}
"""Names, and the files that do without where they are missing."""


@pytest.mark.parametrize("name", LINUX_ONLY)
def test_linux_only_names_are_where_they_have_a_substitute(name):
    sandbox = PACKAGE / "evaluate" / "code_sandbox"  # says what it needs, and refuses to run without
    used = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(name, path.read_text()) and (path.parent != sandbox or path.name == "program.py")
    }
    assert used - {"evaluate/code_sandbox/program.py"} == LINUX_ONLY[name] - {
        "evaluate/code_sandbox/program.py"
    }


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither processor affinity, nor prctl, nor /proc and /sys."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    for method in ("read_text", "read_bytes", "open"):
        real = getattr(Path, method)

        def read(path: Path, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if path.parts[1:2] in (("proc",), ("sys",)):
                raise FileNotFoundError(path)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, read)


def test_it_goes_on_without(elsewhere, monkeypatch):
    assert workers.cores() == os.cpu_count()
    assert machine.facts(torch.device("cpu"))["cores"] == os.cpu_count()
    assert memory.control_group_bytes() == [] and memory.host_bytes() > 0
    assert device_name(torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    cli.end_with_torchrun()
    assert hang_report._torchrun() is None and "run the same command" in hang_report.resume_line(1)
    # Programs of a model are then not run, unless --run-code unconfined allows it.
    assert program._confine(os.getppid(), "", ()) == []


def test_cores_are_those_that_this_process_may_use():
    assert workers.cores() == len(os.sched_getaffinity(0))
