"""GSM8K: {test,train}.jsonl of openai/grade-school-math; or main/{test,train}-*.parquet of openai/gsm8k. The
answer is the worked solution, with the final result after ####."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import BenchmarkExample, OfficialFiles, hub_split, read_rows


def split_of(path: Path) -> str | None:
    if "socratic" in path.parts:
        return None  # the same questions with answers in another form
    return path.stem if path.name in ("test.jsonl", "train.jsonl") else hub_split(path)


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    for record in read_rows(path):
        yield BenchmarkExample(
            benchmark="gsm8k",
            task="gsm8k",
            split=split_of(path) or "test",
            question=record.get("question"),
            answers=(record.get("answer"),),
            meta=record.without("question", "answer"),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="openai/gsm8k",
    patterns=("main/{split}-*.parquet",),
    homepage="https://github.com/openai/grade-school-math",
    split_of=split_of,
    read_file=read_file,
)
