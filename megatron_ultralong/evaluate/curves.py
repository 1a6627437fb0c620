"""Curves of several models in one figure: perplexity over position, a score over length. Drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate.plots import INK, QUIET, tokens

COLOURS = ("#1f5fa8", "#d1702a", "#2f8f5b", "#8e4fa8", "#b23a48", "#6b7280", "#0f8b8d", "#a67c00")
MARKERS = "osD^vPX*"


def by_position(results: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of perplexity results, each at its greatest length: by powers of two, and by sixteenths of the length.

    UserError where `path` cannot be written or a result is no perplexity's.
    """
    if any(result.get("task") != "perplexity" for result in results):
        raise UserError("only results of `perplexity` can be drawn beside each other; another file was given")
    figure, (left, right) = _figure(2, "Perplexity by position")
    for i, result in enumerate(results):
        length = max(result["scores"], key=int)
        score, name = result["scores"][length], f"{label(result)}, {tokens(int(length))}"
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.6, "label": name}
        rows = [row for row in score["by_position"] if row["perplexity"] is not None]
        left.plot([row["to"] for row in rows], [row["perplexity"] for row in rows], **style)
        rows = [row for row in score["by_sixteenth"] if row["perplexity"] is not None]
        right.plot([(row["from"] + row["to"]) / 2 / int(length) * 100 for row in rows], [row["perplexity"] for row in rows], **style)
    _length_axis(left, sorted({row["to"] for result in results for row in result["scores"][max(result["scores"], key=int)]["by_position"]}))
    left.set_xlabel("tokens of context, up to", color=QUIET)
    right.set_xlabel("position, % of the length", color=QUIET)
    left.set_ylabel("perplexity", color=QUIET)
    _save(figure, path, [left, right])


def by_length(lines: dict[str, dict[int, float]], path: Path, *, heading: str, axis: str) -> None:
    """Write a PNG with one line a model: {name: {length: score}}. UserError where `path` cannot be written."""
    figure, (panel,) = _figure(1, heading)
    for i, (name, points) in enumerate(lines.items()):
        panel.plot(sorted(points), [points[length] for length in sorted(points)], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                   markersize=4, linewidth=1.6, label=name)
    _length_axis(panel, sorted({length for points in lines.values() for length in points}))
    panel.set_xlabel("tokens", color=QUIET)
    panel.set_ylabel(axis, color=QUIET)
    _save(figure, path, [panel])


def table(heading: str, columns: list[str], rows: list[tuple[str, list[str], bool]], path: Path) -> None:
    """Write a PNG of a table: (name, cells, whether it is published: grey and slanted) of each row. UserError where `path` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = max(len("model"), *(len(name) for name, _, _ in rows)) * 0.075 + 0.3
    widths = [max(0.75, len(column) * 0.085 + 0.2) for column in columns]
    width, height = first + sum(widths) + 0.4, 0.27 * (len(rows) + 1) + 0.75
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, 1 - 0.28 / height, heading, fontsize=12, fontweight="bold", color=INK, va="center")
    rights = [(0.2 + first + sum(widths[:i + 1])) / width for i in range(len(columns))]
    for i, (name, cells, quiet) in enumerate([("model", columns, False), *rows]):
        y = 1 - (0.68 + 0.27 * i) / height
        style: dict[str, Any] = {"fontsize": 9, "va": "center", "color": QUIET if quiet or not i else INK, "style": "italic" if quiet else "normal",
                                 "fontweight": "bold" if not i else "normal"}
        figure.text(0.2 / width, y, name, **style)
        for right, cell in zip(rights, cells, strict=True):
            figure.text(right, y, cell, ha="right", **style)
        if not i or (quiet and not rows[i - 2][2]):
            edge = y - 0.135 / height if not i else y + 0.135 / height
            figure.add_artist(_line(0.2 / width, rights[-1], edge))
    _write(figure, path)


def _line(left: float, right: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([left, right], [y, y], color="#d1d5db", linewidth=0.8)


def label(result: dict[str, Any]) -> str:
    """What a result's model is called."""
    model = result.get("model") or {}
    return str(model.get("name") or Path(str(model.get("path") or "?")).name)


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
    panel.set_xticks(shown, [tokens(length) for length in shown], rotation=45 if len(shown) > 6 else 0)
    panel.set_xticks([], minor=True)


def _save(figure: Any, path: Path, panels: list[Any]) -> None:
    for panel in panels:
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=QUIET, labelsize=8, length=0)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            panel.spines[side].set_color("#d1d5db")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=7.5, frameon=False, labelcolor=INK)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
