"""The report: what is missing in the folder is measured, in order of worth, until the time is up.

Each `Work` runs in a process of its own; a row that fails, runs out of memory or exceeds its limit does not
end the report. Rows, JSON and Markdown are on the disk as soon as a row is measured.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.gpu_report import expected_seconds, machine, table, worker
from megatron_ultralong.gpu_report.journal import Journal
from megatron_ultralong.gpu_report.sizes import (
    FULL,
    GROUPS,
    TINY,
    TINY_GPU,
    ExtensionSettings,
    Sizes,
    Work,
    works,
)
from megatron_ultralong.io import atomic_files
from megatron_ultralong.planning.hardware import Gpu, gpu_named

MODELS = (Path("runs/smollm2/base"), Path("examples/demo/base"))
"""In a clone; the first that exists is extended: what examples/smollm2.sh downloaded, or the demo's base."""
PATIENCE, LEAST, LEAST_CPU = 4.0, 120.0, 600.0
"""A row may take this many times its expected seconds, and at least so many, on a GPU and on a CPU."""
END = 2.0
"""Seconds kept for writing the tables."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """A call of `ultralong gpu-report`."""

    out: Path
    minutes: float
    groups: Sequence[str]
    device: str
    """cuda or cpu."""
    scale: str
    """full or tiny."""
    model: Path | None = None
    """Hugging Face directory that is extended; None = one of `MODELS`."""
    retry: bool = False
    """Measure rows again that failed or were not measured."""
    command: str = ""


def run(settings: ReportSettings, say: Callable[[str], None]) -> Path:
    """Measure what is missing and return the path of the Markdown table; `say` is called with lines.

    UserError where the folder is in use or of another machine.
    """
    report = _Report(settings, say)
    try:
        report.check_machine()
        try:
            report.measure()
        finally:
            path = report.write()
    finally:
        report.journal.close()
    return path


class _Report:
    def __init__(self, settings: ReportSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        self.deadline = time.monotonic() + 60 * settings.minutes - END
        self.on_gpu = settings.device == "cuda"
        atomic_files.check_writable(settings.out / "logs", f"--output {settings.out}")
        self.journal = Journal(settings.out)
        if settings.retry:
            self.journal.forget_failures()
        tiny = TINY_GPU if self.on_gpu else TINY
        sizes = FULL if settings.scale == "full" else tiny
        self.works = list(works(sizes, GROUPS, self._extension(sizes)))
        self.gpu: Gpu | None = None

    def _extension(self, sizes: Sizes) -> ExtensionSettings | None:
        settings = self.settings
        model = settings.model or next((path.resolve() for path in MODELS if path.is_dir()), None)
        if model is None:
            if "extension" in settings.groups:
                self.say("extension: not measured without a model; give --model DIR")
            return None
        return ExtensionSettings(
            model=model,
            factor=4 if sizes.full else 2,
            iterations=sizes.iterations,
            batch=4 if sizes.full else 1,
            precision=sizes.precision,
            folder=settings.out / "extension",
        )

    def check_machine(self) -> None:
        """Ask a process for the machine's facts and record them. UserError where it fails."""
        log = self.settings.out / "logs" / "machine.log"
        with _process(worker.check_machine, self.settings.device, log) as (connection, process):
            try:
                facts = connection.recv() if connection.poll(self._left()) else None
            except EOFError:
                facts = None
        if facts is None:
            raise UserError(f"the machine could not be checked; see {log}")
        self.journal.set_machine(facts | {"sizes": self.settings.scale})
        self.gpu = gpu_named(facts["device"]) if self.on_gpu else None
        self.say(f"{facts['device']}, torch {facts['torch']}, attention kernel {facts['kernel']}")
        self.say(machine.missing_line(facts))

    def measure(self) -> None:
        """Run the works; a work continues in a new process after a row that ended the last one."""
        for work in self._selected():
            while rows := self._rows_that_fit(work):
                self._measure(work, rows)

    def expected(self, work: Work, row: str) -> float:
        """Return the seconds of a row, more than it had when it was stopped."""
        seconds = expected_seconds.row(work, row, self.on_gpu, self.gpu)
        return max(seconds, 1.5 * self.journal.stopped.get(work.key(row), 0.0))

    def missing(self) -> dict[str, float]:
        """Return the rows of the selected groups that are not measured, and the seconds each is expected to
        take."""
        return {
            work.key(row): self.expected(work, row)
            for work in self._selected()
            for row in work.rows
            if work.key(row) not in self.journal.rows
        }

    def _selected(self) -> list[Work]:
        return [work for work in self.works if work.group in self.settings.groups]

    def write(self) -> Path:
        """Write the JSON and the Markdown table."""
        return table.write(self.settings.out, self.works, self.journal, self.missing(), self.settings.command)

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _rows_that_fit(self, work: Work) -> list[str]:
        """The missing rows of a work, up to the first that does not fit into the time that is left."""
        left, rows = self._left() - expected_seconds.start(self.on_gpu), []
        for row in (row for row in work.rows if work.key(row) not in self.journal.rows):
            left -= self.expected(work, row)
            if left < 0:
                break
            rows.append(row)
        return rows

    def _measure(self, work: Work, rows: Sequence[str]) -> None:
        """Measure rows in a process until it ends, a row exceeds its limit, or the time is up."""
        name = "".join(c if c.isalnum() else "-" for c in f"{work.group}-{work.name}")
        log = self.settings.out / "logs" / f"{name}.log"
        self.say(f"{work.group}, {work.name}: {len(rows)} rows")
        now, began = rows[0], time.monotonic()
        with _process(worker.measure, work, rows, self.settings.device, log) as (connection, process):
            while True:
                least = LEAST if self.on_gpu else LEAST_CPU
                limit = max(least, PATIENCE * self.expected(work, now)) + expected_seconds.start(self.on_gpu)
                wait = min(began + limit, self.deadline) - time.monotonic()
                if not connection.poll(max(0.0, wait)):
                    self._out_of_time(work.key(now), time.monotonic() - began, limit)
                    return
                try:
                    kind, row, *values = connection.recv()
                except EOFError:  # ended: after the last row, or suddenly
                    break
                if kind == "start":
                    self.journal.start(work.key(row))
                    now, began = row, time.monotonic()
                elif kind == "row":
                    self.journal.row(work.key(row), *values)
                    self.say(
                        f"  {row}: {self.journal.rows[work.key(row)]['figures'].get('note') or 'measured'}"
                    )
                    self.write()
                else:
                    reason, for_all = values
                    for failed in (
                        [r for r in rows if work.key(r) not in self.journal.rows] if for_all else [row]
                    ):
                        self._fail(work.key(failed), f"{reason} (logs/{log.name})")
            process.join(timeout=30.0)
            if work.key(now) not in self.journal.rows:
                self._fail(
                    work.key(now), f"the process ended with exit code {process.exitcode} (logs/{log.name})"
                )

    def _out_of_time(self, key: str, seconds: float, limit: float) -> None:
        if key in self.journal.rows:  # the last row has been measured, and its process does not end
            return
        if seconds < limit:
            self.journal.stop(key, seconds)
            self.say(f"  {key}: stopped after {seconds:.0f} s, the time is up")
        else:
            self._fail(key, f"took longer than {math.ceil(limit)} s")

    def _fail(self, key: str, reason: str) -> None:
        self.journal.failed(key, reason)
        self.say(f"  {key}: failed: {reason}")
        self.write()


@contextlib.contextmanager
def _process(target: Callable[..., None], *args: Any) -> Any:
    """A process that is given a connection and `args`; it and its children are killed at the end of the
    block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    pid = process.pid
    assert pid is not None
    theirs.close()
    try:
        yield ours, process
    finally:
        ours.close()
        for kill in (lambda: os.killpg(pid, signal.SIGKILL), process.kill):
            with contextlib.suppress(OSError):  # it has ended, or is not yet the leader of a group
                kill()
        process.join()
