"""What the commands of all benchmarks share: options, lists on the command line, progress bars, the written
results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.report import results_format_1
from megatron_ultralong.io import atomic_files, progress


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark whose model generates answers."""
    options.add_model_arguments(parser)
    add_out_argument(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts and of sampling (default: %(default)s)"
    )


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the results")


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
        raise UserError("--samples must be at least 1")


def check_out(out: Path) -> None:
    """Create --output. UserError where it cannot be written; called before the work."""
    atomic_files.check_writable(out, f"--output {out}")


def progress_bar(description: str, total: int | None = None, unit: str = "prompt") -> Any:
    """A bar of prompts (io/progress.py)."""
    return progress.progress_bar(description, total, unit)


def write_results(
    result: BenchmarkResult,
    out: Path,
    table: str,
    written: str = "written",
    write_more: Callable[[], Any] = lambda: None,
) -> None:
    """Write OUT/TASK.json and print the table, and a line where that replaces results of another model, of
    other settings, tasks or lengths.

    written: the end of the last line, after the file's name. write_more: writes the other files that
    `written` names; called after the results are written, so that its failure loses none.
    """
    path = out / f"{result.task}.json"
    if changed := _replaced(path, result):
        print(f"{path} replaces results with other {changed}; give another --output to keep both")
    result.write(path)
    print(table)
    write_more()
    print(f"{path} {written}")


def _replaced(path: Path, result: BenchmarkResult) -> str:
    """What differs between `result` and the one of the same benchmark in `path`; "" = nothing."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        converted = isinstance(raw, dict) and raw.get("format") == 1
        before = results_format_1.convert(raw) if converted else BenchmarkResult.from_json(raw)
    except (OSError, ValueError):
        return ""
    if before.task != result.task:
        return ""
    after = BenchmarkResult.from_json(json.loads(json.dumps(result.to_json())))
    files = {name: before.model.get(name) for name in ("path", "fingerprint")}
    if converted:  # it does not always record both
        files = {name: value for name, value in files.items() if value is not None}
    cells = [{(score.task, score.length) for score in one.scores} for one in (before, after)]
    differs = {
        "model": any(after.model.get(name) != value for name, value in files.items()),
        "settings": not converted and before.settings != after.settings,  # format 1 has another form of them
        "tasks or lengths": cells[0] != cells[1],
    }
    return ", ".join(name for name in differs if differs[name])
