"""InfiniteBench: TASK.jsonl, plain or .gz, with id, context, input, answer (a string, a number or a list),
options.

`answers` are the answer as strings: in math_calc not alternatives but the results after each step, in order;
with options the text of the right one (a letter may follow). The answer as read is in meta: code_run,
math_find and math_calc compare numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import (
    BenchmarkExample,
    OfficialFiles,
    OfficialRecord,
    jsonl_name,
    read_jsonl,
)

TASKS = (
    "passkey",
    "number_string",
    "kv_retrieval",
    "code_run",
    "code_debug",
    "math_find",
    "math_calc",
    "longdialogue_qa_eng",
    "longbook_qa_eng",
    "longbook_sum_eng",
    "longbook_choice_eng",
    "longbook_qa_chn",
)


def split_of(path: Path) -> str | None:
    """Return test for TASK.jsonl, plain or .gz; None for other files."""
    return "test" if jsonl_name(path) in TASKS else None


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    task = jsonl_name(path)
    if task not in TASKS:
        raise UserError(f"{path}: not one of InfiniteBench's files, which are named like {TASKS[0]}.jsonl")
    for record in read_jsonl(path):
        choices = record.texts("options") if record.data.get("options") else ()
        if task in ("code_debug", "longbook_choice_eng") and len(choices) != 4:
            raise UserError(f"{record.place}: field 'options' contains {len(choices)} choices, not 4")
        yield BenchmarkExample(
            benchmark="infinitebench",
            task=task,
            split="test",
            id=str(record.get("id", int)),
            context=record.get("context"),
            question=record.get("input"),
            answers=_flat(record).texts("answer"),
            choices=choices,
            meta=record.without("id", "context", "input"),
            place=record.place,
        )


def _flat(record: OfficialRecord) -> OfficialRecord:
    """Unpack math_calc's numbers, which may be in a nested list."""
    answer = record.data.get("answer")
    inner = (
        answer[0] if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], list) else answer
    )
    return OfficialRecord({**record.data, "answer": inner}, record.place) if inner is not answer else record


FILES = OfficialFiles(
    repo="xinrongzhang2022/InfiniteBench",
    patterns=tuple(f"{name}.jsonl" for name in TASKS),
    homepage="https://github.com/OpenBMB/InfiniteBench",
    split_of=split_of,
    read_file=read_file,
)
