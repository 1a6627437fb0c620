"""Results of several models as the paper's tables, with its published rows beside them: Markdown, CSV and plots.

Every result is a JSON file {"format": 1, "task", "model", "settings", "scores"}, scores in percent:

    ruler          {task: {length: score}}, and beside it "averages": {length: score}
    lveval         {set: {length: score}}
    infinitebench  {task: score}
    standard       {name: score}
    perplexity     {length: {"perplexity", "by_position", ...}}
    niah           its own form: "by_length", shares of 1

A cell without a result is "-". An average over lengths is told only where its greatest length was measured.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate import curves, published, results
from megatron_ultralong.evaluate.plots import tokens

TASKS = ("ruler", "lveval", "infinitebench", "standard", "perplexity", "niah")
K = 1024
RULER = {"RULER <128K": 128 * K, "RULER <512K": 512 * K, "RULER <1M": K * K}
LVEVAL = {"LV-Eval <128K": 128 * K, "LV-Eval <256K": 256 * K}
LONG = (*RULER, *LVEVAL, "InfiniteBench")
STANDARD = ("MMLU", "MMLU-Pro", "MATH", "GSM8K", "HumanEval")

Cells = dict[str, dict[str, float]]
"""By row and column."""
Table = tuple[str, str, list[str], Cells, list[str]]
"""(name of its files, heading, columns, cells, which rows are published)."""


def write(paths: Iterable[Path], out: Path, *, with_published: bool = True) -> list[str]:
    """Write report.md, a .csv a table and plots into `out`; returns lines to print. UserError where no result is found."""
    found, notes = collect(paths)
    if not found:
        raise UserError("--results: no results found; give the files or directories that the other commands wrote")
    tables = build(found, with_published)
    text = ["# Evaluation", ""]
    for name, heading, columns, cells, others in tables:
        text += [f"## {heading}", "", markdown(columns, cells, others), "", *([published.PASSKEY, ""] if name == "passkey" and with_published else [])]
        results.write_text(out / f"{name}.csv", as_csv(columns, cells, others))
    if with_published:
        text += [f"*Italic rows are published figures ({published.SOURCE}), not measured here.*", ""]
    text += [f"- {line}" for line in _settings(found)]
    results.write_text(out / "report.md", "\n".join(text) + "\n")
    drawn = _plots(found, tables, out)
    return [*notes, f"{out / 'report.md'} written: {len(found)} results of {len({curves.label(result) for result in found})} models, "
            f"{len(tables)} tables{', ' + ', '.join(drawn) if drawn else ''}"]


def collect(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(results in the order of their files, a line for each file that is none). UserError where a path does not exist."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--results {path}: no such file or directory")
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found, notes = [], []
    for file in dict.fromkeys(files):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("task") not in TASKS:
                raise ValueError("is no result of an evaluation")
            if result.get("format") != 1:
                raise ValueError(f"has format {result.get('format')}, this version reads 1")
            if not isinstance(result.get("by_length" if result["task"] == "niah" else "scores"), dict):
                raise ValueError("has no scores")
        except (OSError, ValueError) as error:
            notes.append(f"{file} left out: {error}")
            continue
        found.append(result)
    return found, notes


def build(found: list[dict[str, Any]], with_published: bool = True) -> list[Table]:
    """The tables that there is anything for."""
    ours = {task: _by_model(found, task) for task in TASKS}
    long: Cells = {}
    for model, scores in ours["ruler"].items():
        _average(long, model, ruler_by_length(scores), RULER)
    for model, scores in ours["lveval"].items():
        _average(long, model, _means(scores), LVEVAL)
    for model, scores in ours["infinitebench"].items():
        if scores:
            long.setdefault(model, {})["InfiniteBench"] = _mean(scores.values())
    standard: Cells = {}
    for model, scores in ours["standard"].items():
        standard[model] = {name: score for name, score in scores.items() if isinstance(score, (int, float))}
        if all(name in scores for name in STANDARD):
            standard[model]["average"] = _mean(scores[name] for name in STANDARD)
    more = sorted({name for row in standard.values() for name in row} - {*STANDARD, "average"})
    passkey = {model: {tokens(length): score for length, score in sorted(_lengths(scores).items())} for model, scores in ours["niah"].items()}
    ruler = {model: {tokens(length): score for length, score in sorted(ruler_by_length(scores).items())} for model, scores in ours["ruler"].items()}
    perplexity = {model: {tokens(int(length)): values["perplexity"] for length, values in sorted(scores.items(), key=lambda item: int(item[0]))}
                  for model, scores in ours["perplexity"].items()}
    tables = [_table("long_context", "Long contexts (%)", [*LONG], long, published.LONG if with_published else {}),
              _table("ruler", "RULER by length (%)", _columns(ruler), ruler, {}),
              _table("infinitebench", "InfiniteBench by task (%)", _columns(ours["infinitebench"]), ours["infinitebench"], {}),
              _table("standard", "Standard benchmarks (%)", [*STANDARD, "average", *more], standard, published.STANDARD if with_published else {}),
              _table("passkey", "Passkey retrieval by length, all depths (%)", _columns(passkey), passkey, {}),
              _table("perplexity", "Perplexity by length", _columns(perplexity), perplexity, {})]
    return [table for table in tables if set(table[3]) - set(table[4])]


def ruler_by_length(scores: dict[str, Any]) -> dict[int, float]:
    """RULER's average of each length: as the result tells it, else over its tasks."""
    told = scores.get("averages")
    return _lengths(told) if isinstance(told, dict) else _means(scores)


