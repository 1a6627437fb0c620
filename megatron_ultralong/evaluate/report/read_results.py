"""Results of all benchmarks, read into one form for the report.

Every file is {"format": 1, "task", "model", "settings", "scores"}, scores in percent:

    ruler, lveval            {task or set: {length: score}}
    infinitebench, standard  {task: score}
    perplexity               {length: {"perplexity", "by_position", ...}}
    niah                     its own form: "by_length" {length: share of 1}

A score may also be {"score": number, ...}; in place of `scores` there may be `cells`, a list of {"set" or
"task", "length", "score"}; a length is a number or like 16k.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.report import curves
from megatron_ultralong.evaluate.report.cells import Cell, notes_of, part

TASKS = ("ruler", "lveval", "infinitebench", "standard", "perplexity", "niah")
SEVERAL = "niah, several needles"
"""The task of passkey results that hide several in a prompt: another question than niah's."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file."""

    file: Path
    task: str
    """Of TASKS, or SEVERAL."""
    model: str
    """What tables call it."""
    row: str
    """The row of its scores: the model, and with several needles how many."""
    named: bool
    """Whether the user gave the name."""
    files: str
    """Which files the model had; "" = not known."""
    scores: dict[Any, Any]
    """Cells. ruler, lveval: {name: {length: cell}}; niah, perplexity: {length: cell}; else {name: cell}."""
    raw: dict[str, Any]


def collect(places: Iterable[str]) -> tuple[list[Result], list[str], list[str]]:
    """(results in the order of their files, a line for each file that is none, a line for each choice that
    was made between or over results).

    places: PATH or NAME=PATH, where NAME is what the models below that path are to be called; directories are
    searched. UserError where a path does not exist.
    """
    read: list[Result] = []
    left_out: list[str] = []
    seen: dict[Path, None] = {}
    for place in places:
        name, _, path = ("", "", place) if Path(place).exists() else place.rpartition("=")
        if not Path(path).exists():
            raise UserError(f"--results {place}: no such file or directory")
        for file in sorted(Path(path).rglob("*.json")) if Path(path).is_dir() else [Path(path)]:
            if file in seen:
                continue
            seen[file] = None
            try:
                read.append(_read(file, name))
            except (OSError, ValueError, OverflowError) as error:
                left_out.append(f"{file} left out: {error}")
    found, notes = _told_apart(read)
    for i, result in enumerate(found):
        notes += [
            f"{result.file} counts, not {other.file}: both tell {result.task} of {result.row}; of two the one counts that --results names "
            "later, in one directory the one whose name sorts later, whichever is newer"
            for other in found[:i]
            if (other.task, other.row) == (result.task, result.row) and _overlap(other.scores, result.scores)
        ]
    return found, left_out, notes


