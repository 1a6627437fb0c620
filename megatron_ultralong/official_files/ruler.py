"""RULER, as NVIDIA/RULER's scripts/data/prepare.py writes it: TASK/{validation,test}.jsonl with index, input,
outputs, length, answer_prefix.

`input` is the whole prompt. It is taken apart where its last question starts, so that `context + question` is
`input` again; an input without one of RULER's questions is all context. `answer_prefix`, which the model's
answer begins with, is in meta. Scoring wants all of `answers` (of niah, vt, cwe, fwe) or one of them (qa).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import Example, read_jsonl

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)

_QUESTION = re.compile(r"\b(?:What (?:are all|is) the special magic |Question: )")


def split_of(benchmark: str, path: Path) -> str | None:
    """test for TASK/validation.jsonl, TASK/test.jsonl and TASK.jsonl; None for other files."""
    if path.suffix != ".jsonl":
        return None
    return (
        "test"
        if path.stem in TASKS or (path.stem in ("validation", "test") and path.parent.name in TASKS)
        else None
    )


def read(benchmark: str, paths: Iterable[Path]) -> Iterator[Example]:
    """The examples of the files, in order; the task is the name of the folder, or of the file where that is a
    task's."""
    for path in paths:
        task = path.stem if path.stem not in ("validation", "test") else path.parent.name
        for record in read_jsonl(path):
            text = record.get("input")
            start = max((found.start() for found in _QUESTION.finditer(text)), default=len(text))
            record.get("length", int)
            yield Example(
                benchmark=benchmark,
                task=task,
                split="test",
                id=str(record.get("index", int)),
                context=text[:start],
                question=text[start:],
                answers=record.texts("outputs"),
                meta=record.rest("index", "input", "outputs"),
                place=record.place,
            )
