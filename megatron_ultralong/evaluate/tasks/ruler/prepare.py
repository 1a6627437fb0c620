"""First stage of RULER: write the prompts of all tasks and lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.prompts.encode import PromptEncoder
from megatron_ultralong.evaluate.tasks.ruler import filler_text, qa_files, wording
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial
from megatron_ultralong.evaluate.tasks.ruler.sample import make_sample
from megatron_ultralong.evaluate.tasks.ruler.settings import RulerSettings
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS
from megatron_ultralong.io import jsonl


def prepare(settings: RulerSettings, tokenizer: Any, progress: Callable[[int], Any] = lambda n: None) -> None:
    """Write the prompts of all tasks and lengths; a stopped run is resumed. UserError where an existing file
    was made with other settings."""
    words = wording.choose(settings.official, settings.own_words)
    needed: set[str] = {TASKS[task].data for task in settings.tasks}
    qa_data: dict[str, qa_files.QAData] = {
        name: read(path)
        for name, path, read in (
            ("squad", settings.squad, qa_files.read_squad),
            ("hotpotqa", settings.hotpotqa, qa_files.read_hotpotqa),
        )
        if path is not None and name in needed
    }
    encoder = PromptEncoder(tokenizer, settings.chat)
    material = PromptMaterial(
        encoder,
        words,
        seed=settings.seed,
        qa_data=qa_data,
        haystack=filler_text.read_haystack(settings.haystack) if settings.haystack else None,
    )
    common = {
        "seed": settings.seed,
        "wording": words.name,
        "tokenizer": f"{len(tokenizer)} tokens",
        "chat": encoder.chat,
    }
    for length in settings.lengths:
        for task in settings.runnable():
            data = TASKS[task].data
            if data and data not in qa_data:  # prompts or predictions of an earlier run suffice
                progress(settings.samples)
                continue
            count = min(settings.samples, len(qa_data[data].questions)) if data else settings.samples
            progress(settings.samples - count)
            made_with = {**common, **_text_sources(settings, task)}
            _write_prompts(
                settings.prompt_file(task, length), material, (task, length, count), made_with, progress
            )


def _write_prompts(
    path: Path,
    material: PromptMaterial,
    which: tuple[str, int, int],
    made_with: dict[str, Any],
    progress: Callable[[int], Any],
) -> None:
    """which: task, length, number of prompts."""
    task, length, count = which
    if path.exists() and _is_complete(path, count, made_with):
        progress(count)
        return
    with jsonl.ResumableFile(path, keep=("index", "meta")) as file:
        for number, line in enumerate(file.done):
            _check_line(file.part, line, number, made_with)
        progress(len(file.done))
        for index in range(len(file.done), count):
            sample = make_sample(material, task, length, index)
            file.add({**sample, "meta": {**sample["meta"], **made_with}})
            progress(1)


def _text_sources(settings: RulerSettings, task: str) -> dict[str, Any]:
    """Which text the prompts of a task are made of, for their meta."""
    parameters = TASKS[task]
    if parameters.data:
        path = settings.qa_file(task)
        return {"source": path.name if path else ""}
    own_words = parameters.kind == "cwe" or (parameters.kind == "niah" and parameters.key == "words")
    essays = [path.name for path in settings.haystack] or "own sentences"
    return {
        **({"words": "own"} if own_words else {}),
        **({"haystack": essays} if parameters.haystack == "essay" else {}),
    }


def _is_complete(path: Path, count: int, made_with: dict[str, Any]) -> bool:
    number = -1
    for number, line in enumerate(jsonl.read(path)):
        _check_line(path, line, number, made_with)
    return number + 1 >= count


def _check_line(path: Path, line: dict[str, Any], number: int, made_with: dict[str, Any]) -> None:
    """UserError where a line of `path` is not prompt `number`, or was not made with `made_with`."""
    if line.get("index") != number:
        raise UserError(
            f"{path}, line {number + 1}: is prompt {line.get('index')}, not {number}; remove the file to make it again"
        )
    for name, value in made_with.items():
        if (before := line.get("meta", {}).get(name)) != value:
            raise UserError(
                f"{path} was made with {name} {json.dumps(before)}, not {json.dumps(value)}; give another --output, or remove it"
            )
