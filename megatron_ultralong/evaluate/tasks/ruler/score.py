"""Third stage of RULER: score the predictions of all tasks and lengths."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import refusals
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore, short_count
from megatron_ultralong.evaluate.scorers import ruler as scorers
from megatron_ultralong.evaluate.tasks.ruler.averages import averages
from megatron_ultralong.evaluate.tasks.ruler.settings import OFFICIAL_SAMPLES, RulerSettings
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS
from megatron_ultralong.io import jsonl
from megatron_ultralong.io.text_table import text_table

UNKNOWN_WORDING = "as in the data"
"""The wording of prompts that do not record theirs: RULER's own data."""


def score(settings: RulerSettings) -> BenchmarkResult:
    """Score the predictions on disk. UserError where some are missing, or come from different models or from
    prompts made in different ways."""
    scores: list[TaskScore] = []
    refused: list[str] = []
    model: dict[str, Any] = {}
    max_position: int | None = None
    made_with: dict[str, dict[str, Any]] = {}
    for length in settings.lengths:
        for task in settings.runnable():
            lines = _read(settings, task, length)
            default = lines[0].get("made") or {"wording": UNKNOWN_WORDING}
            for line in lines:
                if line.get("model") is not None:
                    model = model or line["model"]
                    _check_same(settings, "two models", model, line["model"])
                made = line.get("made") or default
                _check_same(
                    settings, f"{task} prompts made in two ways", made_with.setdefault(task, made), made
                )
            texts = [scorers.printable(line["pred"]) for line in lines]
            outputs = [list(map(str, line["outputs"])) for line in lines]
            match = scorers.string_match_part if TASKS[task].match_part else scorers.string_match_all
            scores.append(
                TaskScore(
                    task=task,
                    length=length,
                    score=match(texts, outputs),
                    count=len(lines),
                    notes={
                        "empty": sum(not text for text in texts),
                        "over": sum(bool(line.get("over")) for line in lines),
                        "refused": sum("refused" in line for line in lines),
                    },
                )
            )
            refused += [line["refused"] for line in lines if "refused" in line]
            max_position = lines[0].get("max_position", max_position)
    wordings = sorted({made.get("wording", UNKNOWN_WORDING) for made in made_with.values()})
    return BenchmarkResult(
        task="ruler",
        model=model and {**model, "max_position": max_position},
        settings={
            "wording": " and ".join(wordings),
            "official_samples": OFFICIAL_SAMPLES,
            "prompts": made_with,
        },
        scores=tuple(scores),
        extra={**averages(_by_task(scores)), "refused": refusals.count_reasons(refused)},
    )


def _by_task(scores: list[TaskScore] | tuple[TaskScore, ...]) -> dict[str, dict[int, float]]:
    """{task: {length: score}}"""
    by_task: dict[str, dict[int, float]] = {}
    for one in scores:
        if one.length is not None and one.score is not None:
            by_task.setdefault(one.task, {})[one.length] = one.score
    return by_task


def _read(settings: RulerSettings, task: str, length: int) -> list[dict[str, Any]]:
    """The lines of the prediction file. UserError where it is missing, or a line is not a prediction."""
    path = settings.prediction_file(task, length)
    if not path.is_file():
        stopped = " (it was stopped before its end)" if path.with_suffix(".journal.jsonl").exists() else ""
        raise UserError(f"{path}: no such file; run --stage predict first{stopped}")
    lines = list(islice(jsonl.read(path), settings.samples))
    for number, line in enumerate(lines, 1):
        outputs = line.get("outputs")
        if (
            not isinstance(line.get("pred"), str)
            or not isinstance(outputs, list)
            or not outputs
            or not isinstance(line.get("made", {}), dict)
        ):
            raise UserError(f"{path}, line {number}: needs `pred` (text) and `outputs` (list of texts)")
    if not lines:
        raise UserError(f"{path}: contains no prediction; remove it and run --stage predict")
    return lines


def _check_same(settings: RulerSettings, what: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    """UserError where two predictions come from different models or from prompts made in different ways: a
    table must not mix them."""
    if first != other:
        name = next(name for name in {**other, **first} if other.get(name) != first.get(name))
        raise UserError(
            f"{settings.out / 'predictions'} contains answers of {what} ({name} {json.dumps(first.get(name))} and "
            f"{json.dumps(other.get(name))}); score the --lengths and --tasks of one, or give each another --output"
        )


def table(result: BenchmarkResult) -> str:
    """Tasks down, lengths across, as plain text."""
    by_task, by_length = _by_task(result.scores), result.extra["by_length"]
    lengths = list(map(int, by_length))
    limit = result.model.get("max_position") or max(lengths)
    names = [short_count(length) + "*" * (length > limit) for length in lengths]
    rows = [["task", *names]]
    for task, scores in by_task.items():
        cells = [f"{scores[length]:.2f}" if length in scores else "-" for length in lengths]
        rows.append([task, *cells])
    count = len(by_task)
    mean = f"mean of {count}" if count == len(TASKS) else f"mean of {count}/{len(TASKS)}"
    rows.append([mean, *(f"{one['average']:.2f}" for one in by_length.values())])
    lines = text_table(rows)
    for bound, one in result.extra["up_to"].items():
        partial = "" if one["complete"] else " - not all tasks and lengths, therefore not comparable"
        used = ", ".join(map(short_count, one["lengths"]))
        lines.append(f"up to {bound}: {one['average']:.2f} (mean of {used}){partial}")
    if any(name.endswith("*") for name in names):
        lines.append(f"* beyond the {limit:,} positions of the model's config")
    total = sum(one.count or 0 for one in result.scores)
    if refused := result.extra.get("refused"):
        lines.append(f"of {total}, {refusals.told(refused)}")
    if number := sum(one.notes.get("over", 0) for one in result.scores):
        lines.append(f"{number} of {total} prompts are longer than their nominal length")
    return "\n".join([*lines, f"wording: {result.settings['wording']}"])
