"""Settings of a RULER run, and its files.

    OUT/data/TASK/LENGTH.jsonl                 prepare: index, input, outputs, length, answer_prefix and meta
    OUT/predictions/TASK/LENGTH.journal.jsonl  predict: answers as they arrive
    OUT/predictions/TASK/LENGTH.jsonl          predict: index, pred, outputs, once all are available
    OUT/ruler.json                             score

Data made by NVIDIA/RULER itself (LENGTH/data/TASK/validation.jsonl) is read as it is: `RulerSettings.data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.prompts.encode import ChatMode
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS

OFFICIAL_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class RulerSettings:
    """Which prompts are made and answered."""

    out: Path
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    """All tokens: chat template, prompt, first words of the answer, tokens to generate."""
    samples: int = OFFICIAL_SAMPLES
    """Prompts per task and length."""
    seed: int = 0
    chat: ChatMode = "auto"
    haystack: tuple[Path, ...] = ()
    """Text for the tasks with an essay; none = this project's sentences."""
    squad: Path | None = None
    hotpotqa: Path | None = None
    official: Path | None = None
    """Checkout of NVIDIA/RULER whose wording is used; None = see `own_words`."""
    own_words: bool = False
    """Use this project's wording even where the official one is installed (lm-evaluation-harness)."""
    data: Path | None = None
    """Where prompts are read from; None = those made here, in `out`/data."""

    def __post_init__(self) -> None:
        for option, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values or len(set(values)) != len(values):
                raise UserError(f"--{option}: give at least one value, and each only once")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"--tasks {unknown[0]}: no such task; choose all, or some of {', '.join(TASKS)}")
        if self.samples < 1 or min(self.lengths) < 1:
            raise UserError("--samples and --lengths must be at least 1")

    def runnable(self) -> tuple[str, ...]:
        """The tasks whose files are available: qa_1 and qa_2 need SQuAD and HotpotQA, or prompts or
        predictions made of them."""
        return tuple(
            task
            for task in self.tasks
            if self.data is not None
            or not TASKS[task].data
            or self.qa_file(task) is not None
            or all(
                self.prompt_file(task, length).is_file() or self.prediction_file(task, length).is_file()
                for length in self.lengths
            )
        )

    def qa_file(self, task: str) -> Path | None:
        """SQuAD's or HotpotQA's file of a task."""
        return {"squad": self.squad, "hotpotqa": self.hotpotqa}.get(TASKS[task].data)

    def prompt_file(self, task: str, length: int) -> Path:
        return self.out / "data" / task / f"{length}.jsonl"

    def prediction_file(self, task: str, length: int) -> Path:
        return self.out / "predictions" / task / f"{length}.jsonl"

    def find_prompt_file(self, task: str, length: int) -> Path:
        """The prompts of a task and length, in this project's layout or in NVIDIA/RULER's. UserError where
        none exist."""
        root = self.data or self.out / "data"
        places = [
            root / task / f"{length}.jsonl",
            *(root / str(length) / "data" / task / f"{name}.jsonl" for name in ("validation", "test")),
        ]
        for place in places:
            if place.is_file():
                return place
        other = (
            f"leave {task} out with --tasks"
            if self.data
            else "run --stage prepare first, or give its folder as --data"
        )
        raise UserError(f"{places[0]}: no such file (nor {places[1].relative_to(root)}); {other}")


def prompt_fields(path: Path, line: dict[str, Any]) -> tuple[str, str, list[str]]:
    """(user message, first words of the answer, expected answers) of a line of prompts."""
    text, prefix, outputs = line.get("input"), line.get("answer_prefix", ""), line.get("outputs")
    if (
        not isinstance(text, str)
        or not isinstance(prefix, str)
        or not isinstance(outputs, list)
        or not outputs
    ):
        raise UserError(
            f"{path}: a line without `input` (text) and `outputs` (list of texts), which RULER's data has"
        )
    return text, prefix, [str(output) for output in outputs]
