"""Runs jobs, several at a time, each in a process of its own with a log.

A job's folder has `settings.json` from its start on, and `done.json` once all its commands are complete. The
same grid therefore skips finished jobs and resumes stopped ones; a job whose settings changed starts anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from megatron_ultralong.ablate import plan
from megatron_ultralong.ablate.plan import Job, Places, Step
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files, workers

LOG, SETTINGS, DONE = "log.txt", "settings.json", "done.json"
PATIENCE = 60.0
"""Seconds that stopped jobs have to save a checkpoint."""


def state(job: Job) -> str:
    """finished, stopped (resumes), changed (starts anew) or new."""
    stored = _read(job.folder / SETTINGS)
    if stored is None:
        return "new"
    if not plan.equal(job.settings, stored):
        return "changed"
    complete = all(step.makes.exists() or _is_checkpoint(step, job) for step in job.steps)
    return "finished" if complete and (job.folder / DONE).is_file() else "stopped"


def run(places: Places, jobs: int, say: Callable[[str], None]) -> list[str]:
    """Make files and rows, then run the cells. Returns the names of the cells that failed. UserError where a
    file or rows cannot be made."""
    with _locked(places.out), _sigterm_as_interrupt():
        for stage in (plan.file_jobs, plan.data_jobs):
            failed = run_jobs(stage(places), places, jobs, say)
            if failed:
                raise UserError(f"{failed[0]} failed")
        plan.check(places)  # again, with the base model, which may be one of the files
        return run_jobs([job for _, job in plan.cell_jobs(places)], places, jobs, say)


def run_jobs(todo: Sequence[Job], places: Places, jobs: int, say: Callable[[str], None]) -> list[str]:
    """Run the jobs that are not finished, `jobs` at a time; return the names of those that failed. The others
    are run all the same."""
    states = {job.name: state(job) for job in todo}
    waiting = [job for job in todo if states[job.name] != "finished"]
    if len(waiting) < len(todo):
        say(f"{len(todo) - len(waiting)} of {len(todo)} finished before")
    failed: list[str] = []
    running: dict[Any, tuple[Job, Any, float]] = {}  # by sentinel
    number = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                if states[job.name] == "changed":
                    say(f"{job.name}: settings changed, starts anew")
                process = _start(job, places)
                running[process.sentinel] = (job, process, time.time())
            for sentinel in connection.wait(list(running)):
                job, process, began = running.pop(sentinel)
                process.join()
                number += 1
                if process.exitcode == 0 and (job.folder / DONE).is_file():
                    say(f"{job.name}: {time.time() - began:.0f} s ({len(waiting) + len(running)} left)")
                else:
                    failed.append(job.name)
                    say(f"{job.name}: failed: {_reason(job.folder / LOG)}; log: {job.folder / LOG}")
    except BaseException:
        _stop([process for _, process, _ in running.values()])
        raise
    return failed


def _start(job: Job, places: Places) -> Any:
    """Start a job's process. Its folder is emptied first where the settings changed."""
    if state(job) in ("new", "changed"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(job.folder)
        for step in job.steps:  # a file beside the folder
            _remove(step.makes)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / DONE).unlink(missing_ok=True)
    atomic_files.write_json(job.folder / SETTINGS, job.settings)
    process = get_context("spawn").Process(target=_execute, args=(job, places.out))
    process.start()
    return process


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stop(processes: list[Any]) -> None:
    """Ask the processes to stop, and end those that do not."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()


def _is_checkpoint(step: Step, job: Job) -> bool:
    """Whether a step makes a checkpoint, which is removed when the job is complete."""
    return step.words[0] == "train" and (job.folder / DONE).is_file()


# ---- in the process of a job -----------------------------------------------------------------------


def _execute(job: Job, out: Path) -> None:
    """Run the commands of a job that are not complete, and exit with the code of the first that fails."""
    workers.end_with_main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(log, number)
    began = time.time()
    for step in job.steps:
        if step.makes.exists():
            continue
        program = "python" if step.words[0].endswith(".py") else "ultralong"
        print(f"$ {program} {' '.join(step.words)}", flush=True)
        step.makes.parent.mkdir(parents=True, exist_ok=True)
        _command(step)
        if not step.makes.exists():
            print("error: stopped before it was complete", flush=True)
            sys.exit(3)
    for step in job.steps:
        if step.words[0] == "train":
            shutil.rmtree(step.makes.parent)
    times = os.times()
    used = times.user + times.system + times.children_user + times.children_system
    seconds = {"seconds": round(time.time() - began, 1), "cpu_seconds": round(used, 1)}
    atomic_files.write_json(job.folder / DONE, seconds)


def _command(step: Step) -> None:
    """Run one command as `ultralong NAME ...` or `python SCRIPT ...` does, in this process, which has
    imported the libraries once for all commands."""
    name, *arguments = step.words
    if name == "untrained":
        from megatron_ultralong.ablate import untrained
        from megatron_ultralong.runtime import cli

        base, out, recipe, *settings = arguments
        try:
            cli.quiet()
            untrained.write(Path(base), Path(out), recipe, settings)
        except UserError as error:
            sys.exit(f"error: {error}")
        return
    folder = str(Path(name).parent)
    sys.path.insert(0, folder)
    try:
        if name.endswith(".py"):
            sys.argv = [name, *arguments]
            runpy.run_path(name, run_name="__main__")
        else:
            sys.argv = ["ultralong", name, *arguments]
            runpy.run_module("megatron_ultralong", run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.path.remove(folder)


# ---- small parts -----------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _reason(log: Path) -> str:
    """The last line of a log that names an error; otherwise the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if "rror:" in line]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ").strip()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    atomic_files.check_writable(out, f"--output {out}")
    with atomic_files.open_locked(out / ".lock", f"--output {out} is in use by another run"):
        yield


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Stop jobs on SIGTERM as on Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