def _read(file: Path, name: str) -> Result:
    """ValueError where the file is no result."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.get("task") not in TASKS:
        raise ValueError("is no result of an evaluation")
    if raw.get("format") != FORMAT:
        raise ValueError(f"has format {raw.get('format')}, this version reads {FORMAT}")
    task, model = raw["task"], part(raw, "model")
    told = raw.get("by_length") if task == "niah" else raw.get("scores")
    if not isinstance(told, dict) and isinstance(raw.get("cells"), list):
        told = _of_cells(raw["cells"])
    if not isinstance(told, dict):
        raise ValueError("has no scores")
    scores: dict[Any, Any]
    if task == "perplexity":
        curves.check(raw)
        scores = _lengths(raw, "", {length: values["perplexity"] for length, values in told.items()})
    elif task == "niah":
        refused = _refused(raw)
        scores = {
            length: replace(cell, value=100 * cell.value)
            for length, cell in _lengths(
                raw,
                "",
                {
                    length: {"score": share, "refused": refused.get(str(length), 0)}
                    for length, share in told.items()
                },
            ).items()
        }
    elif task in ("ruler", "lveval"):
        scores = {
            of: cells
            for of, values in told.items()
            if isinstance(values, dict) and (cells := _lengths(raw, of, values))
        }
    else:
        scores = {of: cell for of, value in told.items() if (cell := _cell(raw, of, value)) is not None}
    if not scores:
        raise ValueError("has no scores")
    if name:
        raw = {**raw, "model": {**model, "name": name}}
    called = curves.label(raw) if name or model else f"{curves.UNNAMED} ({file.parent})"
    needles = (
        part(raw, "settings").get("needles", 1 if raw.get("mode") != "passkeys" else "several")
        if task == "niah"
        else 1
    )
    return Result(
        file=file,
        task=task if needles == 1 else SEVERAL,
        model=called,
        row=called if needles == 1 else f"{called}, {needles} needles",
        named=bool(name),
        files=str(model.get("fingerprint") or ""),
        scores=scores,
        raw=raw,
    )


def _told_apart(read: list[Result]) -> tuple[list[Result], list[str]]:
    """Models of other files under one name get names of their own, where the user gave none; a line where he
    did."""
    notes: list[str] = []
    apart: list[Result] = []
    for result in read:
        known = {other.files for other in read if other.model == result.model and other.files}
        if len(known) > 1 and not result.named:
            called = f"{result.model} ({result.files or 'files not known'})"
            result = replace(result, model=called, row=called + result.row.removeprefix(result.model))
        elif known and not result.files:
            notes.append(
                f"{result.file} does not say which files {result.model} had; it is put with those that do ({', '.join(sorted(known))})"
            )
        apart.append(result)
    for name in dict.fromkeys(result.model for result in read if result.named):
        kinds = {
            (curves.label({**result.raw, "model": {**result.raw["model"], "name": None}}), result.files)
            for result in read
            if result.named and result.model == name
        }
        if len({files for _, files in kinds if files}) > 1 or len({path for path, _ in kinds}) > 1:
            notes.append(
                f"{name}: one name for "
                + ", ".join(f"{path} ({files or 'files not known'})" for path, files in sorted(kinds))
            )
    return apart, notes


def _of_cells(cells: list[Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for cell in cells:
        name = cell.get("set", cell.get("task")) if isinstance(cell, dict) else None
        if not isinstance(name, str):
            raise ValueError("has `cells` without set or task")
        if "length" in cell:
            told.setdefault(name, {})[str(cell["length"])] = cell
        else:
            told[name] = cell
    return told


def _lengths(raw: dict[str, Any], of: str, told: dict[str, Any]) -> dict[int, Cell]:
    """Cells by length; LV-Eval's lengths are words, the others' tokens, which the model may have no positions
    for."""
    limit = part(raw, "model").get("max_position")
    limit = limit if isinstance(limit, int) and raw["task"] != "lveval" else math.inf
    return {
        length: cell if length <= limit else replace(cell, beyond=int(limit))
        for text, value in told.items()
        if (length := length_of(text)) and (cell := _cell(raw, of, value)) is not None
    }


def _cell(raw: dict[str, Any], of: str, value: Any) -> Cell | None:
    number = value.get("score") if isinstance(value, dict) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        return None
    return Cell(value=float(number), notes=notes_of(raw, of, value if isinstance(value, dict) else {}))


def _refused(raw: dict[str, Any]) -> dict[str, int]:
    """Prompts of each length that an endpoint did not answer, of niah's cells."""
    found: dict[str, int] = {}
    for cell in raw["cells"] if isinstance(raw.get("cells"), list) else []:
        if isinstance(cell, dict) and isinstance(cell.get("refused"), int):
            found[str(cell.get("length"))] = found.get(str(cell.get("length")), 0) + cell["refused"]
    return found


def length_of(text: Any) -> int | None:
    """16384 of 16384 or 16k; None where it is no length."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", str(text))
    return int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] if found else None


def _overlap(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether both tell the same cell."""
    return any(
        one[key].keys() & other[key].keys() if isinstance(one[key], dict) else True
        for key in one.keys() & other.keys()
    )