# ---- arithmetic ----------------------------------------------------------------------------------------------------

def _by_model(found: list[dict[str, Any]], task: str) -> dict[str, dict[str, Any]]:
    """{model: scores}, those of several files put together; the later one counts where two tell the same."""
    models: dict[str, dict[str, Any]] = {}
    for result in found:
        if result["task"] != task:
            continue
        scores = models.setdefault(curves.label(result), {})
        new = {length: 100 * share for length, share in result["by_length"].items()} if task == "niah" else dict(result["scores"])
        if isinstance(result.get("averages"), dict):
            new["averages"] = result["averages"]
        for name, value in new.items():
            scores[name] = {**scores[name], **value} if task in ("ruler", "lveval") and isinstance(scores.get(name), dict) else value
    return models


def _lengths(scores: dict[str, Any]) -> dict[int, float]:
    return {int(length): float(score) for length, score in scores.items() if str(length).isdigit() and isinstance(score, (int, float))}


def _means(scores: dict[str, Any]) -> dict[int, float]:
    """Mean over tasks of each length."""
    tasks = [_lengths(values) for name, values in scores.items() if name != "averages" and isinstance(values, dict)]
    return {length: _mean(task[length] for task in tasks if length in task) for length in sorted({length for task in tasks for length in task})}


def _average(cells: Cells, model: str, by_length: dict[int, float], columns: dict[str, int]) -> None:
    """Means over lengths up to each column's, where that length itself was measured."""
    row = cells.setdefault(model, {})
    for name, top in columns.items():
        if top in by_length:
            row[name] = _mean(score for length, score in by_length.items() if length <= top)


def _mean(values: Iterable[float]) -> float:
    every = [float(value) for value in values]
    return sum(every) / len(every)


# ---- form ----------------------------------------------------------------------------------------------------------

def _table(name: str, heading: str, columns: list[str], cells: Cells, theirs: Cells) -> Table:
    rows = {model: row for model, row in cells.items() if row}
    others = {f"{model} (published)": row for model, row in theirs.items()}
    return name, heading, columns, {**rows, **others}, [*others]


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


def _settings(found: list[dict[str, Any]]) -> list[str]:
    """What makes figures hard to compare: limits on questions."""
    return [f"{curves.label(result)}, {result['task']}: only the first {result['settings']['limit']} questions of each task"
            for result in found if (result.get("settings") or {}).get("limit")]


def _plots(found: list[dict[str, Any]], tables: list[Table], out: Path) -> list[str]:
    drawn = []
    for name, heading, columns, cells, theirs in tables:
        if name in ("long_context", "standard"):
            curves.table(heading, columns, [(model, [_shown(row, column) for column in columns], model in theirs) for model, row in cells.items()],
                         out / f"{name}.png")
            drawn.append(f"{name}.png")
    ruler = {model: ruler_by_length(scores) for model, scores in _by_model(found, "ruler").items()}
    if any(len(points) > 1 for points in ruler.values()):
        curves.by_length(ruler, out / "ruler.png", heading="RULER by length", axis="average over tasks (%)")
        drawn.append("ruler.png")
    perplexity = [result for result in found if result["task"] == "perplexity"]
    if perplexity:
        curves.by_position(perplexity, out / "perplexity.png")
        drawn.append("perplexity.png")
    return drawn

