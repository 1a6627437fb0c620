"""What a benchmark leaves: a table on the terminal, JSON, and bars as a PNG; each with device, versions, date
and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong import __version__
from megatron_ultralong.errors import UserError

FORMAT = 1
INK, QUIET, BAR, BASELINE = "#1f2430", "#6b7280", "#2166ac", "#b0b7c3"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every row."""

    key: str
    title: str
    """With the unit."""
    show: Callable[[Any], str] = str
    meaning: str = ""


@dataclass(kw_only=True)
class Report:
    """Rows of one benchmark. A row is a dict with `name`, the columns' keys (None or absent = not measured),
    and `note` where it has none; `ours` says whose it is."""

    kind: str
    about: dict[str, Any]
    columns: Sequence[Column]
    bars: Sequence[str]
    """Columns that are drawn."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "format": FORMAT,
            "benchmark": self.kind,
            "about": self.about,
            "columns": {c.key: f"{c.title}: {c.meaning}" if c.meaning else c.title for c in self.columns},
            "rows": self.rows,
        }


def about(device: torch.device, command: str, **more: Any) -> dict[str, Any]:
    """Where and how a benchmark runs; `more` is what is its own."""
    return {
        "device": _device_name(device),
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        **more,
    }


def text(report: Report) -> str:
    """The report as lines for a terminal."""
    facts = [f"{name}: {value}" for name, value in report.about.items() if value is not None]
    shown = [c for c in report.columns if any(row.get(c.key) is not None for row in report.rows)]
    cells = [["", *(c.title for c in shown)]]
    for row in report.rows:
        cells.append([row["name"], *("-" if row.get(c.key) is None else c.show(row[c.key]) for c in shown)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for number, line in enumerate(cells):
        written = "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        note = report.rows[number - 1].get("note") if number else None
        if note:
            empty = all(cell == "-" for cell in line[1:])
            written = f"{line[0].ljust(widths[0])}  {note}" if empty else f"{written}  {note}"
        lines.append(written)
    lines.insert(1, "-" * len(lines[0]))
    meanings = [f"{c.title}: {c.meaning}" for c in shown if c.meaning]
    return "\n".join([*facts, "", *lines, "", *meanings])


def check_files(*files: Path | None) -> None:
    """UserError where a file to be written later has no folder to lie in."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}")


def make_folder(folder: Path) -> None:
    """The folder, or UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from None


def write_json(report: Report, file: Path) -> None:
    """The report as JSON; UserError where the file cannot be written."""
    try:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(report.values(), indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


def plot(report: Report, file: Path) -> None:
    """One panel of bars a drawn column, ours in colour; rows without a figure are left out. Drawn without a
    display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [
        c
        for key in report.bars
        for c in report.columns
        if c.key == key and any(row.get(key) is not None for row in report.rows)
    ]
    rows = [row for row in report.rows if any(row.get(c.key) is not None for c in drawn)]
    figure = Figure(
        figsize=(3.2 + 3.6 * max(1, len(drawn)), max(2.6, 0.32 * len(rows) + 1.6)),
        dpi=150,
        facecolor="white",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(drawn)), squeeze=False, sharey=True)[0]
    for panel, column in zip(panels, drawn, strict=False):
        values = [row.get(column.key) for row in rows]
        panel.barh(
            range(len(rows)),
            [value or 0 for value in values],
            color=[BAR if row.get("ours") else BASELINE for row in rows],
        )
        most = max((value for value in values if value is not None), default=0) or 1
        for at, value in enumerate(values):
            panel.text(
                (value or 0) + 0.02 * most,
                at,
                "-" if value is None else column.show(value),
                va="center",
                fontsize=8,
                color=INK,
            )
        panel.set_xlim(0, 1.25 * most)
        panel.set_title(column.title, fontsize=10, color=INK)
        panel.tick_params(length=0, colors=QUIET, labelsize=8)
        panel.xaxis.set_visible(False)
        for spine in panel.spines.values():
            spine.set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    facts = report.about
    figure.suptitle(
        f"{report.kind}: {facts.get('shape', '')}\n{facts['device']}, torch {facts['torch']}, {facts['date']}; ours in blue",
        fontsize=9,
        color=INK,
    )
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


# ---- how figures are shown ---------------------------------------------------------------------


def milliseconds(value: float) -> str:
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def scientific(value: float) -> str:
    return f"{value:.2e}"


def number(value: float) -> str:
    return f"{value:,.0f}"


def bytes_(value: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def tokens(count: int) -> str:
    """131072 -> 128K."""
    for size, letter in ((1024**2, "M"), (1024, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return f"{count}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the code that runs, with a + where files differ from it; None outside a git clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
