"""What the stages of a benchmark hand on: files of JSON lines, the first of which says what the others were
made from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError

FORMAT = 1
"""Version of these files."""


@contextlib.contextmanager
def writer(path: Path, first: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes lines of JSON, `first` first; the file is there whole at the end, or not at all."""
    staged = path.with_name(f".{path.name}.part")  # one name: what a killed run leaves, the next writes over
    try:
        with staged.open("a", encoding="utf-8", newline="\n") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)

            def write(line: dict[str, Any]) -> None:
                file.write(
                    json.dumps(line) + "\n"
                )  # ASCII: half a surrogate pair, which data may hold, has no other form

            write(first)
            yield write
            file.flush()
            os.fsync(file.fileno())
            staged.replace(path)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another run; wait for it, or choose another --out"
        ) from None
    except BaseException as error:
        staged.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


def made(path: Path, stage: str, *names: str) -> dict[str, Any]:
    """The first line of a stage's output, which says `names`; UserError where there is none."""
    first = head(path)
    if not first or any(name not in first for name in names):
        raise UserError(f"{path} is not there, or is none of this version; run --stage {stage} first")
    return first


def head(path: Path) -> dict[str, Any]:
    """The first line; {} where there is no such file."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    of = first.get("of") if isinstance(first, dict) else None
    return first if isinstance(of, dict) and of.get("format") == FORMAT else {}


def read(path: Path, stage: str, *names: str) -> Iterator[dict[str, Any]]:
    """All lines but the first. UserError where one is none of `stage`, which writes `names` into each."""
    try:
        with path.open(encoding="utf-8") as file:
            next(file, None)
            for number, text in enumerate(file, 2):
                line = json.loads(text)
                if not isinstance(line, dict) or any(name not in line for name in names):
                    raise ValueError(f"line {number} is without {', '.join(names)}")
                yield line
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run --stage {stage} again") from None
