"""The tables and plots of an ablation: mean and spread over seeds, and the paper's own ablations beside them,
marked as published."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ultralong.ablate.grid import Grid
from megatron_ultralong.ablate.scores import NAMES, Row
from megatron_ultralong.evaluate.pipeline.results import short_count
from megatron_ultralong.evaluate.report import curves, published
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.text_table import text_table

DIGITS = {"niah": 1, "perplexity": 3}
SPREAD = "± is the sample standard deviation over seeds."
_PUBLISHED = "ablation, 1M after pretraining: "
"""Begins the names of the paper's ablations in `published.LONG`."""


def write(rows: Sequence[Row], grid: Grid, out: Path) -> list[str]:
    """Write ablation.md, .csv, .json and the plots into `out`; return the lines of the terminal's table.
    UserError where one cannot be written."""
    text = [f"# Ablation: {grid.path.stem}", "", *markdown(rows, grid), "", *published_markdown()]
    atomic_files.write_text(out / "ablation.md", "\n".join(text) + "\n")
    atomic_files.write_text(out / "ablation.csv", as_csv(rows, grid))
    atomic_files.write_json(out / "ablation.json", as_json(rows, grid))
    passkey = {
        row.label: {length: score.mean for (task, length), score in row.scores.items() if task == "niah"}
        for row in rows
    }
    seeds = f"Mean over seeds {', '.join(map(str, grid.seeds))}."
    if any(passkey.values()):
        curves.score_by_length(
            passkey,
            out / "passkey.png",
            heading="Passkey retrieval by length",
            axis="pass keys found, %",
            footnotes=[seeds],
        )
    by_position = [row.by_position for row in rows if row.by_position is not None]
    if by_position:
        curves.perplexity_by_position(by_position, out / "perplexity.png")
    return terminal(rows, grid)


def columns(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(benchmark, length) of every score, in order."""
    return sorted(
        {key for row in rows for key in row.scores}, key=lambda key: (list(NAMES).index(key[0]), key[1])
    )


def _heading(column: tuple[str, int]) -> str:
    return f"{NAMES[column[0]]} {short_count(column[1])}"


def _cells(row: Row, shown: Sequence[tuple[str, int]]) -> list[str]:
    return [row.scores[key].text(DIGITS[key[0]]) if key in row.scores else "-" for key in shown]


def _runs(row: Row) -> str:
    """How many runs a row is of."""
    if not row.seeds:
        return "untrained"
    return f"{len(row.seeds)}" if len(row.seeds) == row.planned else f"{len(row.seeds)} of {row.planned}"


def markdown(rows: Sequence[Row], grid: Grid) -> list[str]:
    """The table as lines of Markdown."""
    shown = columns(rows)
    axes = list(grid.axes)
    heads = [*axes, "seeds", "tokens", *map(_heading, shown)]
    lines = [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(axes) + "---:|" * (len(heads) - len(axes)),
    ]
    for row in rows:
        words = [*row.values.values(), _runs(row), f"{row.tokens:,}", *_cells(row, shown)]
        lines.append("| " + " | ".join(words) + " |")
    return [*lines, "", f"Passkey: percent of pass keys found. {SPREAD}", *([grid.note] if grid.note else [])]


def published_markdown() -> list[str]:
    """The paper's ablations as lines of Markdown."""
    ablations = _published()
    names = list(dict.fromkeys(name for scores in ablations.values() for name in scores))
    lines = [
        f"Published ({published.SOURCE}, Tables 3 and 4: Llama-3.1-8B-Instruct extended to 1M tokens), not measured here:",
        "",
        "| *published* | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for name, scores in ablations.items():
        words = [f"*{name}*", *(f"*{scores[one]:.2f}*" if one in scores else "-" for one in names)]
        lines.append("| " + " | ".join(words) + " |")
    return lines


def _published() -> dict[str, dict[str, float]]:
    return {
        name.removeprefix(_PUBLISHED): scores
        for name, scores in published.LONG.items()
        if name.startswith(_PUBLISHED)
    }


def terminal(rows: Sequence[Row], grid: Grid) -> list[str]:
    """The table as plain text."""
    shown = columns(rows)
    table = [[", ".join(grid.axes) or "run", "seeds", *map(_heading, shown)]]
    table += [[row.label, _runs(row), *_cells(row, shown)] for row in rows]
    return [*text_table(table), SPREAD]


def as_csv(rows: Sequence[Row], grid: Grid) -> str:
    """The table with mean and deviation in columns of their own, and the published rows."""
    shown = columns(rows)
    ablations = _published()
    names = list(dict.fromkeys(name for scores in ablations.values() for name in scores))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = [f"{_heading(key)} {kind}" for key in shown for kind in ("mean", "deviation")]
    writer.writerow([*grid.axes, "source", "seeds", "tokens", *pairs, *names])
    for row in rows:
        figures: list[Any] = []
        for key in shown:
            score = row.scores.get(key)
            figures += ["", ""] if score is None else [score.mean, score.deviation]
        writer.writerow(
            [*row.values.values(), "measured", len(row.seeds), row.tokens, *figures, *[""] * len(names)]
        )
    for name, scores in ablations.items():
        first = [name, *[""] * (len(grid.axes) - 1)] if grid.axes else []
        empty = [""] * (2 + len(pairs))
        writer.writerow([*first, published.SOURCE, *empty, *(scores.get(one, "") for one in names)])
    return text.getvalue()


def as_json(rows: Sequence[Row], grid: Grid) -> dict[str, Any]:
    """The rows with every seed's score, and perplexity by position."""
    return {
        "format": 1,
        "grid": grid.path.name,
        "seeds": list(grid.seeds),
        "rows": [
            {
                "values": row.values,
                "seeds": list(row.seeds),
                "tokens": row.tokens,
                "scores": [
                    {
                        "task": NAMES[task],
                        "length": length,
                        "mean": score.mean,
                        "deviation": score.deviation,
                        "values": list(score.values),
                    }
                    for (task, length), score in row.scores.items()
                ],
                "by_position": row.by_position.extra["by_length"] if row.by_position else None,
            }
            for row in rows
        ],
        "published": {"source": published.SOURCE, "rows": _published()},
    }
