"""Results of several models as the paper's tables, with its published rows beside them: Markdown, CSV and plots.

A cell without a result is "-". An average over lengths is told only where its greatest length was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate import curves, published, results
from megatron_ultralong.evaluate.plots import tokens
from megatron_ultralong.evaluate.report_read import TASKS, Result, collect

K = 1024
RULER = {"RULER <128K": 128 * K, "RULER <512K": 512 * K, "RULER <1M": K * K}
LVEVAL = {"LV-Eval <128K": 128 * K, "LV-Eval <256K": 256 * K}
LONG = (*RULER, *LVEVAL, "InfiniteBench")
STANDARD = ("MMLU", "MMLU-Pro", "MATH", "GSM8K", "HumanEval")
WHOLE = {"ruler": 13, "lveval": 11, "infinitebench": 12}
"""Tasks or sets of the whole benchmark."""

Cells = dict[str, dict[str, float]]
"""By row and column."""
Table = tuple[str, str, list[str], Cells, list[str]]
"""(name of its files, heading, columns, cells, which rows are published)."""


def write(places: Iterable[str], out: Path, *, with_published: bool = True) -> list[str]:
    """Write report.md, a .csv a table and plots into `out`; returns lines to print. UserError where no result is found.

    places: PATH or NAME=PATH, see report_read.collect.
    """
    found, notes = collect(places)
    if not found:
        raise UserError("--results: no results found; give the files or directories that the other commands wrote")
    tables = build(found, with_published)
    text = ["# Evaluation", ""]
    for name, heading, columns, cells, others in tables:
        text += [f"## {heading}", "", markdown(columns, cells, others), "", *([published.PASSKEY, ""] if name == "passkey" and with_published else [])]
        results.write_text(out / f"{name}.csv", as_csv(columns, cells, others))
    if with_published:
        text += [f"*Rows in italics are published figures ({published.SOURCE}), not measured here.*", ""]
    text += [f"- {line}" for line in _parts(found)]
    results.write_text(out / "report.md", "\n".join(text) + "\n")
    drawn = _plots(found, tables, out)
    return [*notes, f"{out / 'report.md'} written: {len(found)} results of {len({result.model for result in found})} models, "
            f"{len(tables)} tables{', ' + ', '.join(drawn) if drawn else ''}"]


def build(found: list[Result], with_published: bool = True) -> list[Table]:
    """The tables that there is anything for."""
    ours = {task: _by_model(found, task) for task in TASKS}
    long: Cells = {}
    for task, columns in (("ruler", RULER), ("lveval", LVEVAL)):
        for model, scores in ours[task].items():
            _average(long.setdefault(model, {}), _means(scores), columns)
    for model, scores in ours["infinitebench"].items():
        if scores:
            long.setdefault(model, {})["InfiniteBench"] = _mean(scores.values())
    standard: Cells = {}
    for model, scores in ours["standard"].items():
        standard[model] = dict(scores)
        if all(name in scores for name in STANDARD):
            standard[model]["average"] = _mean(scores[name] for name in STANDARD)
    more = sorted({name for row in standard.values() for name in row} - {*STANDARD, "average"})
    perplexity = {model: {int(length): values["perplexity"] for length, values in scores.items() if values.get("perplexity") is not None}
                  for model, scores in ours["perplexity"].items()}
    long_published, standard_published = (published.LONG, published.STANDARD) if with_published else ({}, {})
    tables = [_table("long_context", "Long contexts (%)", [*LONG], long, long_published),
              _by_length("ruler", "RULER by length (%)", {model: _means(scores) for model, scores in ours["ruler"].items()}),
              _by_length("lveval", "LV-Eval by length (%)", {model: _means(scores) for model, scores in ours["lveval"].items()}),
              _table("infinitebench", "InfiniteBench by task (%)", _columns(ours["infinitebench"]), ours["infinitebench"], {}),
              _table("standard", "Standard benchmarks (%)", [*STANDARD, "average", *more], standard, standard_published),
              _by_length("passkey", "Passkey retrieval by length, all depths (%)", ours["niah"]),
              _by_length("perplexity", "Perplexity by length", perplexity)]
    return [table for table in tables if set(table[3]) - set(table[4])]


# ---- arithmetic ----------------------------------------------------------------------------------------------------

def _by_model(found: list[Result], task: str) -> dict[str, dict[Any, Any]]:
    """{model: scores}, those of several files put together; the later one counts where two tell the same."""
    models: dict[str, dict[Any, Any]] = {}
    for result in found:
        if result.task == task:
            scores = models.setdefault(result.model, {})
            for name, value in result.scores.items():
                scores[name] = {**scores[name], **value} if task in ("ruler", "lveval") and name in scores else value
    return models


def _means(scores: dict[str, dict[int, float]]) -> dict[int, float]:
    """Mean over tasks of each length."""
    return {length: _mean(task[length] for task in scores.values() if length in task)
            for length in sorted({length for task in scores.values() for length in task})}


def _average(row: dict[str, float], by_length: dict[int, float], columns: dict[str, int]) -> None:
    """Means over lengths up to each column's, where that length itself was measured."""
    for name, top in columns.items():
        if top in by_length:
            row[name] = _mean(score for length, score in by_length.items() if length <= top)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


