"""InfiniteBench: 12 tasks on contexts of 100K tokens and more, OpenBMB/InfiniteBench.

Everything but the wording follows that repository: tokens to write and what of an example a prompt holds
(src/eval_utils.py), cutting of the middle, scorers (src/compute_scores.py). Its wording is read from a
checkout (`official`): the one that it asks open models in (yarn_mistral_templates of src/prompt.py), whose
last words begin the answer. Ours asks the same in the same order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import stage_files, stages
from megatron_ultralong.evaluate.prompts import official
from megatron_ultralong.evaluate.scorers.infinitebench import score
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files.infinitebench import TASKS
from megatron_ultralong.official_files.records import BenchmarkExample

ANSWER_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "code_run": 5,
    "code_debug": 5,
    "math_find": 3,
    "math_calc": 30_000,
    "longdialogue_qa_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_chn": 40,
}
"""Tokens that a task's answers may have."""

_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}"
OWN = {
    "passkey": "One fact that matters stands somewhere in the text below, among much that does not. Remember it: a question about it follows.\n\n"
    "{context}\n\n{input}\n\nThe pass key is",
    "number_string": "One fact that matters stands somewhere in the text below, among much that does not. Find it: a question about it follows.\n\n"
    "{context}\n\n{input}\n\nThe sequence of digits is",
    "kv_retrieval": "Below is a JSON object. Give the value of one of its keys.\n\n{context}\n\n{input}",
    "code_run": "Below are Python functions, {func} among them.\n\n{context}\n\nWork out what {func_call} returns. The value that {func_call} returns is",
    "code_debug": "One function or method of the Python code below was changed on purpose, so that it fails.\n\n{context}\n\nWhich one?\n"
    + _OPTIONS
    + "\n\nThe right option is:",
    "math_find": "{prefix}\n\n{context}\n\n{input}",
    "math_calc": "These are sums, and the result after each of their numbers.\n\nSum: 2 + 5 + 1\nResults: [2, 7, 8]\n\nSum: 9 - 4 + 3 - 6\n"
    "Results: [9, 5, 8, 2]\n\nSum: {context}\nResults:",
    "longdialogue_qa_eng": 'In the script below a character\'s name was replaced by "$$MASK$$" in one place. Guess whose it is.\n\n{context}\n\n'
    "The name in the place of $$MASK$$ is most likely",
    "longbook_qa_eng": "Below is a book, then a question about it. Answer in as few words as you can.\n\n{context}\n\nQuestion: {question}\nAnswer:",
    "longbook_sum_eng": "Below is a book. Write a summary of it.\n\n{context}\n\nSummary:",
    "longbook_choice_eng": "Below is a book, then a question about it.\n\n{context}\n\nQuestion: {question}\n"
    + _OPTIONS
    + "\n\nThe letter of the right answer is",
    "longbook_qa_chn": "以下是一本书，后面有一个关于它的问题。\n\n{context}\n\n问题：{question}\n答案：",
}
OWN_FIND = "Look for {target_number} in this list."
"""What math_find's prompt begins with."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is asked."""

    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    """The first so many questions of each task; None = all."""
    official: Path | None = None
    """A checkout of OpenBMB/InfiniteBench, for its wording; None = our own."""

    def __post_init__(self) -> None:
        stages.check_names("--tasks", self.tasks, TASKS)
        stages.check_limit(self.limit)


def find_files(data: str | Path, choice: Choice) -> list[Path]:
    """The official files in `data`, or of the hub, that hold what is asked for; UserError where there are
    none, or one of them twice."""
    paths = official_files.find_files("infinitebench", data, names=choice.tasks)
    for one, other in itertools.combinations(paths, 2):
        if one.stem == other.stem:
            raise UserError(f"--data: {one} and {other} are the same task; keep one of them")
    return paths


def prepare(out: Path, data: str | Path, choice: Choice, progress: Any = lambda n: None) -> int:
    """The first stage (stages.py) of the official files in `data`, or on the hub; returns the number of
    questions. UserError where a task that was asked for is not among them."""
    paths, templates, find = find_files(data, choice), OWN, OWN_FIND
    if choice.official is not None:
        source = choice.official / "src"
        fields = {name: set(re.findall(r"\{(\w+)\}", template)) for name, template in OWN.items()}
        templates = official.read(source / "prompt.py", "yarn_mistral_templates", fields)
        find = official.read_f_string(source / "eval_utils.py", "prefix", {"target_number"})
    of = {
        "wording": "own" if choice.official is None else "official",
        "tasks": choice.tasks,
        "limit": choice.limit,
        "templates_sha256": hashlib.sha256(
            json.dumps([templates, find], sort_keys=True).encode()
        ).hexdigest(),
        "files": stages.sources(paths),
    }
    return stages.prepare(out, "infinitebench", of, _items(paths, choice, templates, find), progress)


