"""The process of one generated program: it gives up its rights, and executes the program.

It is started for every program, so this file and what it imports import little, and of the standard library
alone.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import sys
import types

from megatron_ultralong.evaluate.code_sandbox import seccomp, writes

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read the job (sandbox.run) from stdin and report to stdout, a line on what holds the rules and a line
    on the outcome: "held seccomp,Landlock", then "passed TOKEN" or "failed REASON"."""
    job = marshal.load(sys.stdin.buffer)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)  # the program's own input and output
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    _limit(job["seconds"], job["memory"], job["file_bytes"])
    held = _confine(job["parent"], job["folder"], job["writes"]) if sys.platform == "linux" else []
    os.write(report, f"held {','.join(held)}\n".encode())
    if len(held) < 2 and not job["unconfined"]:
        os._exit(1)
    token = job["token"]
    module = sys.modules["__main__"] = types.ModuleType("__main__")  # where pickle looks for its classes
    try:
        exec(compile(job["program"], "<answer>", "exec"), module.__dict__)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
        os.write(report, f"failed {reason}\n".encode(errors="replace"))
        os._exit(1)
    os.write(report, f"passed {token}\n".encode())
    os._exit(0)


def _confine(parent: int, folder: str, mechanisms: tuple[str, ...]) -> list[str]:
    """Give up what the program may not do; returns what holds it: nothing on other systems than Linux."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return []
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    confined = writes.confine(libc, folder, mechanisms)
    filtered = writes.drop_capabilities(libc) and seccomp.install(libc, os.getpid())
    return (["seccomp"] if filtered else []) + ([confined] if confined else [])


def _limit(seconds: int, memory: int, file_bytes: int) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
