"""Results of several models as the paper's tables, with its published rows beside them: Markdown, CSV and
plots.

A cell without a result is "-". An average over lengths is told only where its greatest length was measured. A
score that is none to compare as it stands (a part of the questions, own wording, cut prompts) has a mark in
its cell, and the notes of its table say why: cells.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import results, stages
from megatron_ultralong.evaluate.report import curves, published
from megatron_ultralong.evaluate.report.cells import Cell, joined, mean
from megatron_ultralong.evaluate.report.heat_map import tokens
from megatron_ultralong.evaluate.report.markdown import Rows, Table, as_csv, markdown
from megatron_ultralong.evaluate.report.read_results import SEVERAL, TASKS, Result, collect, length_of
from megatron_ultralong.evaluate.tasks import infinitebench, lveval
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS as RULER_TASKS

RULER = tuple(f"RULER <{tokens(bound)}" for bound in ruler.BOUNDS)
LVEVAL = {
    f"LV-Eval {label}": [length for level in levels if (length := length_of(level))]
    for label, levels in lveval.AVERAGES.items()
}
LONG = (*RULER, *LVEVAL, "InfiniteBench")
STANDARD = ("MMLU", "MMLU-Pro", "MATH", "GSM8K", "HumanEval")
HEADING = "# Evaluation"
FILES = (
    *(
        f"{name}.csv"
        for name in (
            "long_context",
            "ruler",
            "lveval",
            "infinitebench",
            "standard",
            "passkey",
            "passkeys",
            "perplexity",
        )
    ),
    *(f"{name}.png" for name in ("long_context", "standard", "ruler", "perplexity")),
)
"""All that a report may hold beside report.md."""
NAMED = 3
"""Files that are named where none is of use."""


def write(places: Iterable[str], out: Path, *, with_published: bool = True) -> list[str]:
    """Write report.md, a .csv a table and plots into `out`; returns lines to print. UserError where no result
    is found.

    places: PATH or NAME=PATH, see report_read.collect. Tables and plots that an earlier report left there and
    this one has not are removed.
    """
    found, left_out, notes = collect(places)
    if not found:
        more = f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        raise UserError(
            "--results: no results found; give the files or directories that the other commands wrote"
            + (f" ({'; '.join(left_out[:NAMED])}{more})" if left_out else "")
        )
    results.make_writable(out)
    earlier = _is_report(out / "report.md")
    tables = build(found, with_published)
    text = [HEADING, ""]
    for table in tables:
        text += [f"## {table.heading}", "", markdown(table), ""]
        if table.name == "passkey" and with_published:
            text += [published.PASSKEY, ""]
        results.write_text(out / f"{table.name}.csv", as_csv(table))
    if with_published:
        text += [f"*Rows in italics are published figures ({published.SOURCE}), not measured here.*", ""]
    text += [f"- {line}" for line in notes]
    results.write_text(out / "report.md", "\n".join(text) + "\n")
    drawn = _plots(found, tables, out)
    stale = [
        out / name
        for name in FILES
        if earlier
        and name not in {*drawn, *(f"{table.name}.csv" for table in tables)}
        and (out / name).exists()
    ]
    for path in stale:
        path.unlink()
    return [
        *left_out,
        *notes,
        *(
            [f"{', '.join(path.name for path in stale)} of an earlier report removed from {out}"]
            if stale
            else []
        ),
        f"{out / 'report.md'} written: {len(found)} results of {len({result.model for result in found})} models, "
        f"{len(tables)} tables{', ' + ', '.join(drawn) if drawn else ''}",
    ]


def build(found: list[Result], with_published: bool = True) -> list[Table]:
    """The tables that there is anything for."""
    ours = {task: _by_row(_of_text(found), task) for task in (*TASKS, SEVERAL)}
    long: Rows = {}
    lengths: dict[str, dict[str, dict[int, Cell]]] = {"ruler": {}, "lveval": {}}
    for task, averages in (("ruler", _ruler), ("lveval", _lveval)):
        for model, scores in ours[task].items():
            lengths[task][model], up_to = averages(scores)
            long.setdefault(model, {}).update(up_to)
    for model, scores in ours["infinitebench"].items():
        long.setdefault(model, {})["InfiniteBench"] = mean(
            scores.values(), *_of(len(scores), len(infinitebench.TASKS), "tasks")
        )
    standard: Rows = {
        model: {
            **scores,
            **(
                {"average": mean(scores[name] for name in STANDARD)} if set(STANDARD) <= scores.keys() else {}
            ),
        }
        for model, scores in ours["standard"].items()
    }
    more = sorted({name for row in standard.values() for name in row} - {*STANDARD, "average"})
    long_published, standard_published = (published.LONG, published.STANDARD) if with_published else ({}, {})
    tables = [
        _table("long_context", "Long contexts (%)", [*LONG], long, long_published),
        _by_length("ruler", "RULER by length (%)", lengths["ruler"]),
        _by_length("lveval", "LV-Eval by length (%)", lengths["lveval"]),
        _table(
            "infinitebench",
            "InfiniteBench by task (%)",
            list(dict.fromkeys(name for row in ours["infinitebench"].values() for name in row)),
            ours["infinitebench"],
            {},
        ),
        _table(
            "standard", "Standard benchmarks (%)", [*STANDARD, "average", *more], standard, standard_published
        ),
        _by_length(
            "passkey", "Passkey retrieval by length, all depths, own wording and grid (%)", ours["niah"]
        ),
        _by_length(
            "passkeys",
            "Several pass keys in a prompt, share found by length, all depths, own wording and grid (%)",
            ours[SEVERAL],
        ),
        _by_length("perplexity", "Perplexity by length", ours["perplexity"]),
    ]
    return [table for table in tables if set(table.rows) - set(table.theirs)]


# ---- averages ----------------------------------------------------------------------------------


def _by_row(found: list[Result], task: str) -> dict[str, dict[Any, Any]]:
    """{row: scores}, those of several files put together; the later one counts where two tell the same."""
    rows: dict[str, dict[Any, Any]] = {}
    for result in found:
        if result.task == task:
            scores = rows.setdefault(result.row, {})
            for name, value in result.scores.items():
                scores[name] = (
                    {**scores[name], **value} if task in ("ruler", "lveval") and name in scores else value
                )
    return rows


def _ruler(scores: dict[str, dict[int, Cell]]) -> tuple[dict[int, Cell], dict[str, Cell]]:
    """(by length, up to the paper's bounds), as ruler.json has them."""
    told = ruler.averages(
        {
            task: {str(length): {"score": cell.value} for length, cell in cells.items()}
            for task, cells in scores.items()
        }
    )
    by_length = {
        int(length): joined(
            one["average"],
            (cells[int(length)] for cells in scores.values() if int(length) in cells),
            *_of(one["tasks"], len(RULER_TASKS), "tasks"),
        )
        for length, one in told["by_length"].items()
    }
    return by_length, {
        f"RULER <{bound}": joined(
            one["average"],
            (by_length[length] for length in one["lengths"]),
            *([] if one["complete"] else [f"mean of {', '.join(map(tokens, one['lengths']))}"]),
        )
        for bound, one in told["up_to"].items()
    }


def _lveval(scores: dict[str, dict[int, Cell]]) -> tuple[dict[int, Cell], dict[str, Cell]]:
    """(by length, up to the paper's bounds), as lveval.json has them: a mean over sets and lengths, which all
    weigh the same."""

    def average(wanted: list[int], what: str) -> Cell:
        cells = [cell for of_set in scores.values() for length, cell in of_set.items() if length in wanted]
        one = stages.average([cell.value for cell in cells], len(lveval.SETS) * len(wanted))
        return joined(one["score"], cells, *_of(one["cells"], one["of"], what))

    lengths = sorted({length for of_set in scores.values() for length in of_set})
    return (
        {length: average([length], "sets") for length in lengths},
        {
            name: average(wanted, "sets and lengths")
            for name, wanted in LVEVAL.items()
            if wanted[-1] in lengths
        },
    )


def _of(count: int, whole: int, what: str) -> list[str]:
    return [] if count == whole else [f"{count} of {whole} {what}"]


def _of_text(found: list[Result]) -> list[Result]:
    """The results; perplexities that are not all of the same text are each told with their own."""
    if len({curves.text_of(result.raw) for result in found if result.task == "perplexity"}) < 2:
        return found
    return [
        result
        if result.task != "perplexity"
        else replace(
            result,
            scores={
                length: joined(cell.value, [cell], f"text: {curves.text_of(result.raw)}")
                for length, cell in result.scores.items()
            },
        )
        for result in found
    ]


# ---- form --------------------------------------------------------------------------------------


def _table(
    name: str, heading: str, columns: list[str], rows: Rows, theirs: dict[str, dict[str, float]]
) -> Table:
    others = {
        f"{model} (published)": {column: Cell(value=score) for column, score in row.items()}
        for model, row in theirs.items()
    }
    return Table(
        name=name,
        heading=heading,
        columns=columns,
        rows={**{model: row for model, row in rows.items() if row}, **others},
        theirs=[*others],
    )


def _by_length(name: str, heading: str, rows: dict[str, dict[int, Cell]]) -> Table:
    return _table(
        name,
        heading,
        [tokens(length) for length in sorted({length for row in rows.values() for length in row})],
        {model: {tokens(length): row[length] for length in sorted(row)} for model, row in rows.items()},
        {},
    )


def _is_report(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(f"{HEADING}\n")
    except (OSError, ValueError):
        return False


def _plots(found: list[Result], tables: list[Table], out: Path) -> list[str]:
    drawn = []
    for table in tables:
        if table.name in ("long_context", "standard"):
            curves.table(
                table.heading,
                table.columns,
                [(row, table.shown(row), row in table.theirs) for row in table.rows],
                out / f"{table.name}.png",
                table.foot(),
            )
            drawn.append(f"{table.name}.png")
    ruler_rows = {model: _ruler(scores)[0] for model, scores in _by_row(found, "ruler").items()}
    if any(len(cells) > 1 for cells in ruler_rows.values()):
        curves.by_length(
            {
                model + "".join(sorted({mark for cell in cells.values() for mark in cell.marks()})): {
                    length: cell.value for length, cell in cells.items()
                }
                for model, cells in ruler_rows.items()
            },
            out / "ruler.png",
            heading="RULER by length",
            axis="average over tasks (%)",
            foot=next(table.foot() for table in tables if table.name == "ruler"),
        )
        drawn.append("ruler.png")
    perplexity = [
        {**result.raw, "model": {**(result.raw.get("model") or {}), "name": result.model}}
        for result in found
        if result.task == "perplexity"
    ]
    if perplexity:
        curves.by_position(perplexity, out / "perplexity.png")
        drawn.append("perplexity.png")
    return drawn