def _items(
    paths: Iterable[Path], choice: Choice, templates: dict[str, str], find: str
) -> Iterator[stages.Item]:
    taken: dict[str, int] = defaultdict(int)
    for example in official_files.read_examples("infinitebench", paths):
        if taken[example.task] == choice.limit:
            continue
        number = taken[example.task]  # as the official code numbers them
        taken[example.task] += 1
        text = official.fill(templates[example.task], _fields(example, find))
        yield stages.Item(
            id=f"{example.task}/{number}",
            task=example.task,
            text=text,
            start=answer_start(text),
            tokens=ANSWER_TOKENS[example.task],
            gold={"answer": _gold(example)},
        )
    missing = [task for task in choice.tasks if not taken[task]]
    if missing and choice.tasks != TASKS:  # where nothing is asked for, whatever there is will do
        raise UserError(f"--data holds no {', '.join(missing)}; download it, or leave it out with --tasks")


def answer_start(text: str) -> str:
    """The last sentence of the last line, where it is left open for the answer to end it ("The pass key is",
    "Summary:"); else nothing."""
    last = re.split(r"(?<=[.?!。？！])\s+(?=\S)", text.rpartition("\n")[2])[-1]
    return "" if re.search(r"[.?!。？！\"']\s*$", last) or not last.strip() else last


def _fields(example: BenchmarkExample, find: str) -> dict[str, str]:
    """What a task's template may hold."""
    fields = {
        "context": example.context,
        "input": example.question,
        "question": example.question,
        **{f"OPTION_{letter}": text for letter, text in zip("ABCD", example.choices)},
    }
    if example.task == "code_run":
        call = _found(r"(func_[0-9]+)\(-?[0-9]+\)", example)
        fields |= {"func": call[1], "func_call": call[0]}
    if example.task == "math_find":
        target = _found(r"(The .+) of", example)[1].lower()  # "The largest number of the list is:"
        fields["prefix"] = official.fill(find, {"target_number": target})
    return fields


def _found(pattern: str, example: BenchmarkExample) -> re.Match[str]:
    found = re.search(pattern, example.question)
    if found is None:
        raise UserError(
            f"{example.place}: field 'input' holds nothing like {pattern}; is this the official file?"
        )
    return found


def _gold(example: BenchmarkExample) -> list[Any]:
    """The answers as the scorer takes them: texts; numbers where it compares numbers; text and letter of a
    choice."""
    answers = list(example.answers)
    if example.task in ("code_run", "math_find", "math_calc"):
        numbers = _flat(example.meta["answer"])
        if not numbers or not all(
            isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
        ):
            raise UserError(f"{example.place}: field 'answer' holds no numbers; is this the official file?")
        return numbers
    if example.task in ("code_debug", "longbook_choice_eng"):
        if len(answers) == 2 and answers[1] in tuple("ABCD"):
            return answers
        if len(answers) != 1 or answers[0] not in example.choices:
            raise UserError(f"{example.place}: field 'answer' holds none of the options")
        return [answers[0], "ABCD"[example.choices.index(answers[0])]]
    if not answers:
        raise UserError(f"{example.place}: field 'answer' is empty")
    return answers


def _flat(answer: Any) -> list[Any]:
    """A number, a list of them, or a list in a list, as a list."""
    while isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], list):
        answer = answer[0]
    return answer if isinstance(answer, list) else [answer]


def results(out: Path) -> dict[str, Any]:
    """The last stage: the results JSON's values. Scores are percent."""
    head, rows = stages.score(
        out, "infinitebench", lambda gold, text: score(gold["task"], text, gold["answer"])
    )
    groups = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    cells = [{"task": task, **stages.mean(group)} for task, group in groups.items() if group]
    return {
        "format": stage_files.FORMAT,
        "wording": head["of"]["wording"],
        **head,
        "task": "infinitebench",
        "averages": {"all tasks": stages.average([cell["score"] for cell in cells], len(TASKS))},
        "cells": cells,
    }


def table(result: dict[str, Any]) -> str:
    """A line a task, as plain text, with `staged.mark`s."""
    rows = [f"{'':24}{'score':>9}{'questions':>11}{'cut':>7}"]
    rows += [
        f"{cell['task']:24}{cell['score']:8.2f}{stages.mark(cell)}{cell['questions']:11}{cell['cut']:7}"
        for cell in result["cells"]
    ]
    return "\n".join([*rows, *stages.notes(result)])
