"""The report of a search for contamination: counts of files, benchmarks and tasks, and some matches of each
benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ultralong.io.text_table import text_table

SAMPLES = 5
"""Matches of a benchmark, and broken lines, that the report shows; matches.jsonl and broken.jsonl list
all."""


def build_report(
    settings: Mapping[str, Any],
    benchmark_files: Mapping[str, Sequence[Path]],
    statistics: Mapping[str, Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    matches: Iterable[dict[str, Any]],
    broken: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    """Build the report. statistics: of the index. files: what was recorded of each input file. matches:
    document by document. Memory: one entry per example of a benchmark with a match."""
    totals: dict[str, int] = defaultdict(int)
    for file in files:
        for name, count in file["counts"].items():
            totals[name] += count
    benchmarks: dict[str, Any] = {}
    for name, counts in statistics.items():
        tasks = {
            task: _no_matches() | {"examples": examples} for task, examples in sorted(counts["tasks"].items())
        }
        benchmarks[name] = {
            **{key: value for key, value in counts.items() if key != "tasks"},
            **_no_matches(),
            "samples": [],
            "tasks": tasks,
        }
    examples_with_match: dict[tuple[str, ...], set[str]] = defaultdict(set)
    last_place: dict[tuple[str, ...], tuple[str, int]] = {}
    for match in matches:
        benchmark, task, place = match["benchmark"], match["task"], (match["file"], match["line"])
        if len(benchmarks[benchmark]["samples"]) < SAMPLES:
            benchmarks[benchmark]["samples"].append(match)
        for key, counts, example in (
            ((benchmark,), benchmarks[benchmark], f"{task}\0{match['example']}"),
            ((benchmark, task), benchmarks[benchmark]["tasks"][task], match["example"]),
        ):
            examples_with_match[key].add(example)
            counts["matches"] += 1
            counts["documents"] += last_place.get(key) != place
            last_place[key] = place
            counts["found"] = len(examples_with_match[key])
    return {
        "settings": dict(settings),
        "benchmark_files": {name: list(map(str, paths)) for name, paths in benchmark_files.items()},
        "totals": dict(totals),
        "benchmarks": benchmarks,
        "broken": list(islice(broken, SAMPLES)),
        "files": list(files),
    }


def _no_matches() -> dict[str, int]:
    """found: examples with a match; matches; documents with a match."""
    return {"found": 0, "matches": 0, "documents": 0}


def format_table(report: Mapping[str, Any]) -> str:
    """Format a table for the terminal: one line per benchmark and per task with matches, then what happened
    to the documents."""
    columns = ("examples", "found", "matches", "documents", "too_short", "common")
    rows: list[tuple[str, ...]] = [
        ("benchmark", "examples", "found", "matches", "documents", "too short", "template n-grams")
    ]
    for name, counts in report["benchmarks"].items():
        rows.append((name, *(str(counts[column]) for column in columns)))
        for task, of_task in counts["tasks"].items():
            if of_task["matches"] and len(counts["tasks"]) > 1:
                rows.append((f"  {task}", *(str(of_task.get(column, "")) for column in columns)))
    lines = text_table(rows)
    totals = defaultdict(int, report["totals"])
    lines.append(
        f"{totals['documents']} documents, {totals['contaminated']} contaminated: {totals['dropped']} dropped, "
        f"{totals['cut']} cut; {totals['words_removed']} of {totals['words']} words removed"
    )
    if totals["broken"]:
        more = f" and {totals['broken'] - 1} more" if totals["broken"] > 1 else ""
        first = report["broken"][0]
        lines.append(
            f"{totals['broken']} lines could not be read and are not in the output: {first['file']}, line {first['line']}{more}; "
            "see broken.jsonl"
        )
    return "\n".join(lines)
