"""Run one Python program that a model generated, as one process that can start threads but no processes.

It works in a temporary folder, and cannot write, rename or remove anything elsewhere, nor change modes,
owners, times or extended attributes of any file. It has no sockets, and no shared memory, semaphores or
message queues of System V or POSIX. It cannot signal another process, read its memory or environment, or
change its priority. Time, memory, threads and files are limited; it has ended when `run` returns, and ends
with the process that called `run`. Files can be read.

The rules are the same for root. Linux holds them (seccomp.py, writes.py); where it cannot, nothing is run
unless `unconfined`. This contains accidents, not an attacker: run untrusted models in a container.
"""

from __future__ import annotations

import marshal
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ultralong.evaluate.code_sandbox import writes

FILE_BYTES = 1 << 20
"""Size of the largest file a program may write."""
FOLDER_BYTES, FILES = 64 << 20, 1000
"""What its folder may contain together."""
THREADS = 256
MECHANISMS = (writes.LANDLOCK, writes.MOUNTS)
"""What may hold the writes, in the order in which it is tried."""
_TICK = 0.05
"""Seconds between two checks of threads and files."""
_REPORT_BYTES = 4096
_START = (
    "import sys; sys.path.insert(0, {root!r}); from megatron_ultralong.evaluate.code_sandbox import program; "
    "del sys.path[0]; program.main()"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a program."""

    passed: bool
    """Whether it ran to its last line."""
    reason: str
    """Why it did not pass: an exception, "out of time", "too many threads", "too many files", "not confined"
    (it was not run), "ended early" (it exited, or was killed for its memory); "" where it passed."""
    held_by: tuple[str, ...] = ()
    """seccomp, and one of MECHANISMS; fewer where it ran unconfined."""


def run(program: str, *, seconds: float = 10.0, memory: int = 4 << 30, unconfined: bool = False) -> Outcome:
    """Run `program`. seconds: limit of the wall time, and rounded up of the CPU time. memory: bytes of
    address space. unconfined: run it also where not all of the module's rules can be held."""
    # The token is reported after the last line: exiting early with exit code 0 does not pass.
    token = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="answer-")
    environment = {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    job = {
        "program": program,
        "token": token,
        "folder": folder,
        "parent": os.getpid(),
        "seconds": int(seconds) + 1,
        "memory": memory,
        "file_bytes": FILE_BYTES,
        "writes": MECHANISMS,
        "unconfined": unconfined,
    }
    try:
        with tempfile.TemporaryFile() as stdin:
            marshal.dump(job, stdin)
            stdin.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START.format(root=str(Path(__file__).parents[3]))],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        with process:
            try:
                report, killed = _watch(process, folder, time.monotonic() + seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        _remove(folder)
    lines = dict(
        line.split(" ", 1) for line in report.decode(errors="replace").split("\n")[:2] if " " in line
    )
    held_by = tuple(name for name in lines.get("held", "").split(",") if name)
    if killed:
        return Outcome(passed=False, reason=killed, held_by=held_by)
    if lines.get("passed") == token:
        return Outcome(passed=True, reason="", held_by=held_by)
    refused = "held" in lines and len(held_by) < 2 and not unconfined
    reason = "not confined" if refused else lines.get("failed", "ended early")
    return Outcome(passed=False, reason=reason, held_by=held_by)


_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def system_v():
    segment = libc.shmget(0, 4096, 0o1600)
    if segment < 0: raise OSError
    libc.shmctl(segment, 0, None)
attempts = {
    "other processes": lambda: os.fork() or os._exit(0),
    "signals": lambda: os.kill(PARENT, 0),
    "memory of other processes": lambda: open(f"/proc/{PARENT}/environ").close(),
    "network and local sockets": lambda: socket.socket(socket.AF_UNIX).close(),
    "System V shared memory": system_v,
    "writes outside": lambda: open(OUTSIDE, "w").close(),
    "modes of files": lambda: os.chmod(OUTSIDE, 0o600),
}
refused = []
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        refused.append(name)
assert len(refused) == len(attempts), ", ".join(name for name in attempts if name not in refused)
"""


def probe() -> Outcome:
    """Try on this machine what a program must not do. `reason` names what was not refused:
    "AssertionError: writes outside, modes of files"; "" where all was."""
    with tempfile.NamedTemporaryFile() as outside:
        values = f"PARENT, OUTSIDE = {os.getpid()}, {outside.name!r}"
        return run(values + _PROBE, unconfined=True)


def _watch(process: subprocess.Popen[bytes], folder: str, deadline: float) -> tuple[bytes, str]:
    """Wait for the end of the process; returns its report, and why it has to be killed or ""."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    report, is_open = b"", True
    while (left := deadline - time.monotonic()) > 0:
        tick = min(left, _TICK)
        if is_open and poll.poll(1000 * tick):
            chunk = os.read(pipe, 1 << 16)
            report, is_open = (report + chunk)[:_REPORT_BYTES], bool(chunk)
        if not is_open:  # it ends, or has closed the pipe
            with suppress(subprocess.TimeoutExpired):
                process.wait(tick)
                return report, ""
        if excess := _excess(process.pid, folder):
            return report, excess
    return report, "out of time"


def _excess(pid: int, folder: str) -> str:
    """Which limit the process exceeds, or ""."""
    with suppress(OSError):  # it has ended
        if len(os.listdir(f"/proc/{pid}/task")) > THREADS:
            return "too many threads"
    files = size = 0
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    size += 512 * entry.stat(follow_symlinks=False).st_blocks
                    if files > FILES or size > FOLDER_BYTES:
                        return "too many files"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:  # a path that is too long to be counted
            return "too many files"
    return ""


def _remove(folder: str) -> None:
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):  # folders nested deeper than Python can follow
        subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)
