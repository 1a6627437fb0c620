"""The short benchmarks: MMLU, MMLU-Pro, MATH, GSM8K, HumanEval, in their authors' files and in those of the
hub.

    mmlu       hendrycks/test: {test,dev,val}/SUBJECT_{test,dev,val}.csv, no header; cais/mmlu: all/{test,dev,validation}-*.parquet
    mmlu_pro   TIGER-Lab/MMLU-Pro: data/{test,validation}-*.parquet
    math       hendrycks/math: MATH/{test,train}/SUBJECT/N.json; EleutherAI/hendrycks_math: SUBJECT/{test,train}-*.parquet
    gsm8k      openai/grade-school-math: {test,train}.jsonl; openai/gsm8k: main/{test,train}-*.parquet
    humaneval  openai/human-eval: HumanEval.jsonl.gz; openai/openai_humaneval: openai_humaneval/test-*.parquet

Answers: the letter (mmlu, mmlu_pro); the whole worked solution (math, gsm8k: the final result stands in
\\boxed{} and after ####); the body of the function (humaneval).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import Example, Record, letter, read_any, read_csv, read_json

NAMES = ("mmlu", "mmlu_pro", "math", "gsm8k", "humaneval")

_HUB = re.compile(r"(test|dev|validation|train)-\d+-of-\d+.*\.parquet")
_OFFICIAL = {
    "mmlu": re.compile(r".+_(test|dev|val)\.csv"),
    "gsm8k": re.compile(r"(test|train)\.jsonl"),
    "humaneval": re.compile(r"HumanEval\.jsonl(?:\.gz)?"),
}
_COLUMNS = ("question", "A", "B", "C", "D", "answer")


def split_of(benchmark: str, path: Path) -> str | None:
    """The split that a file holds, by its name; None for a file that is not one of the benchmark's, or says
    what others say too."""
    if "socratic" in path.parts:
        return None  # GSM8K's same questions, answered in another way
    if benchmark == "mmlu" and path.parent.name != "all" and (path.parent.parent / "all").is_dir():
        return None  # a single subject of cais/mmlu, which `all` holds too
    if benchmark == "math" and path.suffix == ".json":
        return path.parent.parent.name if path.parent.parent.name in ("test", "train") else None
    found = _HUB.fullmatch(path.name) or (
        _OFFICIAL[benchmark].fullmatch(path.name) if benchmark in _OFFICIAL else None
    )
    if found is None:
        return None
    split = found[1] if found.re.groups else "test"
    return "validation" if split == "val" else split


def read(benchmark: str, paths: Iterable[Path]) -> Iterator[Example]:
    """The examples of the files, in order. UserError where a file is not what the benchmark's files are."""
    numbers: Counter[tuple[str, str]] = Counter()  # examples so far of a task and split
    for path in paths:
        split = split_of(benchmark, path) or "test"
        for record in _records(benchmark, path):
            task, name, question, answers, choices, used = _FIELDS[benchmark](record, path)
            number = numbers[task, split]
            numbers[task, split] += 1
            yield Example(
                benchmark=benchmark,
                task=task,
                split=split,
                id=name or str(number),
                question=question,
                answers=answers,
                choices=choices,
                meta=record.rest(*used),
                place=record.place,
            )


def _records(benchmark: str, path: Path) -> Iterator[Record]:
    if path.suffix == ".csv":
        return read_csv(path, _COLUMNS)
    if path.suffix == ".json":
        return iter([read_json(path)])
    return read_any(path)


_Parts = tuple[str, str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""Task, id ("" = none), question, answers, choices, and the names of the fields these were made of."""


def _mmlu(record: Record, path: Path) -> _Parts:
    if path.suffix == ".csv":
        choices = tuple(record.get(name) for name in _COLUMNS[1:5])
        return (
            re.sub(r"_(test|dev|val)$", "", path.stem),
            "",
            record.get("question"),
            (letter(record, "answer", 4),),
            choices,
            _COLUMNS,
        )
    choices = record.texts("choices")
    return (
        record.get("subject"),
        "",
        record.get("question"),
        (letter(record, "answer", len(choices)),),
        choices,
        ("subject", "question", "choices", "answer"),
    )


def _mmlu_pro(record: Record, path: Path) -> _Parts:
    choices = record.texts("options")
    answer = letter(record, "answer", len(choices))
    if record.get("answer_index", int) != ord(answer) - ord("A"):
        raise UserError(
            f"{record.place}: field 'answer_index' holds {record.data['answer_index']}, but 'answer' {answer}"
        )
    return (
        record.get("category"),
        str(record.get("question_id", int)),
        record.get("question"),
        (answer,),
        choices,
        ("category", "question_id", "question", "options", "answer", "answer_index"),
    )


def _math(record: Record, path: Path) -> _Parts:
    name = path.stem if path.suffix == ".json" else ""
    return (
        record.get("type"),
        name,
        record.get("problem"),
        (record.get("solution"),),
        (),
        ("type", "problem", "solution"),
    )


def _gsm8k(record: Record, path: Path) -> _Parts:
    return "gsm8k", "", record.get("question"), (record.get("answer"),), (), ("question", "answer")


def _humaneval(record: Record, path: Path) -> _Parts:
    record.get("test"), record.get("entry_point")  # scoring needs them
    return (
        "humaneval",
        record.get("task_id"),
        record.get("prompt"),
        (record.get("canonical_solution"),),
        (),
        ("task_id", "prompt", "canonical_solution"),
    )


_FIELDS = {"mmlu": _mmlu, "mmlu_pro": _mmlu_pro, "math": _math, "gsm8k": _gsm8k, "humaneval": _humaneval}
