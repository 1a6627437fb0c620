"""The report as JSON and as a Markdown table: every figure beside its prediction and the relative error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ultralong.gpu_report import extension, machine
from megatron_ultralong.gpu_report.journal import Journal
from megatron_ultralong.gpu_report.sizes import Work
from megatron_ultralong.io import atomic_files
from megatron_ultralong.measure import attention, generation, loss, step
from megatron_ultralong.measure.number_format import byte_count, integer
from megatron_ultralong.measure.report import ReportColumn

FORMAT = 1
TEST_COLUMNS = tuple(ReportColumn(name, name, integer) for name in ("passed", "failed", "skipped"))
COLUMNS: dict[str, Sequence[ReportColumn]] = {
    "tests": TEST_COLUMNS,
    "attention": attention.COLUMNS,
    "loss": loss.COLUMNS,
    "step": step.COLUMNS,
    "longest": step.COLUMNS,
    "generation": generation.COLUMNS,
    "extension": extension.COLUMNS,
}
SHOWN_BESIDE = ("planned_bytes", "measured_over_planned", "prefill_tokens_per_second")
"""Columns whose figures are in the columns of the prediction."""
FACTS = (
    "device",
    "memory_bytes",
    "capability",
    "driver",
    "torch",
    "cuda",
    "cudnn",
    "triton",
    "transformer-engine",
)
MORE_FACTS = ("megatron-core", "transformers", "python", "compiler", "kernel", "megatron_ultralong", "commit")


def write(
    folder: Path, works: Sequence[Work], journal: Journal, missing: dict[str, float], command: str
) -> Path:
    """Write gpu_report.json and gpu_report.md and return the latter's path."""
    # In the order of `works`; then what was measured with other options, like another model.
    keys = dict.fromkeys([*(work.key(row) for work in works for row in work.rows), *journal.rows])
    rows = [
        {"group": key.partition(",")[0], "row": key, **_values(journal.rows[key])}
        for key in keys
        if key in journal.rows
    ]
    values = {
        "format": FORMAT,
        "machine": journal.machine,
        "command": command,
        "rows": rows,
        "missing": [{"row": key, "expected_seconds": round(seconds)} for key, seconds in missing.items()],
    }
    atomic_files.write_json(folder / "gpu_report.json", values)
    path = folder / "gpu_report.md"
    atomic_files.write_text(path, "\n".join(_lines(values)) + "\n")
    return path


def relative_error(measured: float, predicted: float) -> float | None:
    """Return measured / predicted - 1; None where nothing is predicted."""
    return measured / predicted - 1 if predicted else None


def _values(ended: dict[str, Any]) -> dict[str, Any]:
    """What the JSON has of the event that ended a row."""
    when = {"date": ended["date"], "commit": ended["commit"]}
    if ended["event"] == "failed":
        return {"note": f"failed: {ended['reason']}", **when}
    figures, predicted = ended["figures"], ended["predicted"]
    errors = {
        key: relative_error(figures[key], value) for key, value in predicted.items() if figures.get(key)
    }
    return {
        "note": figures.get("note"),
        "figures": figures,
        "predicted": predicted,
        "relative_error": errors,
        **when,
    }


def _lines(values: dict[str, Any]) -> Iterator[str]:
    found = values["machine"]
    yield "# GPU report"
    yield ""
    if found.get("sizes") == "tiny":
        yield "**Tiny sizes, to check that the report runs: these are not the figures of a GPU.**"
        yield ""
    for name in (*FACTS, *MORE_FACTS):
        if found.get(name) is not None:
            yield f"- {name}: {byte_count(found[name]) if name == 'memory_bytes' else found[name]}"
    for name in ("date", "commit"):
        different = list(dict.fromkeys(str(row[name]) for row in values["rows"]))
        if len(different) > 1:
            yield f"- {name}s of the rows: {different[0]} to {different[-1]}"
        elif different:
            yield f"- {name} of the rows: {different[0]}"
    if found:
        yield f"- {machine.missing_line(found)}"
    yield f"- command: `{values['command']}`"
    yield ""
    yield "Predicted: by planning/, as in `ultralong plan`. Error: measured / predicted - 1."
    yield ""
    yield "| measurement | figure | measured | predicted | error |"
    yield "|---|---|---|---|---|"
    for row in values["rows"]:
        yield from _figure_lines(row)
    yield ""
    without = [row for row in values["rows"] if row["note"]]
    if without:
        yield "Failed, or not measured, or with a note:"
        yield ""
        yield from (f"- {row['row']}: {_cell(row['note'])}" for row in without)
        yield ""
    if values["missing"]:
        seconds = sum(row["expected_seconds"] for row in values["missing"])
        yield f"Missing ({len(values['missing'])} rows, about {seconds} s; call the command again):"
        yield ""
        yield from (f"- {row['row']}: about {row['expected_seconds']} s" for row in values["missing"])
    else:
        yield "Nothing is missing."


def _figure_lines(row: dict[str, Any]) -> Iterator[str]:
    figures, predicted = row.get("figures") or {}, row.get("predicted") or {}
    title = _cell(row["row"])
    for column in COLUMNS[row["group"]]:
        value = figures.get(column.key)
        if value is None or column.key in SHOWN_BESIDE:
            continue
        plan = predicted.get(column.key)
        error = None if plan is None else relative_error(value, plan)
        cells = (
            title,
            column.title,
            column.show(value),
            "-" if plan is None else column.show(plan),
            "-" if error is None else f"{100 * error:+.1f}%",
        )
        yield f"| {' | '.join(cells)} |"
        title = ""


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
