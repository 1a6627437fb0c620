"""A journal of finished requests: JSON lines that are only ever added, so that a run that was killed asks
nothing twice.

    {"journal": "refine", "format": 1, ...}                      the first line, which may also say what the lines are of
    {"key": "...", ...}                                          one a finished request; several may have the same key

A line reaches the file in one write as soon as it is there, so a killed process leaves at most half a line,
which the next run cuts off. The disk is waited for once a second and at the end: what a power cut can take.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError

FORMAT = 1
_SYNC_EVERY = 1.0  # seconds


class Journal:
    """An open journal, locked against other processes. Memory: where each line stands, not what it says."""

    def __init__(
        self,
        path: Path,
        forget: str | None = None,
        kind: str = "refine",
        of: dict[str, Any] | None = None,
        flag: str = "--output",
    ) -> None:
        """Opens or creates it; lines that have the field `forget` are as if they were not there. of: plain
        values that its first line says, and must say. flag: the option that names its place. UserError where
        another process has it, where it is of something else, or where it is no journal or cannot be read or
        written."""
        self.path, self._flag = path, flag
        self._header = {"journal": kind, "format": FORMAT, **json.loads(json.dumps(of or {}))}
        self.tokens_in, self.tokens_out = 0, 0
        """Of every line, whatever run and settings it is of."""
        self._forget = forget
        self._lines: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        """Offset and length of the lines of a key."""
        with self._errors():
            self._file = _locked(path, flag)
            try:
                self._end = self._load()
            except BaseException:
                os.close(self._file)
                raise
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def get(self, key: str) -> list[dict[str, Any]]:
        """The lines of a key, oldest first."""
        with self._errors():
            return [
                json.loads(os.pread(self._file, length, offset))
                for offset, length in self._lines.get(key, ())
            ]

    def add(self, record: dict[str, Any]) -> None:
        """Append one line; once this returns, no end of this process loses it."""
        with self._errors():
            if not self._end:
                self._write(self._header)
            offset = self._end
            self._write(record)
            self._note(record, offset, self._end - offset)
            if time.monotonic() - self._synced > _SYNC_EVERY:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Leaves the lock; a journal in which nothing stands is removed."""
        with self._errors():
            try:
                if self._end:
                    os.fsync(self._file)
                else:
                    self.path.unlink()
            finally:
                os.close(self._file)

    def _load(self) -> int:
        """Notes where every line stands and cuts a half line off; returns the size that is left."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    whole = self._is_header(record) if number == 1 else isinstance(record["key"], str)
                except UserError:
                    raise
                except (ValueError, TypeError, KeyError, AttributeError):
                    whole = False
                if not whole:
                    what = (
                        f"is no journal of format {FORMAT}; remove it"
                        if number == 1
                        else "is broken; remove that line"
                    )
                    raise UserError(f"{self.path}, line {number}: {what}, or choose another {self._flag}")
                if number > 1 and self._forget not in record:
                    self._note(record, end, len(line))
                end += len(line)
        os.ftruncate(self._file, end)
        return end

    def _is_header(self, record: dict[str, Any]) -> bool:
        """UserError where it is one, of something else."""
        if any(record[name] != self._header[name] for name in ("journal", "format")):
            return False
        if different := _different(record, self._header):
            name, there, here = different
            raise UserError(
                f"{self.path} is of {name} {there}, not {here}; remove it, or choose another {self._flag}"
            )
        return True

    def _note(self, record: dict[str, Any], offset: int, length: int) -> None:
        self._lines[record["key"]].append((offset, length))
        self.tokens_in += record.get("tokens_in", 0)
        self.tokens_out += record.get("tokens_out", 0)

    def _write(self, record: dict[str, Any]) -> None:
        line = memoryview(json.dumps(record).encode() + b"\n")
        while line:
            written = os.write(self._file, line)
            self._end += written
            line = line[written:]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used: {error.strerror or error}") from None


def _different(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first value in which two headers differ: its name and both values, as JSON."""
    for name in {**here, **there}:
        a, b = there.get(name), here.get(name)
        if a != b:
            inner = _different(a, b) if isinstance(a, dict) and isinstance(b, dict) else None
            return (
                (f"{name}.{inner[0]}", *inner[1:])
                if inner
                else (name, json.dumps(a, ensure_ascii=False), json.dumps(b, ensure_ascii=False))
            )
    return None


def _locked(path: Path, flag: str) -> int:
    """A descriptor that has the file alone."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it in between, when nothing stood in it.
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"{path} is in use by another run; wait for it, or choose another {flag}"
            ) from None
        os.close(file)
