"""Figures of several models: perplexity over position, a score over length, tables. Drawn without a
display."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, short_count
from megatron_ultralong.evaluate.report.heat_map import INK, QUIET, save_figure

COLOURS = ("#1f5fa8", "#d1702a", "#2f8f5b", "#8e4fa8", "#b23a48", "#6b7280", "#0f8b8d", "#a67c00")
MARKERS = "osD^vPX*"
UNNAMED = "unnamed model"
"""The name of a model that a result does not record."""


def perplexity_by_position(results: list[BenchmarkResult], path: Path) -> None:
    """Write a PNG of perplexity results that pass `check`, each at its greatest length: by powers of two, and
    by sixteenths of the length.

    Where they were measured on different texts, the legend names these. UserError where `path` cannot be
    written.
    """
    texts, names = [text_of(result) for result in results], model_names([result.model for result in results])
    figure, (left, right) = _figure(2, "Perplexity by position")
    ends: set[int] = set()
    for i, result in enumerate(results):
        length = max(map(int, result.extra["by_length"]))
        summary = result.extra["by_length"][str(length)]
        ends |= {bucket["to"] for bucket in summary["by_position"]}
        text = f", {texts[i]}" if len(set(texts)) > 1 else ""
        style = _style(i, f"{names[i]}, {short_count(length)}{text}")
        buckets = [bucket for bucket in summary["by_position"] if bucket["perplexity"] is not None]
        left.plot([bucket["to"] for bucket in buckets], [bucket["perplexity"] for bucket in buckets], **style)
        buckets = [bucket for bucket in summary["by_sixteenth"] if bucket["perplexity"] is not None]
        right.plot(
            [(bucket["from"] + bucket["to"]) / 2 / length * 100 for bucket in buckets],
            [bucket["perplexity"] for bucket in buckets],
            **style,
        )
    _length_axis(left, sorted(ends))
    left.set_xlabel("tokens of context, up to", color=QUIET)
    right.set_xlabel("position, % of the length", color=QUIET)
    left.set_ylabel("perplexity", color=QUIET)
    _finish(figure, path, [left, right])


def score_by_length(
    lines: dict[str, dict[int, float]], path: Path, *, heading: str, axis: str, footnotes: list[str]
) -> None:
    """Write a PNG with one line per model: {name: {length: score}}. UserError where `path` cannot be
    written."""
    figure, (panel,) = _figure(1, heading)
    if footnotes:
        below = [wrapped for line in footnotes for wrapped in textwrap.wrap(line, 115)]
        figure.set_figheight(figure.get_figheight() + 0.12 * len(below))
        figure.supxlabel("\n".join(below), x=0.02, ha="left", fontsize=6.5, color=QUIET)
    for i, (name, points) in enumerate(lines.items()):
        panel.plot(sorted(points), [points[length] for length in sorted(points)], **_style(i, name))
    _length_axis(panel, sorted({length for points in lines.values() for length in points}))
    panel.set_xlabel("tokens", color=QUIET)
    panel.set_ylabel(axis, color=QUIET)
    _finish(figure, path, [panel])


def table(
    heading: str,
    columns: list[str],
    rows: list[tuple[str, list[str], bool]],
    path: Path,
    footnotes: list[str],
) -> None:
    """Write a PNG of a table. rows: (name, cells, whether it is published, which is drawn grey and italic).
    UserError where `path` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = max(len("model"), *(len(name) for name, _, _ in rows)) * 0.075 + 0.3
    widths = [max(0.75, len(column) * 0.085 + 0.2) for column in columns]
    width = first + sum(widths) + 0.4
    below = [
        wrapped
        for line in footnotes
        for wrapped in textwrap.wrap(line, int((width - 0.4) / 0.063), subsequent_indent="   ")
    ]
    height = 0.27 * (len(rows) + 1) + 0.75 + 0.16 * len(below)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.2 / width, 1 - 0.28 / height, heading, fontsize=12, fontweight="bold", color=INK, va="center"
    )
    rights = [(0.2 + first + sum(widths[: i + 1])) / width for i in range(len(columns))]
    for i, (name, cells, quiet) in enumerate([("model", columns, False), *rows]):
        y = 1 - (0.68 + 0.27 * i) / height
        style: dict[str, Any] = {
            "fontsize": 9,
            "va": "center",
            "color": QUIET if quiet or not i else INK,
            "style": "italic" if quiet else "normal",
            "fontweight": "bold" if not i else "normal",
        }
        figure.text(0.2 / width, y, name, **style)
        for right, cell in zip(rights, cells, strict=True):
            figure.text(right, y, cell, ha="right", **style)
        if not i or (quiet and not rows[i - 2][2]):
            edge = y - 0.135 / height if not i else y + 0.135 / height
            figure.add_artist(_line(0.2 / width, rights[-1], edge))
    for i, line in enumerate(reversed(below)):
        figure.text(0.2 / width, (0.16 * i + 0.12) / height, line, fontsize=7.5, color=QUIET, va="bottom")
    save_figure(figure, path)


