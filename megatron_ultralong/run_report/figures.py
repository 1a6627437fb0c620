"""The curves of a run as SVG, drawn without a display."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import short_count
from megatron_ultralong.io.plot_style import AREAS, COLOURS, HATCHES, INK, MARKERS, QUIET, style_axes
from megatron_ultralong.run_report.read import RunRecord
from megatron_ultralong.train.stopwatch import PARTS

POINTS = 800
"""Most points of a curve; more are averaged."""
Curve = tuple[str, dict[int, float]]
"""(name, value by iteration)."""


def all_figures(record: RunRecord) -> list[tuple[str, bytes]]:
    """Return (heading, SVG) of each figure that there are figures for."""
    found = []
    validation = {i: float(v["loss"]) for i, v in record.validations.items() if v.get("loss") is not None}
    panels: list[tuple[str, str, list[Curve], bool]] = [
        (
            "Loss",
            "cross entropy per token",
            [("training", record.series("loss")), ("held-out", validation)],
            False,
        ),
        ("z-loss", "per token", [("", record.series("z_loss"))], False),
        ("Learning rate", "", [("", record.series("learning_rate"))], False),
        ("Gradient norm", "before clipping", [("", record.series("grad_norm"))], True),
        ("Speed", "tokens/s, all ranks", [("", record.series("tokens_per_second"))], False),
        ("Causal MFU", "", [("", record.series("causal_mfu"))], False),
        (
            "Memory",
            "GB, largest of all ranks",
            [
                (name, {i: value / 1e9 for i, value in record.series("memory", key).items()})
                for name, key in (
                    ("allocated on a GPU", "peak_allocated"),
                    ("reserved on a GPU", "peak_reserved"),
                    ("resident in host memory", "peak_resident"),
                )
            ],
            False,
        ),
        (
            "Slowest rank",
            "s of its own work",
            [
                ("slowest", record.series("slowest_rank", "work")),
                ("median", record.series("slowest_rank", "median_work")),
            ],
            False,
        ),
    ]
    for heading, axis, curves, log in panels:
        known = [curve for curve in curves if curve[1]]
        if known:
            found.append((heading, _lines(record, heading, axis, known, log)))
        if heading == "Speed" and record.series("seconds"):
            found.append(("Time by part", _time_by_part(record)))
    names: dict[str, set[str]] = {}
    for scalars in record.evaluations.values():
        for name in scalars:
            names.setdefault(name.partition("/")[0], set()).add(name)
    for group in sorted(names):
        curves = [
            (
                _with_unit(name.partition("/")[2]) or name,
                {i: s[name] for i, s in sorted(record.evaluations.items()) if name in s},
            )
            for name in sorted(names[group], key=by_number)
        ]
        found.append((group.capitalize(), _lines(record, group.capitalize(), "", curves, False)))
    return found


def by_number(name: str) -> tuple[str, bool, int, str]:
    """Sorts the names of an evaluation's scalars, GROUP/NUMBER or GROUP/FROM-TO or GROUP/WORD."""
    first = name.partition("/")[2].partition("-")[0]
    return name.partition("/")[0], first.isdecimal(), int(first) if first.isdecimal() else 0, name


def _with_unit(name: str) -> str:
    """A length or range of positions, as in 4K tokens; other names as they are."""
    ends = name.split("-")
    return (
        "-".join(short_count(int(end)) for end in ends) + " tokens" if all(map(str.isdecimal, ends)) else name
    )


def thin(curve: dict[int, float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """(iterations, values): means over equal groups of neighbours where there are more than `points`."""
    pairs = sorted(curve.items())
    size = -(-len(pairs) // points) or 1
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return (
        [statistics.fmean(x for x, _ in group) for group in groups],
        [statistics.fmean(y for _, y in group) for group in groups],
    )


def _lines(record: RunRecord, heading: str, axis: str, curves: list[Curve], log: bool) -> bytes:
    def draw(panel: Any) -> None:
        for i, (name, curve) in enumerate(curves):
            x, y = thin(curve)
            panel.plot(
                x,
                y,
                color=COLOURS[i % len(COLOURS)],
                linewidth=1.3,
                linestyle="-" if i < len(COLOURS) else "--",
                marker=MARKERS[i % len(MARKERS)] if len(curves) > 1 or len(x) <= 40 else None,
                markersize=3,
                markevery=1 if len(x) <= 40 else 0.08,
                label=name,
            )
        values = [value for _, curve in curves for value in curve.values()]
        if log and min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")

    return _figure(record, heading, axis, draw, legend=any(name for name, _ in curves))


def _time_by_part(record: RunRecord) -> bytes:
    """Areas on top of each other; what saves made training wait as points of their own."""
    parts = {name: record.series("parts", name) for name in PARTS}
    iterations = list(record.series("seconds"))
    areas = {
        name: thin({i: values.get(i, 0.0) for i in iterations})[1] for name, values in parts.items() if values
    }
    x = thin(dict.fromkeys(iterations, 0.0))[0]
    saves = {save["iteration"]: float(save["waited"]) for save in record.saves if not save.get("error")}

    def draw(panel: Any) -> None:
        if areas:
            below = [0.0] * len(x)
            for i, (name, heights) in enumerate(areas.items()):
                above = [bottom + height for bottom, height in zip(below, heights, strict=True)]
                style = {"facecolor": AREAS[i % len(AREAS)], "hatch": HATCHES[i % len(HATCHES)]}
                panel.fill_between(x, below, above, edgecolor="white", linewidth=0.4, label=name, **style)
                below = above
        else:
            panel.plot(x, thin(record.series("seconds"))[1], color=COLOURS[0], label="iteration")
        if saves:
            panel.plot(
                list(saves),
                list(saves.values()),
                "D",
                color=INK,
                markersize=4,
                label="waiting for a save",
                linestyle="",
            )

    return _figure(record, "Time by part", "seconds of an iteration", draw, reverse=True)


def _figure(
    record: RunRecord,
    heading: str,
    axis: str,
    draw: Callable[[Any], None],
    *,
    legend: bool = True,
    reverse: bool = False,
) -> bytes:
    """reverse: the legend's entries in the order of areas, from the top."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.0), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    panel = figure.subplots()
    draw(panel)
    for i, iteration in enumerate(record.restarts):
        panel.axvline(
            iteration + 0.5,
            color=INK,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label=None if i else "restart",
        )
    panel.set_title(heading, fontsize=11, fontweight="bold", color=INK, loc="left")
    panel.set_xlabel("iteration", fontsize=8, color=QUIET)
    panel.set_ylabel(axis, fontsize=8, color=QUIET)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    style_axes(panel)
    if legend or record.restarts:
        handles, labels = panel.get_legend_handles_labels()
        panel.legend(
            handles[::-1] if reverse else handles,
            labels[::-1] if reverse else labels,
            fontsize=7.5,
            frameon=False,
            labelcolor=INK,
            handlelength=2.4,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
        )
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
