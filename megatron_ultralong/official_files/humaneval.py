"""HumanEval: HumanEval.jsonl.gz of openai/human-eval; or openai_humaneval/test-*.parquet of
openai/openai_humaneval. The answer is the body of the function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import BenchmarkExample, OfficialFiles, hub_split, read_rows


def split_of(path: Path) -> str | None:
    return "test" if path.name in ("HumanEval.jsonl", "HumanEval.jsonl.gz") else hub_split(path)


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    for record in read_rows(path):
        record.get("test"), record.get("entry_point")  # scoring needs them
        yield BenchmarkExample(
            benchmark="humaneval",
            task="humaneval",
            split=split_of(path) or "test",
            id=record.get("task_id"),
            question=record.get("prompt"),
            answers=(record.get("canonical_solution"),),
            meta=record.without("task_id", "prompt", "canonical_solution"),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="openai/openai_humaneval",
    patterns=("openai_humaneval/{split}-*.parquet",),
    homepage="https://github.com/openai/human-eval",
    split_of=split_of,
    read_file=read_file,
)
