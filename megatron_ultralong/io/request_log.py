"""A log of finished requests, so that a resumed run repeats none of them.

{"journal": "refine", "format": 1, ...}     header: the kind, and values common to all requests
{"key": "...", ...}                         one per finished request; keys may repeat
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.jsonl import AppendFile, Span

FORMAT = 1


class RequestLog:
    """An open log, locked against other processes. Memory: the position of each line, not its content."""

    def __init__(
        self,
        path: Path,
        *,
        kind: str = "refine",
        of: dict[str, Any] | None = None,
        forget: str | None = None,
        flag: str = "--output",
    ) -> None:
        """Open or create a log.

        of: plain values that a new log's header gets, and that an existing log's header must contain. forget:
        lines with this field are ignored. flag: the option that chooses its folder, for messages. UserError
        where another process has it, where its header differs, or where it is not a log or cannot be read or
        written."""
        self.path, self._flag, self._forget = path, flag, forget
        self._header = {"journal": kind, "format": FORMAT, **json.loads(json.dumps(of or {}))}
        self.tokens_in, self.tokens_out = 0, 0
        """Sums over all lines, of any run."""
        self._spans: defaultdict[str, list[Span]] = defaultdict(list)
        """The lines of each key."""
        self._file = AppendFile(path, self._replay, flag=flag)

    def __len__(self) -> int:
        return sum(map(len, self._spans.values()))

    def get(self, key: str) -> list[dict[str, Any]]:
        """The lines of a key, oldest first."""
        return [self._file.read(span) for span in self._spans.get(key, ())]

    def add(self, record: dict[str, Any]) -> None:
        """Append one line; once this returns, the end of this process cannot lose it."""
        if not self._file.size:
            self._file.append(self._header)
        self._note(record, self._file.append(record))

    def close(self) -> None:
        """Release the lock; an empty log is removed."""
        self._file.close()

    def _replay(self, number: int, span: Span, record: dict[str, Any]) -> None:
        if number == 1:
            self._check_header(record)
        elif not isinstance(record.get("key"), str):
            raise UserError(
                f"{self.path}, line {number}: has no key; remove that line, or choose another {self._flag}"
            )
        elif self._forget not in record:
            self._note(record, span)

    def _check_header(self, header: dict[str, Any]) -> None:
        advice = f"remove it, or choose another {self._flag}"
        if any(header.get(name) != self._header[name] for name in ("journal", "format")):
            raise UserError(
                f"{self.path} is not a {self._header['journal']} log of format {FORMAT}; {advice}"
            )
        if different := _difference(header, self._header):
            name, theirs, ours = different
            raise UserError(f"{self.path} was written with {name} {theirs}, not {ours}; {advice}")

    def _note(self, record: dict[str, Any], span: Span) -> None:
        self._spans[record["key"]].append(span)
        self.tokens_in += record.get("tokens_in", 0)
        self.tokens_out += record.get("tokens_out", 0)


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first value in which two headers differ: its name and both values, as JSON."""
    for name in {**ours, **theirs}:
        a, b = theirs.get(name), ours.get(name)
        if a != b:
            inner = _difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else None
            return (
                (f"{name}.{inner[0]}", *inner[1:])
                if inner
                else (name, json.dumps(a, ensure_ascii=False), json.dumps(b, ensure_ascii=False))
            )
    return None
