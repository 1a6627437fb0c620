"""What a search for contamination says in the end: counts of files, benchmarks and tasks, and some matches of
each benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

SAMPLES = 5
"""Matches of a benchmark, and broken lines, that the report shows; the lists beside it have all."""


def make(
    settings: Mapping[str, Any],
    sources: Mapping[str, list[str]],
    statistics: Mapping[str, Mapping[str, Any]],
    done: Iterable[Mapping[str, Any] | None],
    matches: Iterable[dict[str, Any]],
    broken: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    """The report. Matches come document by document; memory is one entry an example of a benchmark that was
    found."""
    files = [made for made in done if made is not None]
    totals: dict[str, int] = defaultdict(int)
    for made in files:
        for name, count in made["counts"].items():
            totals[name] += count
    benchmarks: dict[str, Any] = {}
    for name, counts in statistics.items():
        tasks = {task: _zero() | {"examples": examples} for task, examples in sorted(counts["tasks"].items())}
        benchmarks[name] = {
            **{key: value for key, value in counts.items() if key != "tasks"},
            **_zero(),
            "samples": [],
            "tasks": tasks,
        }
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    last: dict[tuple[str, ...], tuple[str, int]] = {}
    for match in matches:
        benchmark, task, place = match["benchmark"], match["task"], (match["file"], match["line"])
        if len(benchmarks[benchmark]["samples"]) < SAMPLES:
            benchmarks[benchmark]["samples"].append(match)
        for key, counts, example in (
            ((benchmark,), benchmarks[benchmark], f"{task}\0{match['example']}"),
            ((benchmark, task), benchmarks[benchmark]["tasks"][task], match["example"]),
        ):
            found[key].add(example)
            counts["matches"] += 1
            counts["documents"] += last.get(key) != place
            last[key] = place
            counts["found"] = len(found[key])
    return {
        "settings": dict(settings),
        "benchmark_files": dict(sources),
        "totals": dict(totals),
        "benchmarks": benchmarks,
        "broken": list(islice(broken, SAMPLES)),
        "files": [{**made, "counts": dict(made["counts"])} for made in files],
    }


def _zero() -> dict[str, int]:
    """found: examples of which something was found; matches; documents with a match."""
    return {"found": 0, "matches": 0, "documents": 0}


def table(report: Mapping[str, Any]) -> str:
    """For the terminal: a line for each benchmark, and for each of its tasks that was found, then what became
    of the documents."""
    rows: list[tuple[str, ...]] = [
        ("benchmark", "examples", "found", "matches", "documents", "too short", "template n-grams")
    ]
    for name, counts in report["benchmarks"].items():
        rows.append(
            (
                name,
                *(
                    str(counts[key])
                    for key in ("examples", "found", "matches", "documents", "too_short", "common")
                ),
            )
        )
        for task, of_task in counts["tasks"].items():
            if of_task["matches"] and len(counts["tasks"]) > 1:
                rows.append(
                    (
                        f"  {task}",
                        *(str(of_task[key]) for key in ("examples", "found", "matches", "documents")),
                        "",
                        "",
                    )
                )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]
    totals = report["totals"]
    lines.append(
        f"{totals.get('documents', 0)} documents, {totals.get('contaminated', 0)} contaminated: {totals.get('dropped', 0)} left out, "
        f"{totals.get('cut', 0)} cut; {totals.get('words_removed', 0)} of {totals.get('words', 0)} words removed"
    )
    if totals.get("broken"):
        more = f" and {totals['broken'] - 1} more" if totals["broken"] > 1 else ""
        first = report["broken"][0]
        lines.append(
            f"{totals['broken']} lines could not be read and are not in the output: {first['file']}, line {first['line']}{more}; "
            "broken.jsonl lists them"
        )
    return "\n".join(lines)
