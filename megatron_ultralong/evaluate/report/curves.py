"""Curves of several models in one figure: perplexity over position, a score over length. Drawn without a
display."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.report.heat_map import INK, QUIET, tokens

COLOURS = ("#1f5fa8", "#d1702a", "#2f8f5b", "#8e4fa8", "#b23a48", "#6b7280", "#0f8b8d", "#a67c00")
MARKERS = "osD^vPX*"
UNNAMED = "model not named"
"""What a model is called where a result does not say."""


def by_position(results: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of perplexity results that `check` passes, each at its greatest length: by powers of two,
    and by sixteenths of the length.

    Where they are of different text, each is told. UserError where `path` cannot be written.
    """
    texts, names = [text_of(result) for result in results], labels(results)
    figure, (left, right) = _figure(2, "Perplexity by position")
    for i, result in enumerate(results):
        length = max(result["scores"], key=int)
        score, name = (
            result["scores"][length],
            f"{names[i]}, {tokens(int(length))}" + (f", {texts[i]}" if len(set(texts)) > 1 else ""),
        )
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.6,
            "label": name,
        }
        rows = [row for row in score["by_position"] if row["perplexity"] is not None]
        left.plot([row["to"] for row in rows], [row["perplexity"] for row in rows], **style)
        rows = [row for row in score["by_sixteenth"] if row["perplexity"] is not None]
        right.plot(
            [(row["from"] + row["to"]) / 2 / int(length) * 100 for row in rows],
            [row["perplexity"] for row in rows],
            **style,
        )
    _length_axis(
        left,
        sorted(
            {
                row["to"]
                for result in results
                for row in result["scores"][max(result["scores"], key=int)]["by_position"]
            }
        ),
    )
    left.set_xlabel("tokens of context, up to", color=QUIET)
    right.set_xlabel("position, % of the length", color=QUIET)
    left.set_ylabel("perplexity", color=QUIET)
    _save(figure, path, [left, right])


def by_length(
    lines: dict[str, dict[int, float]], path: Path, *, heading: str, axis: str, foot: list[str]
) -> None:
    """Write a PNG with one line a model: {name: {length: score}}; foot: lines below. UserError where `path`
    cannot be written."""
    figure, (panel,) = _figure(1, heading)
    if foot:
        below = [wrapped for line in foot for wrapped in textwrap.wrap(line, 115)]
        figure.set_figheight(figure.get_figheight() + 0.12 * len(below))
        figure.supxlabel("\n".join(below), x=0.02, ha="left", fontsize=6.5, color=QUIET)
    for i, (name, points) in enumerate(lines.items()):
        panel.plot(
            sorted(points),
            [points[length] for length in sorted(points)],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    _length_axis(panel, sorted({length for points in lines.values() for length in points}))
    panel.set_xlabel("tokens", color=QUIET)
    panel.set_ylabel(axis, color=QUIET)
    _save(figure, path, [panel])


def table(
    heading: str, columns: list[str], rows: list[tuple[str, list[str], bool]], path: Path, foot: list[str]
) -> None:
    """Write a PNG of a table: (name, cells, whether it is published: grey and slanted) of each row; foot:
    lines below.

    UserError where `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = max(len("model"), *(len(name) for name, _, _ in rows)) * 0.075 + 0.3
    widths = [max(0.75, len(column) * 0.085 + 0.2) for column in columns]
    width = first + sum(widths) + 0.4
    below = [
        wrapped
        for line in foot
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
    _write(figure, path)


def _line(left: float, right: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([left, right], [y, y], color="#d1d5db", linewidth=0.8)


def label(result: dict[str, Any]) -> str:
    """What a result's model is called: the name it is given, what an endpoint calls it, or its directory's
    name."""
    model = result.get("model") or {}
    path = str(model.get("path") or "")
    return str(
        model.get("name")
        or (path if model.get("backend") == "endpoint" else Path(path).name)
        or path
        or UNNAMED
    )


def labels(results: list[dict[str, Any]]) -> list[str]:
    """`label` of each, with what tells its files apart where another has the same name and other files."""
    named = [
        (label(result), str((result.get("model") or {}).get("fingerprint") or "files not known"))
        for result in results
    ]
    return [
        f"{name} ({files})" if len({theirs for other, theirs in named if other == name}) > 1 else name
        for name, files in named
    ]


def check(result: dict[str, Any]) -> None:
    """ValueError where `result` is none of `perplexity`, or not whole."""
    if result.get("task") != "perplexity":
        raise ValueError("is no result of `perplexity`")
    scores, model, settings = result.get("scores"), result.get("model"), result.get("settings")
    if not isinstance(scores, dict) or not scores:
        raise ValueError("has no scores")
    if not isinstance(model or {}, dict) or not isinstance(settings or {}, dict):
        raise ValueError("`model` or `settings` is no object")
    for length, values in scores.items():
        rows = (
            [values.get(name) for name in ("by_position", "by_sixteenth")] if isinstance(values, dict) else []
        )
        if (
            not length.isdecimal()
            or not int(length)
            or not rows
            or not _is_number(values.get("perplexity", ""), none=True)
            or not all(
                isinstance(some, list)
                and all(
                    isinstance(row, dict)
                    and _is_number(row.get("from"))
                    and _is_number(row.get("to"))
                    and _is_number(row.get("perplexity", ""), none=True)
                    for row in some
                )
                for some in rows
            )
        ):
            raise ValueError(f"its scores at length {length} lack perplexity, by_position or by_sixteenth")


def text_of(result: dict[str, Any]) -> str:
    """Of what text a perplexity is: files, their size, and how many rows."""
    settings = result.get("settings") or {}
    data = settings.get("data")
    if (
        not isinstance(data, list)
        or not all(isinstance(one, dict) and isinstance(one.get("bytes"), int) for one in data)
        or not data
    ):
        return "text not told"
    more = f" and {len(data) - 1} more" if len(data) > 1 else ""
    return f"{data[0].get('name')}{more}, {sum(one['bytes'] for one in data):,} bytes, field {settings.get('text_key')}, {settings.get('rows')} rows"


def _is_number(value: Any, *, none: bool = False) -> bool:
    return (none and value is None) or (isinstance(value, (int, float)) and not isinstance(value, bool))


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
