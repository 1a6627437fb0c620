"""Progress of long work: a bar on a terminal, a line now and then in a log file, and nothing on other ranks
than the first."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any

from tqdm import tqdm

INTERVAL = 60.0
"""Seconds between two lines of a log file; work that takes less has none."""


def progress_bar(
    description: str,
    total: int | None = None,
    unit: str = "it",
    *,
    initial: int = 0,
    hidden: bool = False,
    leave: bool = True,
) -> Any:
    """Return a bar as tqdm's, on standard error: a context with `update(n)`, `write(line)`,
    `set_postfix(**values)` and `close()`.

    total: in `unit`s; None = not known. "B" counts bytes, and large numbers are shortened. initial: what an
    earlier run has done. hidden: show nothing. leave: keep the bar of a terminal when it is complete.
    """
    first = os.environ.get("RANK", "0") == "0"  # torchrun's; all ranks of a node may have the same terminal
    if hidden or not first or sys.stderr.isatty():
        return tqdm(
            total=total,
            desc=description,
            unit=unit,
            unit_scale=unit in ("B", "token"),
            initial=initial,
            disable=hidden or not first,
            leave=leave,
        )
    return LineProgress(description, total, unit, initial)


def counted(
    items: Iterable[Any], description: str, unit: str, *, total: int | None = None, hidden: bool = False
) -> Iterator[Any]:
    """Yield the items under a bar. total: their number, where they do not have one."""
    size = len(items) if total is None and isinstance(items, Sized) else total
    with progress_bar(description, size, unit, hidden=hidden) as bar:
        for item in items:
            yield item
            bar.update(1)


class LineProgress:
    """Progress as lines, at most one per INTERVAL, and a last one if there was any."""

    def __init__(self, description: str, total: int | None, unit: str, initial: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.initial = self.n = initial
        self.postfix = ""
        self._began = self._printed = time.monotonic()
        self._last: tuple[int, str] | None = None

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self.n += n
        now = time.monotonic()
        if now - self._printed >= INTERVAL:
            self._printed = now
            self._print(now)

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        """Set further figures, at the end of a line. refresh: as tqdm's; a line is never printed for them."""
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def write(self, line: str) -> None:
        """Print a line of its own on standard output, as tqdm does."""
        print(line, flush=True)

    def close(self) -> None:
        """Print the last line where others came before it."""
        if self._last not in (None, (self.n, self.postfix)):
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._last = self.n, self.postfix
        seconds, done = now - self._began, self.n - self.initial
        of = f" of {self._number(self.total)}" if self.total else ""
        share = f" ({self.n / self.total:.0%})" if self.total else ""
        left = ""
        if self.total and done and self.n < self.total:
            left = f", {_duration(seconds * (self.total - self.n) / done)} left"
        print(
            f"{self.description}: {self._number(self.n)}{of} {_plural(self.unit)}{share}, {_duration(seconds)} elapsed"
            f"{left}{self.postfix}",
            file=sys.stderr,
            flush=True,
        )

    def _number(self, count: int) -> str:
        return f"{count / 1e6:,.1f}" if self.unit == "B" else f"{count:,}"


def _plural(unit: str) -> str:
    return {"B": "MB", "it": "iterations"}.get(unit, f"{unit}s")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
