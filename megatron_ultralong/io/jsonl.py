"""JSON lines that a stopped run goes on with: written to PATH.part one at a time, renamed to PATH when all
are there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ultralong.errors import UserError


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one at a time. UserError names the line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                value = json.loads(line) if line.strip() else None
                if value is not None and not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: is no JSON object")
                if value is not None:
                    yield value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from None


class Writer:
    """Adds lines to a file that is not whole yet.

    `done` holds what an earlier run wrote. A line is in the file once `add` returns; half a line, of a killed
    run, is cut off.
    """

    def __init__(self, path: Path, keep: tuple[str, ...]) -> None:
        """path: of the finished file; where it is already there, its lines are gone on with. keep: fields of
        `done`'s objects (a prompt of 4M tokens is 16 MB). UserError where it cannot be read or written."""
        self.path, self.part = path, path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._had_name = path.exists() and not self.part.exists()
            if self._had_name:
                path.rename(self.part)
            self._file = self.part.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(_whole(self._file))
            self.done = [{name: line[name] for name in keep if name in line} for line in read(self.part)]
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self.part} is being written by another run; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{self.part} cannot be written: {error.strerror or error}") from None

    def add(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part} cannot be written: {error.strerror or error}") from None

    def finish(self) -> None:
        """The file gets its name."""
        os.fsync(self._file.fileno())
        self._had_name = True
        self.close()

    def close(self) -> None:
        """Ends the writing; a file that was finished before has its name again, whatever happened since, and
        an empty one goes."""
        self._file.close()
        if self._had_name and self.part.exists():
            self.part.replace(self.path)
        elif self.part.exists() and not self.part.stat().st_size:
            self.part.unlink()


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**20)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
