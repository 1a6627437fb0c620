"""One run at a time in a run directory: two would remove each other's checkpoints while they are written."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files

FILE = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def locked(save: Path) -> Iterator[str | None]:
    """Hold the lock of a run directory, created if missing; rank 0 calls it. The lock of a process that has
    ended is free.

    Yields a line to print where the file system has no locks, else None. UserError where another run holds
    it: it says on which host, as which process and since when.
    """
    atomic_files.check_writable(save, f"--save {save}")
    path = save / FILE
    try:
        file = path.open("a+")
    except OSError as error:
        raise atomic_files.cannot_write(f"--save {save}", error) from None
    with file:
        note = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(save) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise atomic_files.cannot_write(f"--save {save}", error) from None
            note = f"note: the file system of {save} has no locks; never start two runs with this --save"
        with contextlib.suppress(OSError):  # a full disk; the lock itself holds
            file.truncate(0)
            json.dump(
                {
                    "host": socket.gethostname(),
                    "process": os.getpid(),
                    "since": datetime.datetime.now().isoformat(" ", "seconds"),
                },
                file,
            )
            file.flush()
        yield note


def check_free(save: Path) -> None:
    """UserError where another run holds the lock. Nothing is written, and the lock is not kept."""
    try:
        with (save / FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(save) from None
    except OSError:  # no run directory yet, or a file system without locks
        return


def _in_use(save: Path) -> UserError:
    owner = _owner(save / FILE)
    return UserError(
        f"--save {save} is in use by another run ({owner}); stop that one, or use another --save"
    )


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"host {owner['host']}, process {owner['process']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its host is not recorded"
