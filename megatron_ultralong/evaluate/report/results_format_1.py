"""Results files of format 1, in which every benchmark had its own schema, converted to format 2.

    ruler          "scores": {task: {length: {"score", "samples", ...}}}, "data": {task: how made}, "wording"
    lveval         "cells": [{"set", "length": "16k", "score", "questions", ...}], "of", "settings", "wording"
    infinitebench  the same with "task" in place of "set", and no length
    standard       "scores": {task: score}, "settings", "metrics", "prompts_cut", "unanswered"
    perplexity     "scores": {length: {"perplexity", "by_position", "by_sixteenth", "rows"}}, "settings"
    niah           "by_length": {length: fraction}, "cells": [{"length", "depth", "accuracy", ...}], "trials"

A score may also be a plain number or {"score": number, ...}, and `scores` and `cells` may replace each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BENCHMARKS, BenchmarkResult, TaskScore, section

_COUNTS = ("samples", "questions", "rows", "trials")
_MOVED = {"wording": "wording", "official_samples": "official_samples", "data": "prompts"}
"""What is now part of the settings, and its name there."""
_COMMON = ("format", "task", "model", "settings", "of", "scores", *_MOVED)


def convert(raw: Any) -> BenchmarkResult:
    """The results in a file of format 1. ValueError where it is not a result, or contains no scores."""
    if not isinstance(raw, dict) or raw.get("task") not in BENCHMARKS:
        raise ValueError("is not a benchmark result")
    common = {name: section(raw, name) for name in ("model", "settings", "of")}
    convert_scores = {
        "ruler": _by_task_and_length,
        "lveval": _by_task_and_length,
        "perplexity": _perplexity,
        "niah": _niah,
    }
    scores = tuple(convert_scores.get(raw["task"], _by_task)(raw))
    if not scores:
        raise ValueError("contains no scores")
    settings = {**common["of"], **common["settings"]}
    if limit := common["settings"].get("limit") or common["of"].get("limit"):
        settings["limit"] = limit
    settings |= {new: raw[old] for old, new in _MOVED.items() if old in raw}
    if raw["task"] == "niah":
        settings.setdefault("needles", "several" if raw.get("mode") == "passkeys" else 1)
    extra = {name: value for name, value in raw.items() if name not in _COMMON}
    if raw["task"] == "perplexity":
        extra["by_length"] = _scores(raw)
    return BenchmarkResult(
        task=raw["task"], model=common["model"], settings=settings, scores=scores, extra=extra
    )


def _by_task_and_length(raw: dict[str, Any]) -> Iterator[TaskScore]:
    """RULER and LV-Eval."""
    for task, by_length in _scores(raw).items():
        for length, value in by_length.items() if isinstance(by_length, dict) else ():
            yield from _score(task, value, length_of(length))


def _by_task(raw: dict[str, Any]) -> Iterator[TaskScore]:
    """InfiniteBench and the standard benchmarks."""
    for task, value in _scores(raw).items():
        for score in _score(task, value, None):
            yield replace(score, length=None)


def _perplexity(raw: dict[str, Any]) -> Iterator[TaskScore]:
    for length, summary in _scores(raw).items():
        if not isinstance(summary, dict):
            raise ValueError(f"has scores at length {length} that are not an object")
        value = {"score": summary.get("perplexity"), "rows": summary.get("rows")}
        yield from _score("perplexity", value, length_of(length))


def _niah(raw: dict[str, Any]) -> Iterator[TaskScore]:
    refused: dict[str, int] = {}
    for cell in raw["cells"] if isinstance(raw.get("cells"), list) else []:
        if isinstance(cell, dict) and isinstance(cell.get("refused"), int):
            length = str(cell.get("length"))
            refused[length] = refused.get(length, 0) + cell["refused"]
    for length, fraction in section(raw, "by_length").items():
        for score in _score("passkey", fraction, length_of(length)):
            notes = {"refused": refused.get(length, 0)}
            yield replace(score, score=100 * (score.score or 0.0), notes=notes)


def _scores(raw: dict[str, Any]) -> dict[str, Any]:
    """{task: score} or {task: {length: score}}, from `scores` or from `cells`."""
    if isinstance(raw.get("scores"), dict):
        return raw["scores"]
    if not isinstance(raw.get("cells"), list):
        raise ValueError("contains no scores")
    scores: dict[str, Any] = {}
    for cell in raw["cells"]:
        task = cell.get("set", cell.get("task")) if isinstance(cell, dict) else None
        if not isinstance(task, str):
            raise ValueError("has `cells` without set or task")
        if "length" in cell:
            scores.setdefault(task, {})[str(cell["length"])] = cell
        else:
            scores[task] = cell
    return scores


def _score(task: str, value: Any, length: int | None) -> Iterator[TaskScore]:
    """The score in a number or an object; none where it is not a number."""
    values = value if isinstance(value, dict) else {"score": value}
    score = values.get("score")
    if isinstance(score, int | float) and not isinstance(score, bool):
        count = next((values[name] for name in _COUNTS if isinstance(values.get(name), int)), None)
        notes = {
            name: number
            for name, number in values.items()
            if isinstance(number, int) and name not in ("score", "length", *_COUNTS)
        }
        yield TaskScore(task=task, length=length, score=score, count=count, notes=notes)


def length_of(text: Any) -> int | None:
    """16384 for 16384 or 16k; None where it is not a length."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", str(text))
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else None
