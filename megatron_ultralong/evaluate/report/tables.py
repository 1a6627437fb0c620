"""The paper's tables from the results of several models, next to its published figures: Markdown, CSV and
plots.

A cell without a result is "-". An average over lengths is shown only where its greatest length was measured.
A score that is not comparable as it stands (a part of the questions, own wording, cut prompts) has a mark in
its cell, and the notes of its table give the reasons (cells.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import file_benchmark
from megatron_ultralong.evaluate.pipeline.results import BENCHMARKS, short_count
from megatron_ultralong.evaluate.report import curves, published
from megatron_ultralong.evaluate.report.cells import TableCell, combined, mean
from megatron_ultralong.evaluate.report.markdown import CellsByRow, ReportTable, as_csv, markdown
from megatron_ultralong.evaluate.report.read_results import SEVERAL, ModelScores, collect
from megatron_ultralong.evaluate.tasks import infinitebench, lveval
from megatron_ultralong.evaluate.tasks.ruler import averages as ruler_averages
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS as RULER_TASKS
from megatron_ultralong.io import atomic_files

RULER = tuple(f"RULER <{short_count(bound)}" for bound in ruler_averages.BOUNDS)
LVEVAL = {
    f"LV-Eval {label}": [lveval.LENGTHS[level] for level in levels]
    for label, levels in lveval.AVERAGES.items()
}
LONG = (*RULER, *LVEVAL, "InfiniteBench")
STANDARD = ("MMLU", "MMLU-Pro", "MATH", "GSM8K", "HumanEval")
HEADING = "# Evaluation"
_TABLES = "long_context ruler lveval infinitebench standard passkey passkeys perplexity".split()
_PLOTS = "long_context standard ruler perplexity".split()
FILES = (*(f"{name}.csv" for name in _TABLES), *(f"{name}.png" for name in _PLOTS))
"""All files that a report may contain besides report.md."""
_NAMED_FILES = 3
"""Number of files that the error lists if none is a result."""


def write(places: Iterable[str], out: Path, *, with_published: bool = True) -> list[str]:
    """Write report.md, a .csv per table and plots into `out`; returns lines to print. UserError where no
    results are found.

    places: PATH or NAME=PATH, see read_results.collect. Tables and plots of an earlier report in `out` that
    this one does not contain are removed.
    """
    results, left_out, notes = collect(places)
    if not results:
        more = f"; and {len(left_out) - _NAMED_FILES} more" if len(left_out) > _NAMED_FILES else ""
        raise UserError(
            "--results: no results found; give the files or directories that the other commands wrote"
            + (f" ({'; '.join(left_out[:_NAMED_FILES])}{more})" if left_out else "")
        )
    atomic_files.check_writable(out, f"--output {out}")
    had_report = _is_report(out / "report.md")
    tables = build(results, with_published)
    text = [HEADING, ""]
    for table in tables:
        text += [f"## {table.heading}", "", markdown(table), ""]
        if table.name == "passkey" and with_published:
            text += [published.PASSKEY, ""]
        atomic_files.write_text(out / f"{table.name}.csv", as_csv(table))
    if with_published:
        text += [f"*Rows in italics are published figures ({published.SOURCE}), not measured here.*", ""]
    text += [f"- {line}" for line in notes]
    atomic_files.write_text(out / "report.md", "\n".join(text) + "\n")
    plots = _draw(results, tables, out)
    written = {*plots, *(f"{table.name}.csv" for table in tables)}
    stale = [out / name for name in FILES if had_report and name not in written and (out / name).exists()]
    for path in stale:
        path.unlink()
    if stale:
        notes.append(
            f"removed from {out}, left by an earlier report: {', '.join(path.name for path in stale)}"
        )
    return [
        *left_out,
        *notes,
        f"{out / 'report.md'} written: {len(results)} results of {len({one.model for one in results})} models, "
        f"{', '.join([f'{len(tables)} tables', *plots])}",
    ]


def build(results: list[ModelScores], with_published: bool = True) -> list[ReportTable]:
    """Make the tables that contain any result."""
    measured = {kind: _by_row(_with_texts(results), kind) for kind in (*BENCHMARKS, SEVERAL)}
    long: CellsByRow = {}
    by_length: dict[str, dict[str, dict[int, TableCell]]] = {"ruler": {}, "lveval": {}}
    for kind, averages in (("ruler", _ruler), ("lveval", _lveval)):
        for model, scores in measured[kind].items():
            by_length[kind][model], up_to = averages(scores)
            long.setdefault(model, {}).update(up_to)
    for model, scores in measured["infinitebench"].items():
        long.setdefault(model, {})["InfiniteBench"] = mean(
            scores.values(), *_part(len(scores), len(infinitebench.TASKS), "tasks")
        )
    standard: CellsByRow = {}
    for model, scores in measured["standard"].items():
        complete = set(STANDARD) <= scores.keys()
        standard[model] = {
            **scores,
            **({"average": mean(scores[name] for name in STANDARD)} if complete else {}),
        }
    more = sorted({name for row in standard.values() for name in row} - {*STANDARD, "average"})
    tasks = list(dict.fromkeys(name for row in measured["infinitebench"].values() for name in row))
    long_published, standard_published = (published.LONG, published.STANDARD) if with_published else ({}, {})
    tables = [
        _table("long_context", "Long contexts (%)", [*LONG], long, long_published),
        _length_table("ruler", "RULER by length (%)", by_length["ruler"]),
        _length_table("lveval", "LV-Eval by length (%)", by_length["lveval"]),
        _table("infinitebench", "InfiniteBench by task (%)", tasks, measured["infinitebench"]),
        _table(
            "standard", "Standard benchmarks (%)", [*STANDARD, "average", *more], standard, standard_published
        ),
        _length_table(
            "passkey", "Passkey retrieval by length, all depths, own wording and grid (%)", measured["niah"]
        ),
        _length_table(
            "passkeys",
            "Several pass keys per prompt, fraction found by length, all depths, own wording and grid (%)",
            measured[SEVERAL],
        ),
        _length_table("perplexity", "Perplexity by length", measured["perplexity"]),
    ]
    return [table for table in tables if set(table.rows) - set(table.published)]


# ---- averages ----------------------------------------------------------------------------------


def _by_row(results: list[ModelScores], kind: str) -> dict[str, dict[Any, Any]]:
    """{row: scores}, merged from several files; where two contain the same score, the later one is used."""
    rows: dict[str, dict[Any, Any]] = {}
    for one in results:
        if one.kind == kind:
            scores = rows.setdefault(one.row, {})
            for name, value in one.scores.items():
                merge = kind in ("ruler", "lveval") and name in scores
                scores[name] = {**scores[name], **value} if merge else value
    return rows


def _ruler(scores: dict[str, dict[int, TableCell]]) -> tuple[dict[int, TableCell], dict[str, TableCell]]:
    """(by length, up to the paper's bounds), computed as in ruler.json."""
    averages = ruler_averages.averages(
        {task: {length: cell.value for length, cell in cells.items()} for task, cells in scores.items()}
    )
    by_length = {
        int(length): combined(
            one["average"],
            (cells[int(length)] for cells in scores.values() if int(length) in cells),
            *_part(one["tasks"], len(RULER_TASKS), "tasks"),
        )
        for length, one in averages["by_length"].items()
    }
    return by_length, {
        f"RULER <{bound}": combined(
            one["average"],
            (by_length[length] for length in one["lengths"]),
            *([] if one["complete"] else [f"mean of {', '.join(map(short_count, one['lengths']))}"]),
        )
        for bound, one in averages["up_to"].items()
    }


def _lveval(scores: dict[str, dict[int, TableCell]]) -> tuple[dict[int, TableCell], dict[str, TableCell]]:
    """(by length, up to the paper's bounds), computed as in lveval.json: all sets and lengths have the same
    weight."""

    def average(lengths: list[int], what: str) -> TableCell:
        cells = [cell for of_set in scores.values() for length, cell in of_set.items() if length in lengths]
        one = file_benchmark.average([cell.value for cell in cells], len(lveval.SETS) * len(lengths))
        return combined(one["score"], cells, *_part(one["cells"], one["of"], what))

    measured = sorted({length for of_set in scores.values() for length in of_set})
    return (
        {length: average([length], "sets") for length in measured},
        {
            name: average(lengths, "sets and lengths")
            for name, lengths in LVEVAL.items()
            if lengths[-1] in measured
        },
    )


def _part(count: int, complete: int, what: str) -> list[str]:
    return [] if count == complete else [f"{count} of {complete} {what}"]


def _with_texts(results: list[ModelScores]) -> list[ModelScores]:
    """Return the results; where perplexities were measured on different texts, each gets a note that names
    its text."""
    if len({curves.text_of(one.result) for one in results if one.kind == "perplexity"}) < 2:
        return results
    return [
        one
        if one.kind != "perplexity"
        else replace(
            one,
            scores={
                length: combined(cell.value, [cell], f"text: {curves.text_of(one.result)}")
                for length, cell in one.scores.items()
            },
        )
        for one in results
    ]


# ---- tables and plots --------------------------------------------------------------------------


def _table(
    name: str,
    heading: str,
    columns: list[str],
    rows: CellsByRow,
    figures: dict[str, dict[str, float]] | None = None,
) -> ReportTable:
    """A table of measured rows and published figures."""
    published_rows = {
        f"{model} (published)": {column: TableCell(value=score) for column, score in row.items()}
        for model, row in (figures or {}).items()
    }
    return ReportTable(
        name=name,
        heading=heading,
        columns=columns,
        rows={**{model: row for model, row in rows.items() if row}, **published_rows},
        published=[*published_rows],
    )


def _length_table(name: str, heading: str, rows: dict[str, dict[int, TableCell]]) -> ReportTable:
    lengths = sorted({length for row in rows.values() for length in row})
    cells = {
        model: {short_count(length): row[length] for length in sorted(row)} for model, row in rows.items()
    }
    return _table(name, heading, [short_count(length) for length in lengths], cells)


def _is_report(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(f"{HEADING}\n")
    except (OSError, ValueError):
        return False


def _draw(results: list[ModelScores], tables: list[ReportTable], out: Path) -> list[str]:
    """Draw the plots; returns their names."""
    drawn = []
    for table in tables:
        if table.name in ("long_context", "standard"):
            rows = [(row, table.shown(row), row in table.published) for row in table.rows]
            curves.table(table.heading, table.columns, rows, out / f"{table.name}.png", table.footnotes())
            drawn.append(f"{table.name}.png")
    ruler_rows = {model: _ruler(scores)[0] for model, scores in _by_row(results, "ruler").items()}
    if any(len(cells) > 1 for cells in ruler_rows.values()):
        marks = {
            model: "".join(sorted({mark for cell in cells.values() for mark in cell.marks()}))
            for model, cells in ruler_rows.items()
        }
        curves.score_by_length(
            {
                model + marks[model]: {length: cell.value for length, cell in cells.items()}
                for model, cells in ruler_rows.items()
            },
            out / "ruler.png",
            heading="RULER by length",
            axis="average over tasks (%)",
            footnotes=next(table.footnotes() for table in tables if table.name == "ruler"),
            trained={
                one.row + marks[one.row]: int(one.result.model.get("max_position") or 0)
                for one in results
                if one.kind == "ruler"
            },
        )
        drawn.append("ruler.png")
    perplexities = [
        replace(one.result, model={**one.result.model, "name": one.model})
        for one in results
        if one.kind == "perplexity"
    ]
    if perplexities:
        curves.perplexity_by_position(perplexities, out / "perplexity.png")
        drawn.append("perplexity.png")
    return drawn
