"""The benchmarks by name: where their official files come from, finding them on disk or on the hub, and
reading them.

for example in files.read("gsm8k", files.find("gsm8k", "hub")): ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files import infinitebench, lveval, ruler, standard
from megatron_ultralong.official_files.records import Example, read_jsonl


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a benchmark's files come from."""

    repo: str
    """Data set on the Hugging Face hub; empty where the files are made by a program."""
    patterns: tuple[str, ...]
    """Files to download; {split} stands for the split."""
    official: str
    """The authors' own place."""
    split_of: Callable[[str, Path], str | None]
    read: Callable[[str, Iterable[Path]], Iterator[Example]]


def _standard(repo: str, pattern: str, official: str) -> Source:
    return Source(
        repo=repo, patterns=(pattern,), official=official, split_of=standard.split_of, read=standard.read
    )


BENCHMARKS = {
    "mmlu": _standard("cais/mmlu", "all/{split}-*.parquet", "https://github.com/hendrycks/test"),
    "mmlu_pro": _standard(
        "TIGER-Lab/MMLU-Pro", "data/{split}-*.parquet", "https://github.com/TIGER-AI-Lab/MMLU-Pro"
    ),
    "math": _standard(
        "EleutherAI/hendrycks_math", "*/{split}-*.parquet", "https://github.com/hendrycks/math"
    ),
    "gsm8k": _standard(
        "openai/gsm8k", "main/{split}-*.parquet", "https://github.com/openai/grade-school-math"
    ),
    "humaneval": _standard(
        "openai/openai_humaneval",
        "openai_humaneval/{split}-*.parquet",
        "https://github.com/openai/human-eval",
    ),
    "ruler": Source(
        repo="",
        patterns=(),
        official="https://github.com/NVIDIA/RULER",
        split_of=ruler.split_of,
        read=ruler.read,
    ),
    "lveval": Source(
        repo="Infinigence/LVEval",
        patterns=tuple(f"{name}.zip" for name in lveval.SETS),
        official="https://github.com/infinigence/LVEval",
        split_of=lveval.split_of,
        read=lveval.read,
    ),
    "infinitebench": Source(
        repo="xinrongzhang2022/InfiniteBench",
        patterns=tuple(f"{name}.jsonl" for name in infinitebench.TASKS),
        official="https://github.com/OpenBMB/InfiniteBench",
        split_of=infinitebench.split_of,
        read=infinitebench.read,
    ),
}


def find(
    benchmark: str, where: str | Path, splits: Sequence[str] = ("test",), names: Collection[str] | None = None
) -> list[Path]:
    """The benchmark's files, sorted: in a directory, or one file, or `hub` = downloaded from (or found in the
    cache of) the hub.

    splits: of a directory's files, those to take (test, dev, validation, train); a file that is named is
    taken whatever it holds. names: only files that are called so, their endings aside; the hub is asked for
    no others. None = all. UserError where there are none, with what to download from where.
    """
    source = _source(benchmark)
    root = _download(benchmark, source, splits, names) if str(where) == "hub" else Path(where)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{benchmark}: {root}: no such file or directory; {_by_hand(source)}")
    found = sorted(
        path
        for path in root.rglob("*")
        if source.split_of(benchmark, path) in splits
        and path.is_file()
        and (names is None or path.stem in names)
    )
    if not found:
        raise UserError(
            f"{benchmark}: {root} holds none of its files for {' or '.join(splits)}{' that are asked for' if names else ''}; "
            f"{_by_hand(source)}"
        )
    return found


def read(benchmark: str, paths: Iterable[Path]) -> Iterator[Example]:
    """The examples of those files, one after another, in order. UserError (file, line or row, field) for what
    is not official."""
    return _source(benchmark).read(benchmark, paths)


def read_own(path: Path) -> Iterator[Example]:
    """Own strings as a benchmark called text: a .jsonl file with `text`, and `id` where wanted."""
    for number, record in enumerate(read_jsonl(path)):
        yield Example(
            benchmark="text",
            task=path.name,
            split="test",
            id=str(record.data.get("id", number)),
            question=record.get("text"),
            place=record.place,
        )


def _source(benchmark: str) -> Source:
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark]


def _by_hand(source: Source) -> str:
    if not source.repo:
        return f"write them with {source.official} (scripts/data/prepare.py) and give that folder"
    return f"download the data set {source.repo} from the Hugging Face hub, or the files of {source.official}, and give their folder"


def _download(benchmark: str, source: Source, splits: Sequence[str], names: Collection[str] | None) -> Path:
    """The hub's files of the splits and names, in its cache."""
    if not source.repo:
        raise UserError(f"{benchmark}: not on the hub; {_by_hand(source)}")
    import huggingface_hub

    patterns = sorted(
        {
            pattern.format(split=split)
            for pattern in source.patterns
            for split in splits
            if names is None or Path(pattern).stem in names
        }
    )
    try:
        return Path(
            huggingface_hub.snapshot_download(source.repo, repo_type="dataset", allow_patterns=patterns)
        )
    except Exception as error:  # offline, refused, absent: the hub's client raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{benchmark}: the hub gave no files ({reason}); {_by_hand(source)}") from None
