"""The results of a benchmark: one form for all benchmarks, in memory and as OUT/TASK.json.

    {"format": 2, "task": "ruler", "model": {...}, "settings": {...},
     "scores": [{"task": "vt", "length": 4096, "score": 81.2, "count": 500, "refused": 2}, ...],
     "extra": {...}}

Files of format 1, in which every benchmark had its own schema, are converted by report/results_format_1.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ultralong.io import atomic_files

FORMAT = 2
"""Version of the results files."""
BENCHMARKS = ("ruler", "lveval", "infinitebench", "standard", "perplexity", "niah")
_FIELDS = ("task", "length", "score", "count")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one task, at one length where the benchmark has several."""

    task: str
    """Task or set of the benchmark; the benchmark's name where it has only one."""
    length: int | None = None
    """Tokens; LV-Eval: words or characters."""
    score: float | None
    """Percent; perplexity: the perplexity itself."""
    count: int | None = None
    """Prompts, or rows; None = not recorded."""
    notes: dict[str, int] = field(default_factory=dict)
    """Prompts that are special in some way, by kind: refused, cut, over (the length), empty (answers) ..."""

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _FIELDS}
        return {
            **{name: value for name, value in values.items() if name == "score" or value is not None},
            **self.notes,
        }

    @classmethod
    def from_json(cls, values: Any) -> TaskScore:
        """ValueError where `values` has another form."""
        if not isinstance(values, dict) or not isinstance(values.get("task"), str):
            raise ValueError("contains a score without a task")
        for name, kind in (("length", int), ("count", int), ("score", int | float)):
            value = values.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"contains a score of {values['task']} with `{name}` {json.dumps(value)}")
        return cls(
            task=values["task"],
            length=values.get("length"),
            score=values.get("score"),
            count=values.get("count"),
            notes={name: n for name, n in values.items() if name not in _FIELDS and isinstance(n, int)},
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """The results of one benchmark."""

    task: str
    """One of `BENCHMARKS`."""
    model: dict[str, Any]
    """`Backend.describe()`; {} = not recorded."""
    settings: dict[str, Any]
    """How the prompts were made and answered: everything that determines the scores except the model."""
    scores: tuple[TaskScore, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this benchmark records: averages, single answers, seconds ..."""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": self.task,
            "model": self.model,
            "settings": self.settings,
            "scores": [score.to_json() for score in self.scores],
            "extra": self.extra,
        }

    @classmethod
    def from_json(cls, values: Any) -> BenchmarkResult:
        """ValueError where `values` is not a result of format 2."""
        if not isinstance(values, dict) or values.get("task") not in BENCHMARKS:
            raise ValueError("is not a benchmark result")
        if values.get("format") != FORMAT:
            raise ValueError(
                f"has unsupported format version {values.get('format')} (expected 1 or {FORMAT})"
            )
        if not isinstance(values.get("scores"), list):
            raise ValueError("contains no scores")
        return cls(
            task=values["task"],
            **{name: section(values, name) for name in ("model", "settings", "extra")},
            scores=tuple(map(TaskScore.from_json, values["scores"])),
        )

    def write(self, path: Path) -> None:
        """Write the results as JSON, completely or not at all."""
        atomic_files.write_json(path, self.to_json())


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object inside another; {} where it is missing. ValueError where it is something else."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"has `{name}` that is not an object")
    return value or {}


def write_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line; the file appears complete or not at all."""
    atomic_files.write_text(
        path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    )


def short_count(count: int) -> str:
    """A number of tokens in short form: 131072 -> 128K."""
    for size, letter in ((1024**2, "M"), (1024, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return f"{count:,}"
