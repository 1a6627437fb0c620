"""Figures of several models: perplexity over position, a score over length, tables. Drawn without a
display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, short_count
from megatron_ultralong.io import plot_style
from megatron_ultralong.io.plot_style import COLOURS, INK, MARKERS, QUIET, save_figure

DOTS = (0, (1, 1.5))
UNNAMED = "unnamed model"
"""The name of a model that a result does not record."""


def perplexity_by_position(results: list[BenchmarkResult], path: Path) -> None:
    """Write a PNG of perplexity results that pass `check`: by position, as powers of two and as sixteenths of
    the length, at the greatest length of each; and, where a result has several lengths, the mean over all
    tokens at each. Vertical lines mark the longest context of the models' configs.

    Where they were measured on different texts, the legend names these. UserError where `path` cannot be
    written.
    """
    texts, names = [text_of(result) for result in results], model_names([result.model for result in results])
    by_length = any(len(result.extra["by_length"]) > 1 for result in results)
    figure, panels = _figure(3 if by_length else 2, "Perplexity, lower is better")
    left, middle = panels[:2]
    ends: set[int] = set()
    lengths: set[int] = set()
    for i, result in enumerate(results):
        summaries = {int(length): summary for length, summary in result.extra["by_length"].items()}
        length = max(summaries)
        lengths |= set(summaries)
        ends |= {bucket["to"] for bucket in summaries[length]["by_position"]}
        text = f", {texts[i]}" if len(set(texts)) > 1 else ""
        style = _style(i, f"{names[i]}, up to {short_count(length)}{text}")
        buckets = [bucket for bucket in summaries[length]["by_position"] if bucket["perplexity"] is not None]
        left.plot([bucket["to"] for bucket in buckets], [bucket["perplexity"] for bucket in buckets], **style)
        buckets = [bucket for bucket in summaries[length]["by_sixteenth"] if bucket["perplexity"] is not None]
        middle.plot(
            [(bucket["from"] + bucket["to"]) / 2 / length * 100 for bucket in buckets],
            [bucket["perplexity"] for bucket in buckets],
            **style,
        )
        if by_length:
            measured = sorted(one for one in summaries if summaries[one]["perplexity"] is not None)
            panels[2].plot(measured, [summaries[one]["perplexity"] for one in measured], **style)
    trained = [result.model.get("max_position") for result in results]
    _length_axis(left, sorted(ends))
    marked = _mark_trained(left, trained)
    left.set_title("by position", fontsize=10, color=INK)
    left.set_xlabel("tokens before it, up to (1K = 1,024)", color=QUIET)
    middle.set_title("by position in the row", fontsize=10, color=INK)
    middle.set_xlabel("position, % of the greatest length", color=QUIET)
    left.set_ylabel("perplexity", color=QUIET)
    if by_length:
        _length_axis(panels[2], sorted(lengths))
        _mark_trained(panels[2], trained)
        panels[2].set_title("of all tokens", fontsize=10, color=INK)
        panels[2].set_xlabel("length of the row, tokens (1K = 1,024)", color=QUIET)
    _finish(figure, path, list(panels), marked=marked)


def score_by_length(
    lines: dict[str, dict[int, float]],
    path: Path,
    *,
    heading: str,
    axis: str,
    footnotes: list[str],
    trained: dict[str, int] | None = None,
) -> None:
    """Write a PNG with one line per model: {name: {length: score}}. trained: by model, the longest context of
    its config, which is marked. UserError where `path` cannot be written."""
    figure, (panel,) = _figure(1, heading)
    below = [wrapped for line in footnotes for wrapped in textwrap.wrap(line, 95)]
    for i, (name, points) in enumerate(lines.items()):
        panel.plot(sorted(points), [points[length] for length in sorted(points)], **_style(i, name))
    _length_axis(panel, sorted({length for points in lines.values() for length in points}))
    marked = _mark_trained(panel, [(trained or {}).get(name) for name in lines])
    panel.set_xlabel("length in tokens (1K = 1,024)", color=QUIET)
    panel.set_ylabel(axis, color=QUIET)
    _finish(figure, path, [panel], marked=marked, footnotes=below)


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
        figure.text(0.2 / width, y, plot_style.plain(name), **style)
        for right, cell in zip(rights, cells, strict=True):
            figure.text(right, y, plot_style.plain(cell), ha="right", **style)
        if not i or (quiet and not rows[i - 2][2]):
            edge = y - 0.135 / height if not i else y + 0.135 / height
            figure.add_artist(_line(0.2 / width, rights[-1], edge))
    for i, line in enumerate(reversed(below)):
        figure.text(
            0.2 / width,
            (0.16 * i + 0.12) / height,
            plot_style.plain(line),
            fontsize=7.5,
            color=QUIET,
            va="bottom",
        )
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
        "label": plot_style.plain(label),
    }


def _figure(panels: int, heading: str) -> tuple[Any, Any]:
    figure = plot_style.new_figure(5.0 * panels + 0.6, 4.3)
    figure.suptitle(heading, fontsize=12, fontweight="bold", color=INK)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _length_axis(panel: Any, lengths: list[int]) -> None:
    """Powers of two, each measured length with a label."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(
        lengths, [short_count(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0
    )
    panel.set_xticks([], minor=True)


def _mark_trained(panel: Any, trained: Sequence[int | None]) -> bool:
    """Draw a vertical line in each model's colour at the longest context of its config, where the axis
    contains it; returns whether there is one."""
    low, high = panel.get_xlim()
    shown = {length: i for i, length in reversed([*enumerate(trained)]) if length and low <= length <= high}
    for length, i in shown.items():
        color = INK if trained.count(length) > 1 else COLOURS[i % len(COLOURS)]
        panel.axvline(length, color=color, linewidth=1.2, linestyle=DOTS, zorder=1)
    return bool(shown)


def _finish(
    figure: Any, path: Path, panels: list[Any], *, marked: bool, footnotes: Sequence[str] = ()
) -> None:
    """Style the panels, write legend and footnotes below them, where they cover no line, and write the
    file."""
    from matplotlib.lines import Line2D

    for panel in panels:
        plot_style.style_axes(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    if marked:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, linestyle=DOTS))
        labels.append("longest context of a model's config (max_position_embeddings)")
    handles += [Line2D([], [], linestyle="none")] * len(footnotes)
    # The panels keep their height.
    figure.set_figheight(figure.get_figheight() + 0.16 * max(0, len(handles) - 3))
    figure.legend(
        handles,
        [*labels, *map(plot_style.plain, footnotes)],
        fontsize=7.5,
        frameon=False,
        labelcolor=INK,
        handlelength=3.2,  # long enough for the dashes of a line to show
        loc="outside lower left",
    )
    save_figure(figure, path)
