"""Run one Python program that a model generated, in a separate process with limits.

Time, memory and file sizes are limited; it works in a temporary folder, without network, and cannot write
outside that folder; it and all processes that it started are killed when `run` returns. The last three need
Linux (user, network and process namespaces; Landlock); where a machine does not allow them, the outcome says
so. Files can be read. This contains accidents, not an attacker: run untrusted models in a container.

This file is also the program of that process, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

FILE_BYTES = 1 << 20
"""Size of the largest file a program may write."""
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a program."""

    passed: bool
    """Whether it ran to its last line."""
    reason: str
    """Why it did not pass: an exception, "out of time", "ended early" (it exited, or was killed for its
    memory); "" where it passed."""
    network_off: bool = False
    writes_confined: bool = False
    """Whether it could write only in its own folder."""


def run(program: str, *, seconds: float = 10.0, memory: int = 4 << 30) -> Outcome:
    """Run `program`. seconds: limit of the wall time, and rounded up of the CPU time. memory: bytes of
    address space."""
    # The token is reported after the last line: exiting early with exit code 0 does not pass.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="answer-") as folder, tempfile.TemporaryFile() as report:
        job = {
            "program": program,
            "token": token,
            "seconds": int(seconds) + 1,
            "memory": memory,
            "folder": folder,
        }
        environment = {
            "PATH": os.defpath,
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        reported: dict[str, Any] = {}
        for line in report.read(1 << 16).splitlines():
            with suppress(ValueError, TypeError):
                reported |= json.loads(line)
    passed = reported.get("token") == token
    reason = "" if passed else "out of time" if late else str(reported.get("error") or "ended early")
    return Outcome(
        passed=passed,
        reason=reason,
        network_off=bool(reported.get("network_off")),
        writes_confined=bool(reported.get("writes_confined")),
    )


# ---- in the process ----------------------------------------------------------------------------


def _child() -> None:
    job = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    libc = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform == "linux"
    isolated = linux and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID) == 0
    # The first process of its own namespace: all processes that it started die with it, including those that
    # left the group.
    inner = os.fork()
    if inner:
        os.waitpid(inner, 0)
        return
    if linux:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _report(report, network_off=isolated, writes_confined=linux and _confine(libc, job["folder"]))
    for limit, value in (
        (resource.RLIMIT_CPU, job["seconds"]),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        exec(compile(job["program"], "<answer>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        _report(report, error=f"{type(error).__name__}: {error}"[:300])
        os._exit(1)
    _report(report, token=job["token"])
    os._exit(0)


def _report(report: int, **values: Any) -> None:
    os.write(report, json.dumps(values).encode() + b"\n")


def _confine(libc: Any, folder: str) -> bool:
    """From now on only files below `folder` can be written, created or removed (Linux's Landlock); False
    where the kernel does not support it."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    # Write (bit 1), remove (4, 5), create (6-12); from version 2 on also link and move (13), from version 3
    # on truncate (14).
    rights = (
        1 << 1
        | sum(1 << bit for bit in range(4, 13))
        | (1 << 13 if version >= 2 else 0)
        | (1 << 14 if version >= 3 else 0)
    )
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", rights), ctypes.c_size_t(8), ctypes.c_uint(0))
    place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    added = (
        libc.syscall(
            _LANDLOCK_ADD,
            ctypes.c_int(rules),
            ctypes.c_int(1),
            struct.pack("=Qi", rights, place),
            ctypes.c_uint(0),
        )
        == 0
    )
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(added) and libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)) == 0


if __name__ == "__main__":
    _child()
