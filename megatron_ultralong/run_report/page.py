"""One HTML page of a run: everything inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import datetime
import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from megatron_ultralong.run_report import figures
from megatron_ultralong.run_report.plan import RECENT, Comparison, compare
from megatron_ultralong.run_report.read import RunRecord
from megatron_ultralong.train.stopwatch import PARTS

SECTIONS = ("parallel", "memory", "train", "optim", "lora", "data", "rope", "model", "runtime")
ROWS = 25
"""Most rows of a table over iterations; more are left out evenly."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2430; background: #f6f7f9; margin: 0; }
main { max-width: 1360px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 10px; }
p { margin: 6px 0; } .quiet { color: #6b7280; }
section.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 16px 0; }
.card { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; padding: 10px 12px; }
.card b { display: block; font-size: 17px; } .card span { color: #6b7280; font-size: 12.5px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 12px; }
.figures img { width: 100%; background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; box-sizing: border-box; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; font-size: 13.5px; }
th, td { border: 1px solid #e5e7eb; padding: 4px 9px; text-align: right; } th { background: #eef0f3; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; }
.tables { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
"""


def page(record: RunRecord, notes: Sequence[str] = ()) -> str:
    """The page of a run. notes: lines to show at the end."""
    name = str(record.start.get("run", {}).get("name") or record.folder.name)
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">{escape(str(record.folder))} &middot; {escape(record.status)}</p>',
        _summary(record),
        _curves(record),
        _time(record),
        _tables_of_iterations(record),
        _processes(record),
        _plan(record),
        _settings(record),
    ]
    if record.unreadable:
        notes = [*notes, f"{record.unreadable} lines of metrics.jsonl cannot be read; they are left out"]
    if notes:
        body.append("<h2>Notes</h2>" + "".join(f"<p>{escape(note)}</p>" for note in notes))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )


# ---- parts of the page -------------------------------------------------------------------------


def _summary(record: RunRecord) -> str:
    steps, start = record.steps, record.start
    last = steps[max(steps)] if steps else {}
    total = start.get("iterations")
    validation = record.validations[max(record.validations)] if record.validations else {}
    eta = last.get("eta_seconds") if record.last.get("kind") != "stop" else None
    cards = [
        (
            "iterations",
            f"{max(steps, default=int(start.get('iteration', 0))):,}" + (f" of {total:,}" if total else ""),
        ),
        ("tokens trained on", _count(last.get("tokens"))),
        ("last loss", _number(last.get("loss"))),
        ("last held-out loss", _number(validation.get("loss"))),
        ("time of all iterations", _duration(record.step_seconds)),
        ("estimated time left", _duration(eta)),
        ("tokens/s per GPU, median", _number(_recent(record, "tokens_per_second_per_gpu"))),
        ("causal MFU, median", _percent(_recent(record, "causal_mfu"))),
        ("restarts", str(len(record.restarts))),
        ("iterations trained again", f"{sum(record.lost.values()):,}"),
        ("iterations without an update", f"{record.bad_steps:,}"),
    ]
    return (
        '<section class="cards">'
        + "".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
            for what, value in cards
        )
        + "</section>"
    )


def _curves(record: RunRecord) -> str:
    drawn = figures.all_figures(record)
    if not drawn:
        return "<h2>Curves</h2><p>no iteration has been logged yet</p>"
    images = "".join(
        f'<img alt="{escape(heading)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        for heading, svg in drawn
    )
    return f'<h2>Curves</h2><div class="figures">{images}</div>'


def _time(record: RunRecord) -> str:
    seconds = _recent(record, "seconds")
    if seconds is None:
        return ""
    rows: list[list[str]] = []
    for part in PARTS:
        value = _recent(record, "parts", part)
        if value is not None:
            rows.append([part, _number(value), f"{100 * value / seconds:.1f}%"])
    rows.append(["iteration", _number(seconds), "100%"])
    saves = [float(save["waited"]) for save in record.saves if not save.get("error")]
    if saves:
        rows.append([f"waiting for a save (median of {len(saves)})", _number(statistics.median(saves)), ""])
    return (
        f"<h2>Time by part</h2><p class='quiet'>rank 0, medians of the last {RECENT} iterations; collectives of "
        "tensor parallelism are inside forward and backward</p>" + _table(["part", "seconds", "share"], rows)
    )


def _tables_of_iterations(record: RunRecord) -> str:
    step_columns = {
        "loss": ("loss",),
        "z-loss": ("z_loss",),
        "grad norm": ("grad_norm",),
        "learning rate": ("learning_rate",),
        "seconds": ("seconds",),
        "tokens/s": ("tokens_per_second",),
        "MFU": ("causal_mfu",),
    }
    series = {name: record.series(*keys) for name, keys in step_columns.items()}
    series = {name: values for name, values in series.items() if values}
    tables = []
    if record.steps:
        rows = [
            [f"{i:,}", *(_number(values.get(i)) for values in series.values())] for i in _some(record.steps)
        ]
        tables.append(_table(["iteration", *series], rows))
    names = sorted(
        {name for scalars in record.evaluations.values() for name in scalars}, key=figures.by_number
    )
    at = sorted({*record.validations, *record.evaluations})
    if at:
        rows = [
            [
                f"{i:,}",
                _number(record.validations.get(i, {}).get("loss")),
                *(_number(record.evaluations.get(i, {}).get(name)) for name in names),
            ]
            for i in _some(at)
        ]
        tables.append(_table(["iteration", "held-out loss", *names], rows))
    if not tables:
        return ""
    return f'<h2>Figures</h2><div class="tables">{"".join(tables)}</div>'


def _processes(record: RunRecord) -> str:
    rows = []
    for number, start in enumerate(record.starts):
        layout = start.get("layout", {})
        rows.append(
            [
                str(start.get("time", ""))[:19].replace("T", " "),
                f"{start['iteration']:,}",
                f"{record.lost.get(number, 0):,}",
                " x ".join(f"{key.upper()} {layout.get(key)}" for key in ("tp", "pp", "cp", "dp"))
                if layout
                else "",
                _counted(start.get("devices")),
                _counted(start.get("hosts")),
            ]
        )
    if not rows:
        return ""
    head = [
        "started (UTC)",
        "from iteration",
        "iterations trained again",
        "layout",
        "devices",
        "ranks by host",
    ]
    versions = record.start.get("versions", {})
    line = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "<h2>Processes</h2>" + _table(head, rows) + f'<p class="quiet">{escape(line)}</p>'


def _plan(record: RunRecord) -> str:
    found = compare(record)
    if not isinstance(found, Comparison):
        return f"<h2>Plan beside measured</h2><p>{escape(found)}</p>"
    rows = [
        [
            f"{what} ({unit})",
            _number(planned),
            _number(measured),
            _number(measured / planned) if planned and measured is not None else "",
        ]
        for what, unit, planned, measured in found.rows
    ]
    tables = [
        _table(["", "planned", "measured", "measured / planned"], rows),
        _table(["planned seconds of an iteration", ""], [[k, _number(v)] for k, v in found.parts.items()]),
        _table(["planned GB of a GPU", ""], [[k, _number(v / 1e9)] for k, v in found.memory.items()]),
    ]
    return (
        f'<h2>Plan beside measured</h2><p class="quiet">{escape(found.note)}; measured: medians of the last '
        f'{RECENT} iterations, and the largest memory</p><div class="tables">{"".join(tables)}</div>'
    )


def _settings(record: RunRecord) -> str:
    run, rope = record.start.get("run", {}), record.start.get("rope", {})
    tables = []
    for section in SECTIONS:
        values = record.start.get("model") if section == "model" else run.get(section)
        if isinstance(values, dict):
            rows = [
                [name, value if isinstance(value, str) else json.dumps(value)]
                for name, value in values.items()
            ]
            tables.append(_table([section, ""], rows))
    text = ""
    if rope.get("inverse_frequencies"):
        frequencies = " ".join(f"{x:.6g}" for x in rope["inverse_frequencies"])
        text = (
            f"<p>RoPE: {escape(str(rope.get('settings')))}; attention factor {_number(rope.get('attention_factor'))}; "
            f"radians per position at {rope.get('length')} tokens: <span class='quiet'>{frequencies}</span></p>"
        )
    for name, choice in record.start.get("kernels", {}).items():
        text += f"<p>{escape(name)}: <span class='quiet'>{escape(str(choice))}</span></p>"
    if not tables and not text:
        return ""
    return f'<h2>Layout and settings</h2><div class="tables">{"".join(tables)}</div>{text}'


# ---- words -------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _some(iterations: Iterable[int]) -> list[int]:
    """At most `ROWS`, evenly, the first and the last among them."""
    every = sorted(iterations)
    if len(every) <= ROWS:
        return every
    return [every[round(i * (len(every) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _recent(record: RunRecord, *keys: str) -> float | None:
    values = list(record.series(*keys).values())[-RECENT:]
    return statistics.median(values) if values else None


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _count(value: Any) -> str:
    if not isinstance(value, int):
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "-"
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return str(datetime.timedelta(seconds=round(seconds)))


def _counted(names: Any) -> str:
    return ", ".join(f"{count} x {name}" for name, count in names.items()) if isinstance(names, dict) else ""
