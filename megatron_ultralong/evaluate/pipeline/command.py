"""What the commands of all benchmarks share: options, lists on the command line, progress bars, the written
results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.config import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.io import atomic_files


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark whose model generates answers."""
    options.add_model_arguments(parser)
    add_out_argument(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts and of sampling (default: %(default)s)"
    )


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the results")


def parse_names(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Parse a list "a,b"; None = all of `known`."""
    if text is None:
        return known
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse --lengths: numbers of tokens like 512,4K,1M."""
    return tuple(parse_count(part.strip(), "--lengths") for part in text.split(","))


def parse_max_length(text: str | None) -> int | None:
    return parse_count(text, "--max-length") if text else None


def check_names(flag: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """UserError where a name is unknown, or none is given."""
    if not names:
        raise UserError(f"{flag}: give at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: unknown; choose from {', '.join(known)}")


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError("--limit must be at least 1")


def check_out(out: Path) -> None:
    """Create --out. UserError where it cannot be written; called before the work."""
    atomic_files.check_writable(out, f"--out {out}")


def progress_bar(description: str, total: int | None = None, unit: str = "prompt") -> Any:
    """A tqdm bar, hidden where the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=None)


def write_results(result: BenchmarkResult, out: Path, table: str, written: str = "written") -> None:
    """Write OUT/TASK.json and print the table. written: the end of the last line, after the file's name."""
    path = out / f"{result.task}.json"
    result.write(path)
    print(table)
    print(f"{path} {written}")
