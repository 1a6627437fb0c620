"""MMLU: {test,dev,val}/SUBJECT_{test,dev,val}.csv of hendrycks/test, without a header; or
all/{test,dev,validation}-*.parquet of cais/mmlu. The answer is the letter of the choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_ultralong.official_files.records import (
    BenchmarkExample,
    OfficialFiles,
    hub_split,
    read_csv,
    read_rows,
)

_COLUMNS = ("question", "A", "B", "C", "D", "answer")


def split_of(path: Path) -> str | None:
    if path.parent.name != "all" and (path.parent.parent / "all").is_dir():
        return None  # a single subject of cais/mmlu, which `all` contains too
    csv = re.fullmatch(r".+_(test|dev|val)\.csv", path.name)
    return csv[1].replace("val", "validation") if csv else hub_split(path)


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    is_csv = path.suffix == ".csv"
    for record in read_csv(path, _COLUMNS) if is_csv else read_rows(path):
        choices = tuple(map(record.get, "ABCD")) if is_csv else record.texts("choices")
        yield BenchmarkExample(
            benchmark="mmlu",
            task=re.sub(r"_(test|dev|val)$", "", path.stem) if is_csv else record.get("subject"),
            split=split_of(path) or "test",
            question=record.get("question"),
            answers=(record.choice_letter("answer", len(choices)),),
            choices=choices,
            meta=record.without("subject", "choices", *_COLUMNS),
            place=record.place,
        )


FILES = OfficialFiles(
    repo="cais/mmlu",
    patterns=("all/{split}-*.parquet",),
    homepage="https://github.com/hendrycks/test",
    split_of=split_of,
    read_file=read_file,
)
