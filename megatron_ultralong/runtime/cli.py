"""How a tool ends: one clear line and exit code 2 for a user's mistake; and which library warnings are
silenced."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from megatron_ultralong.errors import UserError, first_line

_STARTED = (os.getpid(), os.getppid())
_PR_SET_PDEATHSIG = 1


def main(function: Callable[[], int | None]) -> None:
    """Run a tool's `function`; a `UserError` becomes `error: ...` on stderr and exit code 2.

    Under torchrun the first rank of a node with a given error prints it, torchrun's own report repeats it,
    and every rank exits at once: the others raised the same error, or wait in a collective that would delay
    the exit until its timeout. Each other line on stderr names its rank and host.
    """
    end_with_torchrun()
    quiet()
    plain = sys.stderr
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stderr = RankLines(plain, f"[rank {os.environ['RANK']} on {socket.gethostname()}] ")  # type: ignore[assignment]
    try:
        code = function() or 0
        if sys.stdout is not None:  # closed by the shell: >&-
            sys.stdout.flush()
    except UserError as error:
        record(f"error: {error}")
        if first_to_say(str(error)):
            print(f"error: {error}", file=plain, flush=True)
        leave(2)
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        leave(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            leave(128 + signal.SIGPIPE)  # as where nothing catches the signal
        details = traceback.format_exc()
        problem = transformer_engine_problem() if "transformer_engine" in details else None
        if problem is not None:
            record(f"error: {problem}")
            if first_to_say(problem):
                print(f"error: {problem}", file=plain, flush=True)
            leave(2)
        for act in _before_failing:
            act()
        record(details)
        sys.stderr.write(details)
        leave(1)
    sys.exit(code)


def _reader_has_left() -> bool:
    """Whether nobody reads standard output any longer, as after `| head`. Never of a rank, whose error is
    always reported."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    output = select.poll()
    try:
        output.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file, or a closed one
        return False
    return any(event & select.POLLERR for _, event in output.poll(0))


def end_with_torchrun() -> None:
    """Have Linux send this rank SIGTERM when its torchrun ends; does nothing outside torchrun or Linux.

    A torchrun that is killed would leave its ranks running beside those of the next one. To be called before
    torch is imported, which takes seconds: a rank that lost its torchrun waits minutes for the other ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    process, parent = _STARTED  # another process where this module was imported before a fork
    if process == os.getpid() and parent != os.getppid():  # torchrun has ended already
        os.kill(os.getpid(), signal.SIGTERM)


_before_failing: list[Callable[[], None]] = []


def before_failing(act: Callable[[], None]) -> None:
    """Call `act` before a rank ends with an error that is not a user's. It may end the process itself, with
    an error that says more."""
    _before_failing.append(act)


class RankLines:
    """A text stream whose lines begin with `name`, but for those that a progress bar writes over."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._at_start = stream, name, True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        for i, line in enumerate(lines):
            if self._at_start and not line.startswith("\r"):
                lines[i] = self._name + line
            self._at_start = line.endswith("\n")
        self._stream.write("".join(lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def transformer_engine_problem() -> str | None:
    """Return in one line what to change if TransformerEngine is installed without its PyTorch part, or None.

    Megatron-Core cannot be imported then: it takes an installed TransformerEngine for a complete one.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return (
            f"TransformerEngine is installed without a PyTorch part that works here ({first_line(error)}); "
            "pip install 'transformer-engine[pytorch]', or pip uninstall transformer-engine"
        )
    return None


def quiet() -> None:
    """Silence library warnings that a user cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch)\.")
    # The distributed optimizer reads .grad of its shards, which are views.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def leave(code: int) -> None:
    """Exit without waiting for other ranks, and end the child processes, which would keep the output open."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None where the shell closed it
            stream.flush()
    os._exit(code)


def record(text: str) -> None:
    """Write the file from which torchrun reports why a rank failed (torch.distributed.elastic's format)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": said}, file)


def first_to_say(line: str) -> bool:
    """Whether no other rank of the same torchrun on this node has printed `line`; the rank that creates a
    marker file prints it."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return True
    key = hashlib.sha256(
        f"{run} {os.getppid()} {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {line}".encode()
    ).hexdigest()[:32]
    marker = os.path.join(tempfile.gettempdir(), f"megatron_ultralong-error-{key}")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(marker) > 600:  # left by an old run with the same ids
                os.utime(marker)
                return True
        return False
    except OSError:
        return True
