"""A speed report: a table for the terminal, JSON and a bar chart, each with device, versions, date and
command.

It contains speed and memory of this program, and is unrelated to scores of models (evaluate/).
"""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import torch

from megatron_ultralong import __version__
from megatron_ultralong.io import atomic_files, plot_style
from megatron_ultralong.io.text_table import paragraphs, text_table

RecordRow: TypeAlias = "Callable[[dict[str, Any]], None]"
FORMAT = 1


@dataclass(frozen=True)
class ReportColumn:
    """One figure of every row."""

    key: str
    title: str
    """With the unit."""
    show: Callable[[Any], str] = str
    meaning: str = ""
    higher_is_better: bool | None = None
    """For the plot; None = neither."""


@dataclass(kw_only=True)
class SpeedReport:
    """The rows of one measurement.

    A row is a dict with `name`, `ours` (whether it is this project's code), the columns' keys (None or absent
    = not measured) and, where it has no figures, a `note` that says why.
    """

    kind: str
    about: dict[str, Any]
    columns: Sequence[ReportColumn]
    bars: Sequence[str]
    """Keys of the columns that are drawn."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    record: RecordRow = lambda row: None
    """Called with each row as soon as it is measured."""

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and record it."""
        self.rows.append(row)
        self.record(row)

    def values(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "format": FORMAT,
            "benchmark": self.kind,
            "about": self.about,
            "columns": {c.key: f"{c.title}: {c.meaning}" if c.meaning else c.title for c in self.columns},
            "rows": self.rows,
        }


def about(device: torch.device, command: str, **more: Any) -> dict[str, Any]:
    """Return where and how a measurement runs; `more` are facts of this measurement."""
    gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") if gpu else None,
        "threads": None if gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        **more,
    }


def text(report: SpeedReport) -> str:
    """Return the report as lines for a terminal."""
    # Whole lines: a command is to be copied.
    facts = [f"{name}: {value}" for name, value in report.about.items() if value is not None]
    shown = [c for c in report.columns if any(row.get(c.key) is not None for row in report.rows)]
    rows = [["", *(c.title for c in shown)]]
    for row in report.rows:
        rows.append([row["name"], *("-" if row.get(c.key) is None else c.show(row[c.key]) for c in shown)])
    notes = {number: row["note"] for number, row in enumerate(report.rows, 1) if row.get("note")}
    table = text_table(rows, rule=True, notes=notes)
    meanings = paragraphs(f"{c.title}: {c.meaning}" for c in shown if c.meaning)
    return "\n".join([*facts, "", *table, "", *meanings])


def write_json(report: SpeedReport, path: Path) -> None:
    """Write the report as JSON. Raises UserError if the file cannot be written."""
    atomic_files.write_json(path, report.values())


def plot(report: SpeedReport, path: Path) -> None:
    """Draw one panel of bars per drawn column, without a display; rows without figures are left out. The
    title of a panel says the unit and which direction is better, a legend whose code each bar is.

    Raises UserError if the file cannot be written.
    """
    from matplotlib.patches import Patch

    drawn = [
        c
        for key in report.bars
        for c in report.columns
        if c.key == key and any(row.get(key) is not None for row in report.rows)
    ]
    rows = [row for row in report.rows if any(row.get(c.key) is not None for c in drawn)]
    below = [
        line
        for c in drawn
        if c.meaning
        for line in textwrap.wrap(f"{c.title}: {c.meaning}", 46 * len(drawn) + 40)
    ]
    height = max(2.6, 0.32 * len(rows) + 2.1) + 0.14 * len(below)
    figure = plot_style.new_figure(3.2 + 3.6 * max(1, len(drawn)), height)
    panels = figure.subplots(1, max(1, len(drawn)), squeeze=False, sharey=True)[0]
    for panel, column in zip(panels, drawn, strict=False):
        _draw_bars(panel, column, rows)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    facts = report.about
    heading = ": ".join(filter(None, (report.kind, facts.get("shape"))))
    where = f"{facts['device']}, torch {facts['torch']}, {facts['date']}"
    figure.suptitle(f"{heading}\n{where}", fontsize=9, color=plot_style.INK)
    entries = {"this project": _bar_style(True), "other code, or the reference": _bar_style(False)}
    handles = [Patch(**style) for style in entries.values()]
    handles += [Patch(visible=False)] * len(below)
    figure.legend(
        handles,
        [*entries, *below],
        loc="outside lower left",
        frameon=False,
        fontsize=8,
        labelcolor=plot_style.INK,
    )
    plot_style.save_figure(figure, path)


def _bar_style(ours: bool) -> dict[str, Any]:
    """Of a bar: this project's are dark, others light and hatched."""
    if ours:
        return {"facecolor": plot_style.COLOURS[0], "edgecolor": "white"}
    return {"facecolor": "#d5d9e0", "edgecolor": plot_style.QUIET, "hatch": "///", "linewidth": 0.5}


def _draw_bars(panel: Any, column: ReportColumn, rows: list[dict[str, Any]]) -> None:
    values = [row.get(column.key) for row in rows]
    most = max((value for value in values if value is not None), default=0) or 1
    for at, (row, value) in enumerate(zip(rows, values, strict=True)):
        panel.barh(at, value or 0, **_bar_style(bool(row.get("ours"))))
        label = "not measured" if value is None else column.show(value)
        panel.text((value or 0) + 0.02 * most, at, label, va="center", fontsize=8, color=plot_style.INK)
    panel.set_xlim(0, 1.25 * most)
    better = {True: "\nhigher is better", False: "\nlower is better", None: ""}[column.higher_is_better]
    panel.set_title(f"{column.title}{better}", fontsize=10, color=plot_style.INK)
    panel.tick_params(length=0, colors=plot_style.QUIET, labelsize=8)
    panel.xaxis.set_visible(False)
    for spine in panel.spines.values():
        spine.set_visible(False)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the running code, with a + if files differ from it; None outside a git clone."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():  # an environment in a clone of something else is none of ours
        return None
    try:
        return subprocess.run(
            command, cwd=clone, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
