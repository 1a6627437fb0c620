"""Plots: colours that readers with any colour vision tell apart, what is labelled and marked, and files that
appear whole or not at all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from megatron_ultralong.evaluate.report import curves, heat_map
from megatron_ultralong.io import plot_style
from megatron_ultralong.measure import report as measure_report
from megatron_ultralong.measure.report import ReportColumn, SpeedReport

K = 1024

VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
"""What a reader sees of linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.0."""


def lab(colour: Any, vision: str) -> Any:
    """CIE L*a*b* (D65) of a colour as a reader sees it."""
    rgb = numpy.array(to_rgb(colour))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = numpy.clip(numpy.array(VISION[vision]) @ linear, 0, 1)
    xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = numpy.cbrt(xyz / [0.9505, 1.0, 1.089])
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one: Any, other: Any, vision: str) -> float:
    return float(numpy.linalg.norm(lab(one, vision) - lab(other, vision)))


@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_for_every_reader(vision):
    """A difference of 2.3 is just noticeable beside each other; 15 is plain."""
    for one, other in itertools.combinations(plot_style.COLOURS, 2):
        assert distance(one, other, vision) > 15, (one, other)
    assert sorted(plot_style.AREAS) == sorted(plot_style.COLOURS)
    red_to_green = ("#fee08b", "#d9ef8b")  # the test finds what a common palette gets wrong
    assert distance(*red_to_green, "deuteranopia") < 5
    # Ten steps of the heat map: each differs from the next, and is lighter than it.
    steps = [matplotlib.colormaps[plot_style.HEAT_MAP](step / 10) for step in range(11)]
    for darker, lighter in itertools.pairwise(steps):
        assert distance(darker, lighter, vision) > 6
        assert lab(lighter, vision)[0] > lab(darker, vision)[0] + 3


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = plot_style.save_figure

    def keep(figure: Figure, path: Path) -> None:
        save(figure, path)
        figures.append(figure)

    for module in (plot_style, curves):
        monkeypatch.setattr(module, "save_figure", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    """All text of a figure."""
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text()]


def passkey(lengths: list[int], depths: list[float], max_position: int) -> BenchmarkResult:
    cells = [{"length": n, "depth": depth, "accuracy": 1.0} for n in lengths for depth in depths]
    scores = tuple(TaskScore(task="passkey", length=length, score=99.6, count=10) for length in lengths)
    model = {"path": "m", "max_position": max_position}
    return BenchmarkResult(task="niah", model=model, settings={}, scores=scores, extra={"cells": cells})


def test_heat_map_says_what_axes_colours_and_lines_are(drawn, tmp_path):
    result = passkey([64 * K, 128 * K, 1024 * K], [0.0, 50.0, 100.0], 128 * K)
    del result.extra["cells"][-1]
    heat_map.heat_maps([result], ["model"], tmp_path / "a.png", trained=[128 * K])
    found = texts(drawn[0])
    assert "tokens of prompt and answer (1K = 1,024);\nbelow: found over all depths" in found
    assert {"128K\n99%", "1M\n99%", "pass keys found", "depth of the pass key, % of the text"} <= {*found}
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["not measured", "longest context of the model's config (max_position_embeddings)"]
    panel = drawn[0].axes[0]
    assert {line.get_xdata()[0] for line in panel.lines} == {1.5}  # after 128K
    # Nothing to explain: no legend. Many lengths and depths: fewer labels, the last one among them.
    many = passkey([128 * K * i for i in range(1, 33)], [100 * i / 39 for i in range(40)], 8 * K * K)
    heat_map.heat_maps([many], ["model"], tmp_path / "b.png", trained=[8 * K * K])
    assert not drawn[1].legends
    across = [label.get_text() for label in drawn[1].axes[0].get_xticklabels()]
    down = [label.get_text() for label in drawn[1].axes[0].get_yticklabels()]
    assert (
        len(across) == 16 and across[-1] == "4M\n99%" and [down[0], down[-1], len(down)] == ["0", "100", 14]
    )


def perplexity(lengths: list[int], max_position: int) -> BenchmarkResult:
    def bucket(low: int, high: int) -> dict[str, Any]:
        return {"from": low, "to": high, "perplexity": 5.0}

    by_length = {
        str(length): {
            "perplexity": 6.0,
            "by_position": [bucket(0, length // 2), bucket(length // 2, length)],
            "by_sixteenth": [bucket(i * length // 16, (i + 1) * length // 16) for i in range(16)],
        }
        for length in lengths
    }
    model = {"name": f"m{max_position}", "max_position": max_position}
    return BenchmarkResult(
        task="perplexity", model=model, settings={}, scores=(), extra={"by_length": by_length}
    )


def test_perplexity_shows_every_length_and_marks_the_trained_one(drawn, tmp_path):
    results = [perplexity([32 * K, 128 * K, 512 * K], 128 * K), perplexity([32 * K, 1024 * K], 1024 * K)]
    curves.perplexity_by_position(results, tmp_path / "a.png")
    left, middle, right = drawn[0].axes
    assert [label.get_text() for label in right.get_xticklabels()] == ["32K", "128K", "512K", "1M"]
    assert [[*line.get_xdata()] for line in right.lines[:2]] == [
        [32 * K, 128 * K, 512 * K],
        [32 * K, 1024 * K],
    ]
    assert all("tokens" in panel.get_xlabel() for panel in (left, right))
    marks = [[(line.get_xdata()[0], line.get_color()) for line in panel.lines[2:]] for panel in (left, right)]
    first, second = (128 * K, plot_style.COLOURS[0]), (1024 * K, plot_style.COLOURS[1])
    assert marks[0] == [second] and sorted(marks[1]) == [first, second]  # left begins after 128K
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "m131072, up to 512K",
        "m1048576, up to 1M",
        "longest context of a model's config (max_position_embeddings)",
    ]
    # One length: no panel for the mean at each. A mark outside of the axis is left out, and so is its legend.
    curves.perplexity_by_position([perplexity([32 * K], 4096 * K)], tmp_path / "b.png")
    assert len(drawn[1].axes) == 2 and len(drawn[1].legends[0].get_texts()) == 1
    lines = {"A†": {K: 1.0, 2 * K: 2.0}, "B": {K: 2.0}}
    curves.score_by_length(
        lines,
        tmp_path / "c.png",
        heading="RULER",
        axis="%",
        footnotes=["† short"],
        trained={"A†": K, "B": 0},
    )
    assert [text.get_text() for text in drawn[2].legends[0].get_texts()][-1] == "† short"
    assert [line.get_xdata()[0] for line in drawn[2].axes[0].lines[2:]] == [K]


def test_names_are_drawn_as_they_are(drawn, tmp_path):
    """matplotlib takes $ for a formula, and leaves out of the legend what begins with an underscore."""
    names = ["$\\no$", "_m", "of $5 and $6"]
    result = passkey([K], [50.0], K)
    heat_map.heat_maps([result] * 3, names, tmp_path / "a.png")
    assert [panel.get_title().replace(r"\$", "$").strip() for panel in drawn[0].axes[:3]] == names
    curves.score_by_length(
        {name: {K: 1.0} for name in names},
        tmp_path / "b.png",
        heading="RULER",
        axis="%",
        footnotes=["$\\no$"],
    )
    legend = [text.get_text().replace(r"\$", "$").strip() for text in drawn[1].legends[0].get_texts()]
    assert legend == [*names, "$\\no$"]
    curves.table(
        "RULER", ["$\\no$"], [(name, ["$\\no$"], False) for name in names], tmp_path / "c.png", ["$\\no$"]
    )
    assert all(path.stat().st_size for path in tmp_path.iterdir()) and len(drawn) == 3


def test_bars_are_explained(drawn, tmp_path):
    columns = (
        ReportColumn("speed", "tokens/s", str, "of all ranks", higher_is_better=True),
        ReportColumn("bytes", "peak", str, higher_is_better=False),
        ReportColumn("ratio", "measured/planned"),
    )
    rows = [
        {"name": "ring", "ours": True, "speed": 3, "bytes": 1, "ratio": 1},
        {"name": "other", "speed": 2},
        {"name": "absent", "note": "not installed"},
    ]
    report = SpeedReport(
        kind="attention",
        about={"device": "CPU", "torch": "2", "date": "today"},
        columns=columns,
        bars=("speed", "bytes", "ratio"),
        rows=rows,
    )
    measure_report.plot(report, tmp_path / "a.png")
    titles = [panel.get_title() for panel in drawn[0].axes]
    assert titles == ["tokens/s\nhigher is better", "peak\nlower is better", "measured/planned"]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["this project", "other code, or the reference", "tokens/s: of all ranks"]
    bars = drawn[0].axes[0].patches
    assert len(bars) == 2 and bars[0].get_hatch() is None and bars[1].get_hatch()  # differ without colour
    assert "not measured" in texts(drawn[0]) and "absent" not in texts(drawn[0])


def test_figures_are_written_whole_or_not_at_all(tmp_path):
    figure = plot_style.new_figure(2, 2)
    plot_style.save_figure(figure, tmp_path / "a.png")
    first = (tmp_path / "a.png").read_bytes()
    plot_style.save_figure(figure, tmp_path / "a.png")
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match="missing"):
        plot_style.save_figure(figure, tmp_path / "missing" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
