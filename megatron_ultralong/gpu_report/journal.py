"""What has been measured, in DIR/rows.jsonl: one line for each event, so that a killed report resumes.

{"event": "machine", ...}                     the facts of gpu_report/machine.py
{"event": "start", "row": KEY}                a row has been started
{"event": "row", "row": KEY, "figures": {}, "predicted": {}, "date": ..., "commit": ...}
{"event": "failed", "row": KEY, "reason": ..., "date": ..., "commit": ...}
{"event": "stopped", "row": KEY, "seconds": N}  the time of this call was up after N seconds
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.jsonl import AppendFile

STARTS = 2
"""A row during which the whole program ended this often, killed by its own memory for example, is not started
again."""
SAME = ("device", "torch", "sizes")
"""Facts in which all rows of a folder agree."""


class Journal:
    """The events of a folder, read and appended to by one process at a time."""

    def __init__(self, folder: Path) -> None:
        """UserError where another process has the folder, or its file cannot be read or written."""
        self.machine: dict[str, Any] = {}
        """The newest facts."""
        self.rows: dict[str, dict[str, Any]] = {}
        """The event "row" or "failed" of each row that has ended."""
        self.stopped: dict[str, float] = {}
        """Seconds that rows had taken when their time was up."""
        self._starts: dict[str, int] = {}
        self._file = AppendFile(folder / "rows.jsonl", lambda number, span, event: self._replay(event))
        for key, starts in self._starts.items():
            if starts >= STARTS and key not in self.rows:
                self.failed(key, f"the program ended during this row {starts} times")

    def set_machine(self, facts: dict[str, Any]) -> None:
        """Record the machine. UserError where earlier rows are of another one."""
        for name in SAME:
            before, now = self.machine.get(name), facts[name]
            if self.machine and before != now:
                raise UserError(
                    f"{self._file.path} has rows measured with {name} {before}, and this is {now}; choose another --output"
                )
        self._append({"event": "machine", **facts})

    def start(self, key: str) -> None:
        self._append({"event": "start", "row": key})

    def row(self, key: str, figures: dict[str, Any], predicted: dict[str, float]) -> None:
        """Record the figures of a row, and what was predicted, by the same keys."""
        event = {"event": "row", "row": key, "figures": figures, "predicted": predicted}
        self._append(event | self._when())

    def failed(self, key: str, reason: str) -> None:
        self._append({"event": "failed", "row": key, "reason": reason} | self._when())

    def stop(self, key: str, seconds: float) -> None:
        """Record that a row did not end in the time that was left."""
        self._append({"event": "stopped", "row": key, "seconds": seconds})

    def forget_failures(self) -> None:
        """Make rows that failed or were not measured missing again."""
        self._append({"event": "retry"})

    def close(self) -> None:
        self._file.close()

    def _when(self) -> dict[str, Any]:
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return {"date": date, "commit": self.machine.get("commit")}

    def _append(self, event: dict[str, Any]) -> None:
        self._file.append(event)
        self._replay(event)

    def _replay(self, event: dict[str, Any]) -> None:
        kind, key = event["event"], event.get("row", "")
        if kind == "machine":
            self.machine = {name: value for name, value in event.items() if name != "event"}
        elif kind == "start":
            self._starts[key] = self._starts.get(key, 0) + 1
        elif kind in ("row", "failed"):
            self.rows[key] = event
        elif kind == "stopped":
            self.stopped[key], self._starts[key] = event["seconds"], 0
        elif kind == "retry":
            for name in [name for name, ended in self.rows.items() if is_failure(ended)]:
                del self.rows[name]
                self._starts.pop(name, None)


def is_failure(ended: dict[str, Any]) -> bool:
    """Return whether the event is not one of a row with figures."""
    return ended["event"] == "failed" or "note" in ended["figures"]
