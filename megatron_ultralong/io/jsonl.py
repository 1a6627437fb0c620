"""JSON-lines files: read them, write them complete, and append to them so that a stopped run can resume."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files

_SYNC_INTERVAL = 1.0  # seconds

Span = tuple[int, int]
"""Offset and length of a line, bytes."""


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file one at a time. UserError names the line that is not an
    object."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                value = json.loads(line) if line.strip() else None
                if value is not None and not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: is not a JSON object")
                if value is not None:
                    yield value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from None


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a file; {} where the file is missing or its first line is not a JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


@contextlib.contextmanager
def complete_file(
    path: Path, header: dict[str, Any], *, flag: str = "--output"
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes one line, after the first line `header`; the file appears at `path` when
    the block ends without an exception.

    flag: the option that chooses the folder, for messages. UserError where another run is writing it. Lines
    are ASCII: a lone surrogate, which data may contain, has no other encoding.
    """
    with atomic_files.whole_file(path, busy=_busy(path, flag)) as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record).encode() + b"\n")

        write(header)
        yield write


class AppendFile:
    """A JSON-lines file that one process at a time appends to.

    Each line is written as soon as `append` is called, so a killed process leaves at most a torn last line,
    which the next opening cuts off. The disk is synced about once per second and on close: a power cut can
    lose no more. A file without lines is removed on close.
    """

    def __init__(
        self,
        path: Path,
        replay: Callable[[int, Span, dict[str, Any]], None],
        *,
        flag: str = "--output",
        ensure_ascii: bool = True,
    ) -> None:
        """Open or create `path` and take its lock.

        replay: called with number (from 1), span and object of each line of the file. flag: the option that
        chooses the folder, for messages. UserError where another process has the file, where a line is not an
        object, or where it cannot be read or written; the file is then as it was.
        """
        self.path, self._flag, self._ensure_ascii = path, flag, ensure_ascii
        self._synced = time.monotonic()
        with self._errors():
            self._file = atomic_files.open_locked(path, _busy(path, flag))
            try:
                self.size = self._replay(replay)
                self._file.truncate(self.size)
            except BaseException:
                self._file.close()
                raise

    def append(self, record: dict[str, Any]) -> Span:
        """Write one line; once this returns, the end of this process cannot lose it."""
        offset = self.size
        line = memoryview(json.dumps(record, ensure_ascii=self._ensure_ascii).encode() + b"\n")
        with self._errors():
            while line:
                written = os.write(self._file.fileno(), line)
                self.size += written
                line = line[written:]
            if time.monotonic() - self._synced > _SYNC_INTERVAL:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        return offset, self.size - offset

    def read(self, span: Span) -> Any:
        """The object of the line at `span`."""
        with self._errors():
            return json.loads(os.pread(self._file.fileno(), span[1], span[0]))

    def close(self, rename_to: Path | None = None) -> None:
        """Sync, rename the file if asked to, and release the lock."""
        with self._errors(), self._file:
            if not self.size and rename_to is None:
                self.path.unlink()
                return
            os.fsync(self._file.fileno())
            if rename_to is not None:
                self.path.replace(rename_to)

    def _replay(self, replay: Callable[[int, Span, dict[str, Any]], None]) -> int:
        """The size of the file without a torn last line."""
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise UserError(
                        f"{self.path}, line {number}: is not a JSON object; remove that line, or choose another {self._flag}"
                    )
                replay(number, (end, len(line)), record)
                end += len(line)
        return end

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise atomic_files.cannot_write(str(self.path), error) from None


class ResumableFile:
    """A context that appends lines to PATH.part, which is renamed to PATH when it ends without an exception.

    `done` contains the lines of earlier runs. A file that was complete before gets its name back in any case.
    """

    def __init__(self, path: Path, keep: tuple[str, ...], *, flag: str = "--output") -> None:
        """path: of the complete file; where it exists, lines are added to it. keep: fields that `done` keeps
        of each line (a prompt of 4M tokens is 16 MB). UserError where it cannot be read or written."""
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.done: list[dict[str, Any]] = []

        def replay(number: int, span: Span, line: dict[str, Any]) -> None:
            self.done.append({name: line[name] for name in keep if name in line})

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._was_complete = path.exists() and not self.part.exists()
            if self._was_complete:
                path.rename(self.part)
        except OSError as error:
            raise atomic_files.cannot_write(str(self.part), error) from None
        self._file = AppendFile(self.part, replay, flag=flag, ensure_ascii=False)

    def add(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._file.append(line)

    def __enter__(self) -> ResumableFile:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._file.close(self.path if error is None or self._was_complete else None)


def _busy(path: Path, flag: str) -> str:
    return f"{path} is being written by another run; wait for it, or choose another {flag}"
