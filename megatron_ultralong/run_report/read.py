"""What a run directory records about its run: metrics.jsonl, with the iterations that were trained again in
their last form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.report import read_results
from megatron_ultralong.train.metrics import FILE, FORMAT

Line = dict[str, Any]


@dataclass(kw_only=True)
class RunRecord:
    """A run, over all its processes."""

    folder: Path
    starts: list[Line] = field(default_factory=list)
    """One per process."""
    steps: dict[int, Line] = field(default_factory=dict)
    """By iteration, ascending."""
    validations: dict[int, Line] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Iteration -> scalars by name, of all evaluations."""
    saves: list[Line] = field(default_factory=list)
    """Of all processes, failed ones too."""
    bad_steps: int = 0
    """Iterations of the whole run whose update was not made."""
    lost: dict[int, int] = field(default_factory=dict)
    """Number of a start -> iterations that were trained before it, and again after it."""
    step_seconds: float = 0.0
    """Of all iterations, those included that were trained again."""
    last: Line = field(default_factory=dict)
    """The last line."""
    unreadable: int = 0
    """Lines that are no JSON object."""

    @property
    def start(self) -> Line:
        """The last process's."""
        return self.starts[-1] if self.starts else {}

    @property
    def restarts(self) -> list[int]:
        """Iterations that a later process than the first started from."""
        return [int(start["iteration"]) for start in self.starts[1:]]

    @property
    def status(self) -> str:
        """How the last process ended."""
        if self.last.get("kind") == "stop":
            return str(self.last.get("reason"))
        when = str(self.last.get("time", ""))[:19].replace("T", " ")
        return "no end is recorded: running, or killed" + (f"; last line at {when} UTC" if when else "")

    def series(self, *keys: str) -> dict[int, float]:
        """The figures of a step's field, by iteration, where they are known."""
        found: dict[int, float] = {}
        for iteration, step in self.steps.items():
            value: Any = step
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found[iteration] = float(value)
        return found


def read(folder: Path) -> RunRecord:
    """Read a run directory. UserError where it is none."""
    path = folder / FILE
    if not path.is_file():
        stages = sorted(file.parent.name for file in folder.glob(f"*/{FILE}")) if folder.is_dir() else []
        hint = f"; it contains those of the stages {', '.join(stages)}: give one of them" if stages else ""
        raise UserError(f"{folder} is not a run directory: {FILE} is missing{hint}")
    record = RunRecord(folder=folder)
    try:
        with path.open("rb") as file:
            for text in file:
                _add(record, text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    newest = max((int(start.get("format", 0)) for start in record.starts), default=FORMAT)
    if newest > FORMAT:
        raise UserError(
            f"{path}: unsupported format version {newest} (expected {FORMAT}); use a newer release"
        )
    return record


def _add(record: RunRecord, text: bytes) -> None:
    """Take in a line; the last one of a killed run may be torn."""
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
        record.unreadable += 1
        return
    kind, iteration = line.get("kind"), line["iteration"]
    record.last = line
    if kind == "start":
        record.lost[len(record.starts)] = _forget(record, iteration)
        record.starts.append(line)
    elif kind == "step":
        if record.steps and iteration <= next(reversed(record.steps)):  # the run went back by itself
            _forget(record, iteration - 1)
        record.steps[iteration] = line
        record.step_seconds += float(line.get("seconds") or 0.0)
    elif kind == "validation":
        record.validations[iteration] = line
    elif kind == "evaluation":
        scalars = line.get("scalars")
        found = scalars.items() if isinstance(scalars, dict) else ()
        record.evaluations.setdefault(iteration, {}).update(
            {name: float(value) for name, value in found if isinstance(value, int | float)}
        )
    elif kind == "save" and (line.get("error") or isinstance(line.get("waited"), int | float)):
        record.saves.append(line)
    elif kind == "bad_step":
        record.bad_steps = int(line.get("bad_steps") or 0)


def _forget(record: RunRecord, iteration: int) -> int:
    """Leave out what followed `iteration`, which is trained again; return the number of its iterations."""
    lost = sum(done > iteration for done in record.steps)
    for by_iteration in (record.steps, record.validations, record.evaluations):
        for done in [done for done in by_iteration if done > iteration]:
            del by_iteration[done]  # type: ignore[attr-defined]
    return lost


def add_results(record: RunRecord, places: Iterable[str]) -> list[str]:
    """Add the scores of this run's checkpoints in results of `ultralong evaluate`: the mean over tasks at
    each length. Returns a line per result that is not one of them. UserError as `read_results.collect`."""
    results, notes, _ = read_results.collect(places)
    for one in results:
        path = Path(str(one.result.model.get("path") or ""))
        checkpoint = re.fullmatch(r"iter_(\d+)", path.name)
        if checkpoint is None or path.parent.resolve() != record.folder.resolve():
            notes.append(f"{one.file}: its model {path} is not a checkpoint of this run")
            continue
        by_length: dict[int | None, list[float]] = {}
        for score in one.result.scores:
            if score.score is not None:
                by_length.setdefault(score.length, []).append(score.score)
        name = {"niah": "passkey"}.get(one.kind, one.kind)
        record.evaluations.setdefault(int(checkpoint[1]), {}).update(
            {
                f"{name}/{'all' if length is None else length}": sum(scores) / len(scores)
                for length, scores in by_length.items()
            }
        )
    return notes
