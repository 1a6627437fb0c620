"""RULER, as NVIDIA/RULER's scripts/data/prepare.py writes it: TASK/{validation,test}.jsonl with index, input,
outputs, length, answer_prefix.

`input` is the complete prompt. It is split where its last question starts, so that `context + question`
equals `input`; an input without one of RULER's questions is all context. `answer_prefix`, with which the
model's answer begins, is in meta. Scoring requires all of `answers` (niah, vt, cwe, fwe) or one of them (qa).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import BenchmarkExample, OfficialFiles, read_jsonl

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


def split_of(path: Path) -> str | None:
    """Return test for TASK/validation.jsonl, TASK/test.jsonl and TASK.jsonl, None for other files."""
    task = path.parent.name if path.stem in ("validation", "test") else path.stem
    return "test" if path.suffix == ".jsonl" and task in TASKS else None


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    """Read the examples; the task is the name of the file, or of the folder of a validation or test file."""
    task = path.stem if path.stem not in ("validation", "test") else path.parent.name
    for record in read_jsonl(path):
        text = record.get("input")
        start = max((match.start() for match in _QUESTION.finditer(text)), default=len(text))
        record.get("length", int)
        yield BenchmarkExample(
            benchmark="ruler",
            task=task,
            split="test",
            id=str(record.get("index", int)),
            context=text[:start],
            question=text[start:],
            answers=record.texts("outputs"),
            meta=record.without("index", "input", "outputs"),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="",
    patterns=(),
    homepage="https://github.com/NVIDIA/RULER",
    split_of=split_of,
    read_file=read_file,
)
