"""Cells of the report's tables: a score, and what limits its comparison, such as a part of the questions, own
wording or cut prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore, section

LIMITED, BEYOND = "†", "‡"
LEGEND = {
    LIMITED: "not comparable with the published figures or with another model's as it stands, for the reasons below",
    BEYOND: "longer than the positions of the model's config",
}


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One score of a table."""

    value: float
    notes: dict[str, int] = field(default_factory=dict)
    """What limits its comparison: {reason: number of prompts; 0 = all}."""
    beyond: int = 0
    """Positions of the model's config where a prompt is longer; 0 = none is."""

    def all_notes(self) -> dict[str, int]:
        """All notes, including `beyond`."""
        beyond = f"{BEYOND} beyond the {self.beyond:,} positions of the model's config"
        return {**self.notes, **({beyond: 0} if self.beyond else {})}

    def number(self) -> str:
        return f"{self.value:.2f}" if abs(self.value) < 1e6 else f"{self.value:.3g}"

    def marks(self) -> str:
        return LIMITED * bool(self.notes) + BEYOND * bool(self.beyond)


def combined(value: float, cells: Iterable[TableCell], *more: str) -> TableCell:
    """A cell with `value`, computed from `cells`, with the notes of all of them; more: its own notes."""
    notes = dict.fromkeys(more, 0)
    beyond = 0
    for cell in cells:
        beyond = max(beyond, cell.beyond)
        for note, count in cell.notes.items():
            notes[note] = notes.get(note, 0) + count
    return TableCell(value=value, notes=notes, beyond=beyond)


def mean(cells: Iterable[TableCell], *more: str) -> TableCell:
    every = list(cells)
    return combined(sum(cell.value for cell in every) / len(every), every, *more)


def notes_of(result: BenchmarkResult, score: TaskScore) -> dict[str, int]:
    """What limits the comparison of one score. ValueError where the result has another form."""
    settings, extra = result.settings, result.extra
    prompts = section(section(settings, "prompts"), score.task)
    notes: dict[str, int] = {}
    if limit := settings.get("limit"):
        notes[f"only the first {limit} questions"] = 0
    official = settings.get("official_samples")
    if score.count is not None and isinstance(official, int) and score.count < official:
        notes[f"{score.count} of {official} samples per task and length"] = 0
    if "own" in str(prompts.get("wording", settings.get("wording"))).split():
        notes["own wording"] = 0
    if prompts.get("haystack") == "own sentences":
        notes["own sentences in place of essays"] = 0
    if prompts.get("words") == "own":
        notes["own word lists"] = 0
    if count := score.notes.get("cut"):
        limit = _count(settings.get("max_length"))
        notes[f"prompts cut in the middle, to {limit} tokens including the answer"] = count
    if count := score.notes.get("refused"):
        notes["prompts refused by the endpoint"] = count
    for key, note in (
        ("prompts_cut", "prompts lost their beginning"),
        ("unanswered", "prompts were refused by the endpoint"),
    ):  # of `standard`, over all tasks
        if count := extra.get(key):
            notes[f"{count} {note}"] = 0
    return notes


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "fewer"
