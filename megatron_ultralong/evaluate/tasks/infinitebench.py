"""InfiniteBench (OpenBMB/InfiniteBench): 12 tasks on contexts of 100K tokens and more.

Everything but the wording follows that repository: length of the answers and the parts of an example in a
prompt (src/eval_utils.py), cutting of the middle, scorers (src/compute_scores.py). Its wording is read from a
checkout (--official): the templates for open models (yarn_mistral_templates of src/prompt.py), whose last
words begin the answer. This project's own wording asks the same, in the same order.
"""

from __future__ import annotations

import argparse
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
from megatron_ultralong.evaluate.pipeline import command, file_benchmark, stages
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.prompts import official
from megatron_ultralong.evaluate.scorers.infinitebench import score
from megatron_ultralong.io.text_table import text_table
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files.infinitebench import TASKS
from megatron_ultralong.official_files.records import BenchmarkExample

HELP = "InfiniteBench: 12 tasks on contexts of 100K tokens and more"
DESCRIPTION = "InfiniteBench, from its official files: 12 tasks, each with its own scorer."
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
"""Maximum tokens of the answers of a task."""

_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}"
OWN = {
    "passkey": "One fact that matters stands somewhere in the text below, among much that does not. Remember it: a "
    "question about it follows.\n\n"
    "{context}\n\n{input}\n\nThe pass key is",
    "number_string": "One fact that matters stands somewhere in the text below, among much that does not. Find it: a "
    "question about it follows.\n\n"
    "{context}\n\n{input}\n\nThe sequence of digits is",
    "kv_retrieval": "Below is a JSON object. Give the value of one of its keys.\n\n{context}\n\n{input}",
    "code_run": "Below are Python functions, {func} among them.\n\n{context}\n\nWork out what {func_call} returns. "
    "The value that {func_call} returns is",
    "code_debug": "One function or method of the Python code below was changed on purpose, so that it "
    "fails.\n\n{context}\n\nWhich one?\n" + _OPTIONS + "\n\nThe right option is:",
    "math_find": "{prefix}\n\n{context}\n\n{input}",
    "math_calc": "These are sums, and the result after each of their numbers.\n\nSum: 2 + 5 + 1\nResults: [2, 7, "
    "8]\n\nSum: 9 - 4 + 3 - 6\n"
    "Results: [9, 5, 8, 2]\n\nSum: {context}\nResults:",
    "longdialogue_qa_eng": 'In the script below a character\'s name was replaced by "$$MASK$$" in one place. Guess '
    "whose it is.\n\n{context}\n\n"
    "The name in the place of $$MASK$$ is most likely",
    "longbook_qa_eng": "Below is a book, then a question about it. Answer in as few words as you "
    "can.\n\n{context}\n\nQuestion: {question}\nAnswer:",
    "longbook_sum_eng": "Below is a book. Write a summary of it.\n\n{context}\n\nSummary:",
    "longbook_choice_eng": "Below is a book, then a question about it.\n\n{context}\n\nQuestion: {question}\n"
    + _OPTIONS
    + "\n\nThe letter of the right answer is",
    "longbook_qa_chn": "以下是一本书，后面有一个关于它的问题。\n\n{context}\n\n问题：{question}\n答案：",
}
OWN_FIND = "Look for {target_number} in this list."
"""The beginning of math_find's prompt."""


@dataclass(frozen=True, kw_only=True)
class InfiniteBenchSettings:
    """Which questions are asked, and how."""

    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    """Only the first questions of each task; None = all."""
    official: Path | None = None
    """A checkout of OpenBMB/InfiniteBench, for its wording; None = own wording."""

    def __post_init__(self) -> None:
        command.check_names("--tasks", self.tasks, TASKS)
        command.check_limit(self.limit)


def find_files(data: str | Path, settings: InfiniteBenchSettings) -> list[Path]:
    """The official files in `data`, or on the hub, of the requested tasks; UserError where none exists, or
    one exists twice."""
    paths = official_files.find_files("infinitebench", data, names=settings.tasks)
    for one, other in itertools.combinations(paths, 2):
        if one.stem == other.stem:
            raise UserError(f"--data: {one} and {other} are the same task; keep one of them")
    return paths


def prepare(
    out: Path, data: str | Path, settings: InfiniteBenchSettings, progress: Any = lambda n: None
) -> int:
    """Write the prompts (stages.py) of the official files in `data`, or on the hub; returns the number of
    questions. UserError where a requested task is missing."""
    paths, templates, find = find_files(data, settings), OWN, OWN_FIND
    if settings.official is not None:
        source = settings.official / "src"
        fields = {name: set(re.findall(r"\{(\w+)\}", template)) for name, template in OWN.items()}
        templates = official.read(source / "prompt.py", "yarn_mistral_templates", fields)
        find = official.read_f_string(source / "eval_utils.py", "prefix", {"target_number"})
    wording = json.dumps([templates, find], sort_keys=True)
    made_from = {
        "wording": "own" if settings.official is None else "official",
        "tasks": settings.tasks,
        "limit": settings.limit,
        "templates_sha256": hashlib.sha256(wording.encode()).hexdigest(),
        "files": stages.file_versions(paths),
    }
    questions = _questions(paths, settings, templates, find)
    return stages.prepare(out, "infinitebench", made_from, questions, progress)