def _line(left: float, right: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([left, right], [y, y], color="#d1d5db", linewidth=0.8)


def model_name(model: dict[str, Any]) -> str:
    """The name of a result's model: the one it was given, the one an endpoint uses, or its directory's
    name."""
    path = str(model.get("path") or "")
    name = model.get("name") or (path if model.get("backend") == "endpoint" else Path(path).name)
    return str(name or path or UNNAMED)


def model_names(models: list[dict[str, Any]]) -> list[str]:
    """`model_name` of each, with its fingerprint where another model has the same name and other files."""
    named = [(model_name(model), str(model.get("fingerprint") or "files not known")) for model in models]
    return [
        f"{name} ({files})" if len({theirs for other, theirs in named if other == name}) > 1 else name
        for name, files in named
    ]


def check(result: BenchmarkResult) -> None:
    """ValueError where `result` is not one of `perplexity`, or not complete."""
    if result.task != "perplexity":
        raise ValueError("is not a result of `perplexity`")
    by_length = result.extra.get("by_length")
    if not isinstance(by_length, dict) or not by_length:
        raise ValueError("contains no scores")
    for length, summary in by_length.items():
        try:
            buckets = [*summary["by_position"], *summary["by_sixteenth"]]
            numbers = [int(length), *(bucket[name] for bucket in buckets for name in ("from", "to"))]
            perplexities = [one["perplexity"] for one in (summary, *buckets)]
            numbers += [one for one in perplexities if one is not None]
            complete = int(length) > 0 and all(isinstance(one, int | float) for one in numbers)
        except (KeyError, TypeError, ValueError):
            complete = False
        if not complete:
            raise ValueError(
                f"has scores at length {length} that lack perplexity, by_position or by_sixteenth"
            )


def text_of(result: BenchmarkResult) -> str:
    """The text of a perplexity: files, their size, and the number of rows."""
    settings = result.settings
    data = settings.get("data")
    if (
        not isinstance(data, list)
        or not all(isinstance(file, dict) and isinstance(file.get("bytes"), int) for file in data)
        or not data
    ):
        return "text not recorded"
    more = f" and {len(data) - 1} more" if len(data) > 1 else ""
    size = sum(file["bytes"] for file in data)
    return f"{data[0].get('name')}{more}, {size:,} bytes, field {settings.get('text_key')}, {settings.get('rows')} rows"


def _style(i: int, label: str) -> dict[str, Any]:
    """The line of the i-th model."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
        "linestyle": "-" if i < len(COLOURS) else "--",
        "label": label,
    }


def _figure(panels: int, heading: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + 0.6, 3.9), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=12, fontweight="bold", color=INK)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _length_axis(panel: Any, lengths: list[int]) -> None:
    panel.set_xscale("log", base=2)
    shown = lengths if len(lengths) <= 14 else lengths[-14:]
    panel.set_xticks(shown, [short_count(length) for length in shown], rotation=45 if len(shown) > 6 else 0)
    panel.set_xticks([], minor=True)


def _finish(figure: Any, path: Path, panels: list[Any]) -> None:
    for panel in panels:
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=QUIET, labelsize=8, length=0)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            panel.spines[side].set_color("#d1d5db")
    if panels[0].get_legend_handles_labels()[0]:
        # Beside the panels, where it covers no line; long enough for the dashes of a line to show.
        panels[-1].legend(
            *panels[0].get_legend_handles_labels(),
            fontsize=7.5,
            frameon=False,
            labelcolor=INK,
            handlelength=3.2,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
        )
    save_figure(figure, path)
