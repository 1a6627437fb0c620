"""MMLU-Pro: data/{test,validation}-*.parquet of TIGER-Lab/MMLU-Pro. The answer is the letter of the
choice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import BenchmarkExample, OfficialFiles, hub_split, read_rows


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    for record in read_rows(path):
        choices = record.texts("options")
        answer = record.choice_letter("answer", len(choices))
        if record.get("answer_index", int) != ord(answer) - ord("A"):
            raise UserError(
                f"{record.place}: field 'answer_index' is {record.data['answer_index']}, but 'answer' is {answer}"
            )
        yield BenchmarkExample(
            benchmark="mmlu_pro",
            task=record.get("category"),
            split=hub_split(path) or "test",
            id=str(record.get("question_id", int)),
            question=record.get("question"),
            answers=(answer,),
            choices=choices,
            meta=record.without("category", "question_id", "question", "options", "answer", "answer_index"),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="TIGER-Lab/MMLU-Pro",
    patterns=("data/{split}-*.parquet",),
    homepage="https://github.com/TIGER-AI-Lab/MMLU-Pro",
    split_of=hub_split,
    read_file=read_file,
)