def _questions(
    paths: Iterable[Path], settings: InfiniteBenchSettings, templates: dict[str, str], find: str
) -> Iterator[stages.BenchmarkQuestion]:
    taken: dict[str, int] = defaultdict(int)
    for example in official_files.read_examples("infinitebench", paths):
        if taken[example.task] == settings.limit:
            continue
        number = taken[example.task]  # the official code numbers them by position
        taken[example.task] += 1
        text = official.fill(templates[example.task], _fields(example, find))
        yield stages.BenchmarkQuestion(
            id=f"{example.task}/{number}",
            task=example.task,
            text=text,
            start=answer_start(text),
            max_tokens=ANSWER_TOKENS[example.task],
            gold={"answer": _gold(example)},
        )
    missing = [task for task in settings.tasks if not taken[task]]
    if missing and settings.tasks != TASKS:  # by default the tasks in --data suffice
        raise UserError(f"--data contains no {', '.join(missing)}; download it, or leave it out with --tasks")


def answer_start(text: str) -> str:
    """The last sentence of the last line where the answer has to complete it ("The pass key is", "Summary:"),
    otherwise an empty string."""
    last = re.split(r"(?<=[.?!。？！])\s+(?=\S)", text.rpartition("\n")[2])[-1]
    return "" if re.search(r"[.?!。？！\"']\s*$", last) or not last.strip() else last


def _fields(example: BenchmarkExample, find: str) -> dict[str, str]:
    """The fields that the templates of a task may contain."""
    fields = {
        "context": example.context,
        "input": example.question,
        "question": example.question,
        **{f"OPTION_{letter}": text for letter, text in zip("ABCD", example.choices)},
    }
    if example.task == "code_run":
        call = _search(r"(func_[0-9]+)\(-?[0-9]+\)", example)
        fields |= {"func": call[1], "func_call": call[0]}
    if example.task == "math_find":
        target = _search(r"(The .+) of", example)[1].lower()  # "The largest number of the list is:"
        fields["prefix"] = official.fill(find, {"target_number": target})
    return fields


def _search(pattern: str, example: BenchmarkExample) -> re.Match[str]:
    match = re.search(pattern, example.question)
    if match is None:
        raise UserError(
            f"{example.place}: field 'input' contains nothing like {pattern}; is this the official file?"
        )
    return match


def _gold(example: BenchmarkExample) -> list[Any]:
    """The answers as the scorer expects them: strings; numbers where it compares numbers; text and letter of
    a choice."""
    answers = list(example.answers)
    if example.task in ("code_run", "math_find", "math_calc"):
        numbers = _flat(example.meta["answer"])
        if not numbers or not all(
            isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
        ):
            raise UserError(
                f"{example.place}: field 'answer' contains no numbers; is this the official file?"
            )
        return numbers
    if example.task in ("code_debug", "longbook_choice_eng"):
        if len(answers) == 2 and answers[1] in tuple("ABCD"):
            return answers
        if len(answers) != 1 or answers[0] not in example.choices:
            raise UserError(f"{example.place}: field 'answer' contains none of the options")
        return [answers[0], "ABCD"[example.choices.index(answers[0])]]
    return answers


def _flat(answer: Any) -> list[Any]:
    """Flatten a number, a list of numbers, or a list in a list to a list."""
    while isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], list):
        answer = answer[0]
    return answer if isinstance(answer, list) else [answer]


def results(out: Path) -> BenchmarkResult:
    """Score the predictions in `out`."""
    header, scored = stages.score(
        out, "infinitebench", lambda gold, text: score(gold["task"], text, gold["answer"])
    )
    groups = {task: [line for line in scored if line["task"] == task] for task in TASKS}
    scores = [file_benchmark.task_score(task, group) for task, group in groups.items() if group]
    average = file_benchmark.average([one.score for one in scores if one.score is not None], len(TASKS))
    return file_benchmark.benchmark_result("infinitebench", header, scores, {"all tasks": average})


def table(result: BenchmarkResult) -> str:
    """One line per task, as plain text."""
    rows = [["task", "score ", "questions", "cut"]]
    rows += [
        [one.task, f"{one.score:.2f}{file_benchmark.mark(one)}", str(one.count), str(one.notes["cut"])]
        for one in result.scores
    ]
    return "\n".join([*text_table(rows), *file_benchmark.footnotes(result)])


# ---- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    file_benchmark.add_arguments(parser, "InfiniteBench", "TASK.jsonl")
    parser.add_argument(
        "--tasks", metavar="TASK,TASK,...", help=f"any of {', '.join(TASKS)} (default: those in --data)"
    )


def run_command(args: argparse.Namespace) -> None:
    settings = InfiniteBenchSettings(
        tasks=command.parse_names(args.tasks, TASKS), limit=args.samples, official=args.official
    )
    benchmark = file_benchmark.FileBenchmark(
        name="infinitebench",
        find_files=lambda data: find_files(data, settings),
        prepare=lambda out, data, progress: prepare(out, data, settings, progress),
        score=results,
        table=table,
    )
    file_benchmark.run(args, benchmark)
