"""Cells of the report's tables: a score, and what it is told with, read from the result: a part of the
questions, own wording, cut prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PART, BEYOND = "†", "‡"
LEGEND = {
    PART: "no figure to put beside the published ones or another model's as it stands, for what is told of it below",
    BEYOND: "longer than the positions of the model's config",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score of a table."""

    value: float
    notes: dict[str, int] = field(default_factory=dict)
    """What keeps it from being compared: {what: of how many prompts; 0 = of all}."""
    beyond: int = 0
    """Positions of the model's config, where a prompt is longer; 0 = none is."""

    def told(self) -> dict[str, int]:
        """All notes, `beyond` among them."""
        return {
            **self.notes,
            **(
                {f"{BEYOND} beyond the {self.beyond:,} positions of the model's config": 0}
                if self.beyond
                else {}
            ),
        }

    def number(self) -> str:
        return f"{self.value:.2f}" if abs(self.value) < 1e6 else f"{self.value:.3g}"

    def marks(self) -> str:
        return PART * bool(self.notes) + BEYOND * bool(self.beyond)


def joined(value: float, cells: Iterable[Cell], *more: str) -> Cell:
    """`value`, which was made of `cells`, with all that they are told with; more: notes of its own."""
    notes = dict.fromkeys(more, 0)
    beyond = 0
    for cell in cells:
        beyond = max(beyond, cell.beyond)
        for note, count in cell.notes.items():
            notes[note] = notes.get(note, 0) + count
    return Cell(value=value, notes=notes, beyond=beyond)


def mean(cells: Iterable[Cell], *more: str) -> Cell:
    every = list(cells)
    return joined(sum(cell.value for cell in every) / len(every), every, *more)


def notes_of(raw: dict[str, Any], name: str, cell: dict[str, Any]) -> dict[str, int]:
    """Notes of one score of a result: of the task or set `name`, with its counts in `cell`. ValueError where
    the result has another form."""
    settings, of, made = part(raw, "settings"), part(raw, "of"), part(part(raw, "data"), name)
    found: dict[str, int] = {}
    if limit := settings.get("limit") or of.get("limit"):
        found[f"only the first {limit} questions"] = 0
    samples, official = cell.get("samples"), raw.get("official_samples")
    if isinstance(samples, int) and isinstance(official, int) and samples < official:
        found[f"{samples} of {official} samples a task and length"] = 0
    if "own" in str(made.get("wording", raw.get("wording"))).split():
        found["own wording"] = 0
    if made.get("haystack") == "own sentences":
        found["own sentences in place of essays"] = 0
    if made.get("words") == "own":
        found["own lists of words"] = 0
    for key, note in (
        ("cut", f"prompts cut in the middle, to {_count(settings.get('max_length'))} tokens with the answer"),
        ("refused", "prompts without an answer from the endpoint"),
    ):
        if (count := cell.get(key, 0)) and isinstance(count, int):
            found[note] = count
    for key, note in (
        ("prompts_cut", "prompts lost their beginning"),
        ("unanswered", "prompts were not answered"),
    ):  # of `standard`, over all tasks
        if count := raw.get(key):
            found[f"{count} {note}"] = 0
    return found


def part(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object inside another; {} where there is none. ValueError where it is something else."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"`{name}` is no object")
    return found or {}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "fewer"