# ---- form ----------------------------------------------------------------------------------------------------------

def _table(name: str, heading: str, columns: list[str], cells: Cells, theirs: Cells) -> Table:
    others = {f"{model} (published)": row for model, row in theirs.items()}
    return name, heading, columns, {**{model: row for model, row in cells.items() if row}, **others}, [*others]


def _by_length(name: str, heading: str, cells: dict[str, dict[int, float]]) -> Table:
    lengths = sorted({length for row in cells.values() for length in row})
    return _table(name, heading, [tokens(length) for length in lengths],
                  {model: {tokens(length): score for length, score in row.items()} for model, row in cells.items()}, {})


def _columns(cells: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in cells.values() for name in row))


def _shown(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return f"{value:.2f}" if isinstance(value, (int, float)) else "-"


def markdown(columns: list[str], cells: Cells, italic: list[str]) -> str:
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, row in cells.items():
        name = model.replace("|", "\\|")
        lines.append(f"| {f'*{name}*' if model in italic else name} | " + " | ".join(_shown(row, column) for column in columns) + " |")
    return "\n".join(lines)


def as_csv(columns: list[str], cells: Cells, theirs: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "source", *columns])
    for model, row in cells.items():
        writer.writerow([model.removesuffix(" (published)") if model in theirs else model, published.SOURCE if model in theirs else "measured",
                         *(_shown(row, column) for column in columns)])
    return text.getvalue()


def _parts(found: list[Result]) -> list[str]:
    """What makes figures no whole benchmark's."""
    lines = [f"{result.model}, {result.task}: only the first {result.raw['settings']['limit']} questions of each task"
             for result in found if (result.raw.get("settings") or {}).get("limit")]
    for task, whole in WHOLE.items():
        for model, scores in _by_model(found, task).items():
            lengths = f"; lengths {', '.join(tokens(length) for length in _means(scores))}" if task != "infinitebench" else ""
            if len(scores) < whole or lengths:
                lines.append(f"{model}, {task}: {len(scores)} of {whole} {'sets' if task == 'lveval' else 'tasks'}{lengths}")
    return lines


def _plots(found: list[Result], tables: list[Table], out: Path) -> list[str]:
    drawn = []
    for name, heading, columns, cells, theirs in tables:
        if name in ("long_context", "standard"):
            curves.table(heading, columns, [(model, [_shown(row, column) for column in columns], model in theirs) for model, row in cells.items()],
                         out / f"{name}.png")
            drawn.append(f"{name}.png")
    ruler = {model: _means(scores) for model, scores in _by_model(found, "ruler").items()}
    if any(len(points) > 1 for points in ruler.values()):
        curves.by_length(ruler, out / "ruler.png", heading="RULER by length", axis="average over tasks (%)")
        drawn.append("ruler.png")
    perplexity = [result.raw for result in found if result.task == "perplexity" and result.scores]
    if perplexity:
        curves.by_position(perplexity, out / "perplexity.png")
        drawn.append("perplexity.png")
    return drawn
