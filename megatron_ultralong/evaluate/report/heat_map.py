"""Heat maps of passkey results: lengths across, depths down, one panel per result. Drawn without a
display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, short_count
from megatron_ultralong.io import atomic_files

RED_TO_GREEN = ("#d73027", "#fc8d59", "#fee08b", "#d9ef8b", "#91cf60", "#1a9850")
PANELS = 3  # per row
INK, QUIET = "#1f2430", "#6b7280"


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

    trained: the context length of each model: a dashed line is drawn after it (None = no line). UserError
    where `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    columns = max(len(_axis(result, "length")) for result in results)
    rows = max(len(_axis(result, "depth")) for result in results)
    across = min(PANELS, len(results))
    down = -(-len(results) // across)
    width = across * max(3.6, 0.75 * columns + 1.2) + 1.4
    height = down * max(3.4, 0.42 * rows + 1.9)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for unused in panels[len(results) :]:
        unused.set_visible(False)
    colours = LinearSegmentedColormap.from_list("accuracy", RED_TO_GREEN)
    image: Any = None
    for i, (panel, result, title) in enumerate(zip(panels[: len(results)], results, titles, strict=True)):
        lengths, depths = _axis(result, "length"), _axis(result, "depth")
        accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in result.extra["cells"]}
        grid = [[accuracy.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(grid, cmap=colours, norm=Normalize(0, 1), aspect="auto", origin="upper")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if columns <= 16 and value == value:  # not NaN
                    panel.text(
                        column,
                        row,
                        f"{value:.0%}".removesuffix("%"),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if value < 0.2 or value > 0.9 else INK,
                    )
        means = _means(result)
        panel.set_xticks(
            range(len(lengths)), [f"{short_count(length)}\n{means[length]:.0%}" for length in lengths]
        )
        panel.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
        if i % across == 0:
            panel.set_ylabel("depth of the pass key", color=QUIET)
        panel.set_xlabel("tokens, and accuracy over all depths", color=QUIET)
        panel.set_title(title, fontsize=10, color=INK, pad=8)
        border = trained[i] if trained else None
        inside = [length for length in lengths if border is not None and length <= border]
        if inside and len(inside) < len(lengths):
            panel.axvline(len(inside) - 0.5, color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
        panel.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        panel.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="both", length=0, colors=QUIET, labelsize=9)
        for spine in panel.spines.values():
            spine.set_visible(False)
    figure.suptitle(heading, fontsize=12, fontweight="bold", color=INK)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.25, 0.5, 0.75, 1], shrink=0.9, pad=0.02)
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"])
    bar.ax.tick_params(length=0, colors=QUIET, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("correct", color=QUIET, fontsize=9)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG. UserError where `path` cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise atomic_files.cannot_write(str(path), error) from None


def _means(result: BenchmarkResult) -> dict[int, float]:
    """Accuracy at each length over all depths, 0 to 1."""
    return {
        score.length: score.score / 100
        for score in result.scores
        if score.length is not None and score.score is not None
    }


def _axis(result: BenchmarkResult, name: str) -> list[Any]:
    return sorted({cell[name] for cell in result.extra["cells"]})
