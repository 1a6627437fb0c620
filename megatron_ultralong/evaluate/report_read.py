"""Results of all benchmarks, read into one form for the report.

Every file is {"format": 1, "task", "model", "settings", "scores"}, scores in percent:

    ruler, lveval            {task or set: {length: score}}
    infinitebench, standard  {task: score}
    perplexity               {length: {"perplexity", "by_position", ...}}
    niah                     its own form: "by_length" {length: share of 1}

A score may also be {"score": number, ...}; in place of `scores` there may be `cells`, a list of {"set" or "task", "length", "score"}; a length is
a number or like 16k.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate import curves

TASKS = ("ruler", "lveval", "infinitebench", "standard", "perplexity", "niah")
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file."""

    file: Path
    task: str
    model: str
    """What tables call it."""
    scores: dict[Any, Any]
    """ruler, lveval: {name: {length: percent}}; niah: {length: percent}; perplexity: as in the file; else {name: percent}."""
    raw: dict[str, Any]


def collect(places: Iterable[str]) -> tuple[list[Result], list[str]]:
    """(results in the order of their files, a line for each file that is none and for each that tells what another told).

    places: PATH or NAME=PATH, where NAME is what the models below that path are to be called; directories are searched. UserError where a path
    does not exist.
    """
    found: list[Result] = []
    notes: list[str] = []
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
                result = _read(file, name)
            except (OSError, ValueError) as error:
                notes.append(f"{file} left out: {error}")
                continue
            notes += [f"{file} counts, not {other.file}: both tell {result.task} of {result.model}"
                      for other in found if (other.task, other.model) == (result.task, result.model) and _overlap(other.scores, result.scores)]
            found.append(result)
    return found, notes


def _read(file: Path, name: str) -> Result:
    """ValueError where the file is no result."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.get("task") not in TASKS:
        raise ValueError("is no result of an evaluation")
    if raw.get("format") != FORMAT:
        raise ValueError(f"has format {raw.get('format')}, this version reads {FORMAT}")
    task = raw["task"]
    told = raw.get("by_length") if task == "niah" else raw.get("scores")
    if not isinstance(told, dict) and isinstance(raw.get("cells"), list):
        told = _of_cells(raw["cells"])
    if not isinstance(told, dict):
        raise ValueError("has no scores")
    scores: dict[Any, Any]
    if task == "perplexity":
        scores = {length: values for length, values in told.items() if _length(length) and isinstance(values, dict)}
    elif task == "niah":
        scores = {length: 100 * share for length, share in _lengths(told).items()}
    elif task in ("ruler", "lveval"):
        scores = {of: _lengths(values) for of, values in told.items() if isinstance(values, dict)}
    else:
        scores = {of: number for of, value in told.items() if (number := _number(value)) is not None}
    if name:
        raw = {**raw, "model": {**(raw.get("model") or {}), "name": name}}
    return Result(file=file, task=task, model=curves.label(raw), scores=scores, raw=raw)


def _of_cells(cells: list[Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for cell in cells:
        name = cell.get("set", cell.get("task"))
        if "length" in cell:
            told.setdefault(name, {})[cell["length"]] = cell.get("score")
        else:
            told[name] = cell.get("score")
    return told


def _lengths(told: dict[Any, Any]) -> dict[int, float]:
    return {length: number for text, value in told.items() if (length := _length(text)) and (number := _number(value)) is not None}


def _length(text: Any) -> int | None:
    found = re.fullmatch(r"(\d+)([kKmM]?)", str(text))
    return int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] if found else None


def _number(value: Any) -> float | None:
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _overlap(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether both tell the same cell."""
    common = one.keys() & other.keys()
    nested = all(isinstance(one[key], dict) and isinstance(other[key], dict) and "perplexity" not in one[key] for key in common)
    return any(one[key].keys() & other[key].keys() for key in common) if nested else bool(common)
