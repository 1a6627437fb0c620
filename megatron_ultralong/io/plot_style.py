"""How all plots look: colours that differ for readers with any colour vision, and marks that differ without
colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron_ultralong.io import atomic_files

INK, QUIET, GRID = "#1f2430", "#6b7280", "#e5e7eb"
"""Text and marks; labels of axes; lines behind the curves."""
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
"""Of curves: Okabe and Ito's palette (jfly.uni-koeln.de/color), its yellow replaced by a wine red that is
visible on white."""
MARKERS = "osD^vPX*"
AREAS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#000000")
"""The same for areas that lie beside each other, the dark ones last."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "+++")
"""Of areas, so that they differ in print without colour."""
HEAT_MAP = "viridis"
"""Colours from 0 to 1. Their lightness rises steadily, so that they have the same order for every reader."""


def plain(text: str) -> str:
    """Return `text`, like a model's name, so that matplotlib draws it as it is: it reads a formula between
    dollar signs, and has no lines in the legend whose label begins with an underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure of that many inches that is drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, completely or not at all. UserError where `path` cannot be written."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    with atomic_files.whole_file(path) as file:
        file.write(png.getvalue())


def style_axes(panel: Any) -> None:
    """Draw a grid behind the curves of a panel, and no frame."""
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=QUIET, labelsize=8, length=0, which="both")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#d1d5db")
