"""LV-Eval: SET_{16k,32k,64k,128k,256k}.jsonl, plain, .gz or in SET.zip, with input, context, answers, length,
dataset, language (and answer_keywords, confusing_facts).

The task is the set; the length is in meta as `level`. Scoring uses the first answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import (
    BenchmarkExample,
    OfficialFiles,
    OfficialRecord,
    jsonl_name,
    read_jsonl,
    read_zip,
)

SETS = (
    "hotpotwikiqa_mixup",
    "loogle_SD_mixup",
    "loogle_CR_mixup",
    "loogle_MIR_mixup",
    "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup",
    "factrecall_en",
    "factrecall_zh",
    "cmrc_mixup",
    "lic_mixup",
    "dureader_mixup",
)
LEVELS = ("16k", "32k", "64k", "128k", "256k")

_NAME = re.compile(rf"({'|'.join(SETS)})_({'|'.join(LEVELS)})")


def split_of(path: Path) -> str | None:
    """Return test for SET_LEVEL.jsonl, plain or .gz, and for SET.zip unless it is unpacked next to it; None
    for other files."""
    if path.suffix == ".zip":
        unpacked = [
            file
            for folder in (path.parent, path.with_suffix(""))
            for file in folder.glob(f"{path.stem}_*k.jsonl*")
            if jsonl_name(file)
        ]
        return "test" if path.stem in SETS and not unpacked else None
    return "test" if _NAME.fullmatch(jsonl_name(path) or "") else None


def read_file(path: Path) -> Iterator[BenchmarkExample]:
    if path.suffix == ".zip":
        for name, records in read_zip(path):
            yield from _read_set(PurePosixPath(name).stem, path, records)
    else:
        yield from _read_set(jsonl_name(path) or path.name, path, read_jsonl(path))


def _read_set(name: str, path: Path, records: Iterable[OfficialRecord]) -> Iterator[BenchmarkExample]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"{path}: {name}.jsonl is not one of LV-Eval's files, which are named like {SETS[0]}_{LEVELS[0]}.jsonl"
        )
    for number, record in enumerate(records):
        record.get("length", int)
        if record.data.get("answer_keywords") is not None:
            record.get("answer_keywords")
        yield BenchmarkExample(
            benchmark="lveval",
            task=match[1],
            split="test",
            id=f"{match[2]}/{number}",
            context=record.get("context"),
            question=record.get("input"),
            answers=record.texts("answers"),
            place=record.place,
            meta={"level": match[2], **record.without("input", "context", "answers")},
        )


FILES = OfficialFiles(
    repo="Infinigence/LVEval",
    patterns=tuple(f"{name}.zip" for name in SETS),
    homepage="https://github.com/infinigence/LVEval",
    split_of=split_of,
    read_file=read_file,
)
