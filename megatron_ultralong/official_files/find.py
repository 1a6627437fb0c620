"""The benchmarks by name: finding their official files on disk or on the Hugging Face hub, and reading them.

    for example in read_examples("gsm8k", find_files("gsm8k", "hub")): ...

To add a benchmark, write a file like gsm8k.py that defines `FILES`, and list it in `BENCHMARKS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files import (
    gsm8k,
    humaneval,
    infinitebench,
    lveval,
    math,
    mmlu,
    mmlu_pro,
    ruler,
)
from megatron_ultralong.official_files.records import BenchmarkExample, OfficialFiles, jsonl_name, read_jsonl

BENCHMARKS = {
    "mmlu": mmlu.FILES,
    "mmlu_pro": mmlu_pro.FILES,
    "math": math.FILES,
    "gsm8k": gsm8k.FILES,
    "humaneval": humaneval.FILES,
    "ruler": ruler.FILES,
    "lveval": lveval.FILES,
    "infinitebench": infinitebench.FILES,
}


def find_files(
    benchmark: str, where: str | Path, splits: Sequence[str] = ("test",), names: Collection[str] | None = None
) -> list[Path]:
    """Return the benchmark's files, sorted.

    where: a directory, one file, or `hub` = downloaded from the hub or taken from its cache. splits: which
    files of a directory to take (test, dev, validation, train); a single file is taken regardless of its
    split. names: take, and download, only files of these names without their suffix; None = all. UserError if
    none exist, with what to download from where.
    """
    files = _files(benchmark)
    root = _download(benchmark, files, splits, names) if str(where) == "hub" else Path(where)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{benchmark}: {root}: no such file or directory; {_how_to_get(files)}")
    paths = sorted(
        path
        for path in root.rglob("*")
        if files.split_of(path) in splits
        and path.is_file()
        and not (path.suffix == ".gz" and path.with_suffix("").exists())
        and (names is None or (jsonl_name(path) or path.stem) in names)
    )
    if not paths:
        raise UserError(
            f"{benchmark}: {root} contains none of its files for {' or '.join(splits)}"
            f"{' among those requested' if names else ''}; {_how_to_get(files)}"
        )
    return paths


def read_examples(benchmark: str, paths: Iterable[Path]) -> Iterator[BenchmarkExample]:
    """Read the examples of those files, in order. UserError (file, line or row, field) for content that is
    not official."""
    numbers: Counter[tuple[str, str]] = Counter()  # examples of each task and split so far
    for example in chain.from_iterable(map(_files(benchmark).read_file, paths)):
        number = numbers[example.task, example.split]
        numbers[example.task, example.split] += 1
        yield example if example.id else replace(example, id=str(number))


def read_custom(path: Path) -> Iterator[BenchmarkExample]:
    """Read your own strings as a benchmark named text: a .jsonl file with `text` and an optional `id`."""
    for number, record in enumerate(read_jsonl(path)):
        yield BenchmarkExample(
            benchmark="text",
            task=path.name,
            split="test",
            id=str(record.data.get("id", number)),
            question=record.get("text"),
            place=record.place,
        )


def _files(benchmark: str) -> OfficialFiles:
    if benchmark not in BENCHMARKS:
        raise UserError(f"unknown benchmark {benchmark!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark]


def _how_to_get(files: OfficialFiles) -> str:
    if not files.repo:
        return f"generate them with {files.homepage} (scripts/data/prepare.py) and give that folder"
    return (
        f"download the data set {files.repo} from the Hugging Face hub, or the files of {files.homepage}, and give "
        "their folder"
    )


def _download(
    benchmark: str, files: OfficialFiles, splits: Sequence[str], names: Collection[str] | None
) -> Path:
    """Download the files of the splits and names into the hub's cache; return their folder."""
    if not files.repo:
        raise UserError(f"{benchmark}: not on the hub; {_how_to_get(files)}")
    import huggingface_hub

    patterns = sorted(
        {
            pattern.format(split=split)
            for pattern in files.patterns
            for split in splits
            if names is None or Path(pattern).stem in names
        }
    )
    try:
        return Path(
            huggingface_hub.snapshot_download(files.repo, repo_type="dataset", allow_patterns=patterns)
        )
    except Exception as error:  # offline, refused, absent: the hub's client raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{benchmark}: cannot be downloaded from the hub ({reason}); {_how_to_get(files)}"
        ) from None
