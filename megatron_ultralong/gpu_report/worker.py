"""The process that measures rows: it sends each as soon as it is measured, and ends with its parent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.gpu_report import extension, machine, predictions
from megatron_ultralong.gpu_report.sizes import TESTS, Work
from megatron_ultralong.io import workers
from megatron_ultralong.measure import attention, generation, loss, step, timing
from megatron_ultralong.planning.hardware import Gpu, gpu_named
from megatron_ultralong.runtime import cli

Emit = Callable[[str, dict[str, Any], dict[str, float]], None]
"""Called with a row's name, its figures (or a note that says why it has none) and what planning/ predicts."""


def check_machine(connection: Connection, device: str, log: Path) -> None:
    """Send the machine's facts."""
    _begin(log)
    connection.send(machine.facts(timing.select_device(device)))


def measure(connection: Connection, work: Work, rows: Sequence[str], device: str, log: Path) -> None:
    """Measure these rows of `work` in order, and send ("start", row) and ("row", row, figures, predictions),
    or ("failed", row, reason, whether it concerns all rows)."""
    _begin(log)
    waiting = list(rows)

    def emit(row: str, figures: dict[str, Any], predicted: dict[str, float]) -> None:
        if row not in waiting:  # measured for comparison
            return
        waiting.remove(row)
        connection.send(("row", row, figures, predicted))
        if waiting:
            connection.send(("start", waiting[0]))

    connection.send(("start", waiting[0]))
    try:
        target = timing.select_device(device)
        gpu = gpu_named(torch.cuda.get_device_name(target)) if target.type == "cuda" else None
        _MEASURE[work.group](work, waiting.copy(), target, gpu, emit)
    except Exception as error:
        traceback.print_exc()
        for_all = isinstance(error, (ImportError, UserError))
        connection.send(("failed", waiting[0], f"{type(error).__name__}: {_first_line(error)}", for_all))
        return
    if waiting:
        connection.send(("failed", waiting[0], "the measurement has no such row", False))


def _begin(log: Path) -> None:
    workers.end_with_main(with_children=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    cli.quiet()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


# ---- groups ------------------------------------------------------------------------------------


def _attention(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    settings: attention.AttentionSettings = work.settings
    kernel = kernels.choose(device, settings.dtype, settings.head_dim)

    def record(row: dict[str, Any]) -> None:
        method, cp = row["method"], row["cp"]
        name = method if method == "one kernel" else f"{method}, CP {cp}"
        predicted = {} if row.get("note") else predictions.attention(settings, row, kernel, gpu)
        emit(name, row, predicted)

    methods = {name.partition(",")[0].split()[0] for name in rows}
    cps = sorted({int(name.partition(", CP ")[2]) for name in rows if ", CP " in name})
    needed = replace(settings, methods=[m for m in settings.methods if m in methods], cp=cps)
    attention.run(needed, device, "ultralong gpu-report", record=record)


def _loss(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    def record(row: dict[str, Any]) -> None:
        emit(row["name"], row, {} if row.get("note") else predictions.loss(work.settings, row, gpu))

    loss.run(work.settings, device, "ultralong gpu-report", record=record)


def _step(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    settings = replace(work.settings, settings=tuple(rows))
    kernel = kernels.choose(device, timing.DTYPES[settings.precision], settings.model.head_dim)

    def record(row: dict[str, Any]) -> None:
        failed = row.get("note") and not settings.longest
        emit(row["setting"], row, {} if failed else predictions.step(settings, row, kernel, gpu))

    step.run(settings, device, "ultralong gpu-report", record=record)


def _generation(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    def record(row: dict[str, Any]) -> None:
        predicted = {} if row.get("note") else predictions.generation(work.settings, row, gpu)
        emit(rows[0], row, predicted)

    generation.run(work.settings, device, "ultralong gpu-report", record=record)


def _extension(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    settings = work.settings
    run, model = extension.planned_run(settings)
    kernel = kernels.choose(device, timing.DTYPES[settings.precision], model.head_dim)
    figures = extension.measure(settings, device.type)
    emit(rows[0], figures, predictions.training(run, model, kernel, gpu))


def _tests(work: Work, rows: Sequence[str], device: torch.device, gpu: Gpu | None, emit: Emit) -> None:
    """Each file of tests/gpu by pytest."""
    clone = Path.cwd()
    paths = [str(clone), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name in rows:
        if device.type != "cuda":
            emit(name, {"note": "not run: no GPU"}, {})
            continue
        if not (clone / TESTS / name).is_file():
            emit(
                name,
                {"note": "not run: this folder is not a clone of the repository, which has the tests"},
                {},
            )
            continue
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(TESTS / name)],
            cwd=clone,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        emit(name, test_figures(done.stdout, done.returncode), {})


def test_figures(output: str, code: int) -> dict[str, Any]:
    """Return the counts of pytest's last line, and as a note the tests that failed."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped)\b", lines[-1] if lines else "")
    counts = {word: int(number) for number, word in found}
    figures: dict[str, Any] = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if failed:
        figures["note"] = "failed: " + ", ".join(name.rpartition("/")[2] for name in failed)
    elif code not in (0, 5):
        figures["note"] = f"pytest ended with exit code {code}"
    return figures


_MEASURE = {
    "tests": _tests,
    "attention": _attention,
    "loss": _loss,
    "step": _step,
    "longest": _step,
    "generation": _generation,
    "extension": _extension,
}
