"""Heat maps of passkey results: lengths across, depths down, one panel per result. Drawn without a
display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, short_count
from megatron_ultralong.io import plot_style

PANELS = 3  # per row
NUMBERED = 16
"""Most lengths of a grid whose cells have their numbers written into them, and that are all labelled."""
DASHES = (0, (4, 2))


def check(result: BenchmarkResult) -> None:
    """ValueError where `result` is not one of `niah`, or contains no grid to draw."""
    if result.task != "niah":
        raise ValueError("contains no passkey results; give files that `niah` wrote")
    if not isinstance(result.model.get("max_position"), int | None):
        raise ValueError("has positions of its model that are not a number")
    cells, means = result.extra.get("cells"), _means(result)
    if not isinstance(cells, list) or not cells:
        raise ValueError("contains no grid: `cells` is missing or empty")
    try:
        complete = all(
            0 <= cell["depth"] <= 100 and 0 <= cell["accuracy"] <= 1 and 0 <= means[cell["length"]] <= 1
            for cell in cells
        )
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(
            "contains no complete grid: a cell lacks length, depth or accuracy, or a length its mean, or they are above 100%"
        )


def heat_maps(
    results: list[BenchmarkResult],
    titles: list[str],
    path: Path,
    *,
    heading: str = "Passkey retrieval (own wording, own grid)",
    trained: list[int | None] | None = None,
) -> None:
    """Write a PNG with one panel for each of `results`, which pass `check`, three per row.

    trained: the context length of each model, in tokens: a dashed line is drawn after it (None = no line).
    UserError where `path` cannot be written.
    """
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = max(len(_axis(result, "length")) for result in results)
    rows = max(len(_axis(result, "depth")) for result in results)
    across = min(PANELS, len(results))
    down = -(-len(results) // across)
    cell = (0.75, 0.42) if columns <= NUMBERED else (0.3, 0.2)  # inches
    width = across * max(3.6, cell[0] * columns + 1.2) + 1.4
    height = down * max(3.4, cell[1] * rows + 2.1) + 0.3
    figure = plot_style.new_figure(width, height)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for unused in panels[len(results) :]:
        unused.set_visible(False)
    image: Any = None
    legend: dict[str, Any] = {}
    for i, (panel, result, title) in enumerate(zip(panels[: len(results)], results, titles, strict=True)):
        lengths, depths = _axis(result, "length"), _axis(result, "depth")
        accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in result.extra["cells"]}
        grid = [[accuracy.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(
            grid, cmap=plot_style.HEAT_MAP, norm=Normalize(0, 1), aspect="auto", origin="upper"
        )
        if len(accuracy) < len(lengths) * len(depths):
            panel.patch.set(facecolor="white", edgecolor=plot_style.QUIET, hatch="///")
            legend["not measured"] = Patch(facecolor="white", edgecolor=plot_style.QUIET, hatch="///")
        if columns <= NUMBERED:
            _write_numbers(panel, grid)
        _label_axes(panel, lengths, depths, _means(result))
        if i % across == 0:
            panel.set_ylabel("depth of the pass key, % of the text", color=plot_style.QUIET)
        panel.set_title(plot_style.plain(title), fontsize=10, color=plot_style.INK, pad=8)
        border = trained[i] if trained else None
        inside = [length for length in lengths if border is not None and length <= border]
        if inside and len(inside) < len(lengths):
            _draw_border(panel, len(inside) - 0.5)
            label = "longest context of the model's config (max_position_embeddings)"
            legend[label] = Line2D([], [], color=plot_style.INK, linewidth=1.8, linestyle=DASHES)
    figure.suptitle(heading, fontsize=12, fontweight="bold", color=plot_style.INK)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.25, 0.5, 0.75, 1], shrink=0.9, pad=0.02)
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"])
    bar.ax.tick_params(length=0, colors=plot_style.QUIET, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("pass keys found", color=plot_style.QUIET, fontsize=9)
    if legend:
        figure.legend(
            legend.values(), legend, loc="outside lower left", frameon=False, fontsize=8, handlelength=3.2
        )
    plot_style.save_figure(figure, path)


def _write_numbers(panel: Any, grid: list[list[float]]) -> None:
    """Percent in every measured cell, light on dark colours and dark on light ones."""
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:  # not NaN
                ink = "white" if value < 0.55 else plot_style.INK
                panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)


def _label_axes(panel: Any, lengths: list[int], depths: list[float], means: dict[int, float]) -> None:
    shown = _ticks(len(lengths), NUMBERED)
    # Values between 99.5% and 100% must not look complete.
    found = [f"{min(means[length], 0.99 if means[length] < 1 else 1):.0%}" for length in lengths]
    panel.set_xticks(shown, [f"{short_count(lengths[k])}\n{found[k]}" for k in shown])
    panel.set_xlabel(
        "tokens of prompt and answer (1K = 1,024);\nbelow: found over all depths", color=plot_style.QUIET
    )
    shown = _ticks(len(depths), 21)
    panel.set_yticks(shown, [f"{depths[k]:.3g}" for k in shown])
    panel.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
    panel.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5 if len(lengths) <= NUMBERED else 0.5)
    panel.tick_params(which="both", length=0, colors=plot_style.QUIET, labelsize=9)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _ticks(count: int, most: int) -> range:
    """At most `most` of `count` positions in equal steps, the last one among them, and the first where that
    is possible."""
    least = -(-count // most)
    step = next((step for step in range(least, 2 * least + 1) if (count - 1) % step == 0), least)
    return range((count - 1) % step, count, step)


def _draw_border(panel: Any, x: float) -> None:
    """A dashed line on a white one, visible beside every colour."""
    panel.axvline(x, color="white", linewidth=4)
    panel.axvline(x, color=plot_style.INK, linewidth=1.8, linestyle=DASHES)


def _means(result: BenchmarkResult) -> dict[int, float]:
    """Accuracy at each length over all depths, 0 to 1."""
    return {
        score.length: score.score / 100
        for score in result.scores
        if score.length is not None and score.score is not None
    }


def _axis(result: BenchmarkResult, name: str) -> list[Any]:
    return sorted({cell[name] for cell in result.extra["cells"]})
