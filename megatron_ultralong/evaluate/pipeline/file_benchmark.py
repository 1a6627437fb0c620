"""Benchmarks with questions from official files (LV-Eval, InfiniteBench): their command, results and
tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.pipeline import command, refusals, stages
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore


@dataclass(frozen=True, kw_only=True)
class FileBenchmark:
    """What the command needs of a benchmark."""

    name: str
    find_files: Callable[[str], Any]
    """Called with --data: UserError where it does not contain the requested files."""
    prepare: Callable[[Path, str, Callable[[int], Any]], int]
    """Called with --output, --data and a progress callback: `stages.prepare` of its questions."""
    score: Callable[[Path], BenchmarkResult]
    """Called with --output after all questions were answered."""
    table: Callable[[BenchmarkResult], str]


def add_arguments(parser: argparse.ArgumentParser, title: str, file_names: str) -> None:
    command.add_common_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"{title}'s files ({file_names}), or hub = download them; required by the stage prepare",
    )
    parser.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help=f"a checkout of {title}'s repository: use its prompt templates (default: this project's own wording)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="only the first N questions of each (default: all)"
    )
    parser.add_argument(
        "--max-length",
        metavar="N",
        help="tokens of prompt and answer together; the middle of longer prompts is cut out (default: the positions of the "
        "model's config; those of an endpoint are not known, and nothing is cut)",
    )
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", *stages.STAGES),
        help="write the prompts, answer them, score the answers; each reads the files in --output that the previous stage wrote "
        "(default: all; finished stages are not repeated)",
    )


def run(args: argparse.Namespace, benchmark: FileBenchmark) -> None:
    """Run the requested stages."""
    max_length, name = command.parse_max_length(args.max_length), benchmark.name
    command.check_out(args.output)
    prepares = args.stage in ("all", "prepare")
    if prepares:
        if args.data is None:
            raise UserError(
                "--data DIR is needed; --stage predict or score resumes from the files in --output"
            )
        benchmark.find_files(args.data)  # a wrong folder is reported before a model is loaded
    # Under torchrun only rank 0 enters the block, and does everything but the model's work.
    with options.open_backend(args) if args.stage in ("all", "predict") else options.no_backend() as backend:
        if prepares:
            with command.progress_bar(f"{name}: prepare") as bar:
                benchmark.prepare(args.output, args.data, bar.update)
        if backend is not None:
            with command.progress_bar(f"{name}: predict", stages.count(args.output, name)) as bar:
                stages.predict(
                    backend,
                    args.output,
                    name,
                    max_length=max_length,
                    batch=options.batch_size(args),
                    progress=bar.update,
                )
    if args.stage in ("all", "score"):
        result = benchmark.score(args.output)
        command.write_results(result, args.output, benchmark.table(result))


# ---- results -----------------------------------------------------------------------------------


def task_score(task: str, scored: list[dict[str, Any]], length: int | None = None) -> TaskScore:
    """The mean score, in percent, of the scored questions of one task or set."""
    return TaskScore(
        task=task,
        length=length,
        score=100 * sum(line["score"] for line in scored) / len(scored),
        count=len(scored),
        notes={
            "cut": sum(line["cut"] > 0 for line in scored),
            "refused": sum("refused" in line for line in scored),
        },
    )


def average(scores: list[float], of: int) -> dict[str, Any]:
    """The mean of the available scores, their number, and the number of a complete benchmark."""
    return {"score": sum(scores) / len(scores) if scores else None, "cells": len(scores), "of": of}


def benchmark_result(
    name: str, header: dict[str, Any], scores: list[TaskScore], averages: dict[str, Any]
) -> BenchmarkResult:
    """Results from the header of the predictions (`stages.score`) and the scores made of them."""
    made_from = {key: value for key, value in header["of"].items() if key not in ("benchmark", "format")}
    return BenchmarkResult(
        task=name,
        model=header["model"],
        settings={**made_from, **header["settings"]},
        scores=tuple(scores),
        extra={"averages": averages, "refused": header["refused"]},
    )


def mark(score: TaskScore) -> str:
    """The mark next to a score in a printed table; `footnotes` explains it."""
    return "!" if score.notes.get("refused") else "*" if score.notes.get("cut") else " "


def footnotes(result: BenchmarkResult) -> list[str]:
    """Lines below a printed table: averages, marks, limit and wording."""
    lines = []
    for label, average in result.extra["averages"].items():
        part = f" over {average['cells']} of {average['of']}" if average["cells"] < average["of"] else ""
        value = f"{average['score']:.2f}" if average["cells"] else "-"
        lines.append(f"average {label}: {value}{part}")
    if refused := result.extra["refused"]:
        lines.append(f"! {refusals.told(refused)}")
    if any(score.notes.get("cut") for score in result.scores):
        lines.append(
            f"* the middle of some prompts was cut, to {result.settings['max_length']:,} tokens including the answer"
        )
    if result.settings["limit"]:
        lines.append(f"only the first {result.settings['limit']} questions each")
    return [*lines, f"wording: {result.settings['wording']}"]
