"""MATH: {test,train}/SUBJECT/N.json of hendrycks/math; or SUBJECT/{test,train}-*.parquet of
EleutherAI/hendrycks_math. The answer is the worked solution, with the final result in \\boxed{}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import (
    BenchmarkExample,
    OfficialFiles,
    hub_split,
    read_json,
    read_rows,
)


def split_of(path: Path) -> str | None:
    if path.suffix == ".json":
        split = path.parent.parent.name
        return split if split in ("test", "train") else None
    return hub_split(path)


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    is_json = path.suffix == ".json"
    for record in [read_json(path)] if is_json else read_rows(path):
        yield BenchmarkExample(
            benchmark="math",
            task=record.get("type"),
            split=split_of(path) or "test",
            id=path.stem if is_json else "",
            question=record.get("problem"),
            answers=(record.get("solution"),),
            meta=record.without("type", "problem", "solution"),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="EleutherAI/hendrycks_math",
    patterns=("*/{split}-*.parquet",),
    homepage="https://github.com/hendrycks/math",
    split_of=split_of,
    read_file=read_file,
)
