"""Results of all benchmarks, read from files and directories for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from megatron_ultralong.evaluate.report import curves, results_format_1
from megatron_ultralong.evaluate.report.cells import TableCell, notes_of

SEVERAL = "niah, several needles"
"""The kind of passkey results with several needles in a prompt: another question than niah's."""


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """The scores of one file, ready for the tables."""

    file: Path
    kind: str
    """One of `results.BENCHMARKS`, or `SEVERAL`."""
    model: str
    """The model's name in tables."""
    row: str
    """Its row: the model's name, and with several needles their number."""
    named: bool
    """Whether the user gave the name."""
    fingerprint: str
    """Of the model's files; "" = not known."""
    scores: dict[Any, Any]
    """Cells. ruler, lveval: {task: {length: cell}}; niah, perplexity: {length: cell}; others: {task:
    cell}."""
    result: BenchmarkResult


def parse(raw: Any) -> BenchmarkResult:
    """The results in a JSON object of format 1 or 2. ValueError where it contains none."""
    if isinstance(raw, dict) and raw.get("format") == 1:
        return results_format_1.convert(raw)
    return BenchmarkResult.from_json(raw)


def read_for(path: Path, check: Callable[[BenchmarkResult], None]) -> BenchmarkResult:
    """Read a results file that passes `check`. UserError where it cannot be read, or `check` raises
    ValueError."""
    try:
        result = parse(json.loads(path.read_text(encoding="utf-8")))
        check(result)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} {error}") from None
    return result


def collect(places: Iterable[str]) -> tuple[list[ModelScores], list[str], list[str]]:
    """Return (results in the order of their files, one line per file that is not a result, one line per
    choice between two results for the same cell).

    places: PATH or NAME=PATH, where NAME is the name of the models below that path; directories are searched.
    UserError where a path does not exist.
    """
    read: list[ModelScores] = []
    left_out: list[str] = []
    seen: set[Path] = set()
    for place in places:
        name, _, path = ("", "", place) if Path(place).exists() else place.rpartition("=")
        if not Path(path).exists():
            raise UserError(f"--results {place}: no such file or directory")
        for file in sorted(Path(path).rglob("*.json")) if Path(path).is_dir() else [Path(path)]:
            if file in seen:
                continue
            seen.add(file)
            try:
                read.append(_read(file, name))
            except (OSError, ValueError, OverflowError) as error:
                left_out.append(f"{file} left out: {error}")
    separated, notes = _separate(read)
    for i, one in enumerate(separated):
        notes += [
            f"{one.file} is used, not {other.file}: both contain {one.kind} of {one.row}; the one that --results names later "
            "is used, and in one directory the one whose name sorts later, regardless of age"
            for other in separated[:i]
            if (other.kind, other.row) == (one.kind, one.row) and _overlap(other.scores, one.scores)
        ]
    return separated, left_out, notes


def _read(file: Path, name: str) -> ModelScores:
    """ValueError where the file is not a result."""
    result = parse(json.loads(file.read_text(encoding="utf-8")))
    if result.task == "perplexity":
        curves.check(result)
    scores: dict[Any, Any] = {}
    for score in result.scores:
        cell = _cell(result, score)
        if cell is None:
            continue
        if result.task in ("ruler", "lveval"):
            if score.length:
                scores.setdefault(score.task, {})[score.length] = cell
        elif result.task in ("niah", "perplexity"):
            if score.length:
                scores[score.length] = cell
        else:
            scores[score.task] = cell
    if not scores:
        raise ValueError("contains no scores")
    named = name or result.model
    if name:
        result = replace(result, model={**result.model, "name": name})
    model = curves.model_name(result.model) if named else f"{curves.UNNAMED} ({file.parent})"
    needles = result.settings.get("needles", 1) if result.task == "niah" else 1
    return ModelScores(
        file=file,
        kind=result.task if needles == 1 else SEVERAL,
        model=model,
        row=model if needles == 1 else f"{model}, {needles} needles",
        named=bool(name),
        fingerprint=str(result.model.get("fingerprint") or ""),
        scores=scores,
        result=result,
    )


def _cell(result: BenchmarkResult, score: TaskScore) -> TableCell | None:
    """The table cell of a score; None where it is not a number. LV-Eval's lengths are words, the others'
    tokens, which may exceed the model's positions."""
    if score.score is None or not math.isfinite(score.score):
        return None
    limit = result.model.get("max_position")
    beyond = (
        isinstance(limit, int)
        and result.task != "lveval"
        and score.length is not None
        and score.length > limit
    )
    return TableCell(
        value=float(score.score),
        notes=notes_of(result, score),
        beyond=limit if isinstance(limit, int) and beyond else 0,
    )


def _separate(read: list[ModelScores]) -> tuple[list[ModelScores], list[str]]:
    """Give models with the same name but other files names of their own, unless the user gave the name; then
    a line says so."""
    notes: list[str] = []
    separated: list[ModelScores] = []
    for one in read:
        known = {other.fingerprint for other in read if other.model == one.model and other.fingerprint}
        if len(known) > 1 and not one.named:
            model = f"{one.model} ({one.fingerprint or 'files not known'})"
            one = replace(one, model=model, row=model + one.row.removeprefix(one.model))
        elif known and not one.fingerprint:
            notes.append(
                f"{one.file} does not record which files {one.model} had; it shares a row with those that do "
                f"({', '.join(sorted(known))})"
            )
        separated.append(one)
    for name in dict.fromkeys(one.model for one in read if one.named):
        kinds = {
            (curves.model_name({**one.result.model, "name": None}), one.fingerprint)
            for one in read
            if one.named and one.model == name
        }
        if len({files for _, files in kinds if files}) > 1 or len({path for path, _ in kinds}) > 1:
            models = ", ".join(f"{path} ({files or 'files not known'})" for path, files in sorted(kinds))
            notes.append(f"{name}: one name for {models}")
    return separated, notes


def _overlap(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether both contain the same cell."""
    return any(
        one[key].keys() & other[key].keys() if isinstance(one[key], dict) else True
        for key in one.keys() & other.keys()
    )
