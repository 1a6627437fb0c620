"""Passkey retrieval (needle in a haystack): does the model find one fact, at every length and depth?"""

from __future__ import annotations

import argparse
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.backends.protocol import Backend, GenerationRequest
from megatron_ultralong.evaluate.pipeline import command, refusals
from megatron_ultralong.evaluate.pipeline.kept_answers import answer_all
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore, short_count
from megatron_ultralong.evaluate.report import heat_map
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahPrompt, NiahPromptBuilder, NiahSettings
from megatron_ultralong.io.git_lfs import refuse_pointer
from megatron_ultralong.io.text_table import text_table

HELP = "passkey retrieval: a grid of lengths and depths"
DESCRIPTION = "Passkey retrieval: one fact hidden in a long text, at every length and depth."


def is_correct(prediction: str, value: str) -> bool:
    """Whether a number in the prediction is exactly `value`: no more and no fewer digits."""
    return value in re.findall(r"\d+", prediction)


def run(
    backend: Backend,
    settings: NiahSettings,
    *,
    haystack: Path | None = None,
    batch: int | None = None,
    answers: Path | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> BenchmarkResult:
    """Run all trials.

    batch: prompts per batch; None = as many as make 16K tokens. answers: the file that keeps the answers, so
    that a resumed run repeats no request. progress: called with the number of trials finished since the last
    call.
    """
    started = time.time()
    builder = NiahPromptBuilder(backend.tokenizer, settings, _read(haystack) if haystack else None)
    builder.prompt(min(settings.lengths), settings.depths[0], 0)  # reports a length that is too short
    backend.check(max(settings.lengths), batch or 1)
    asked: deque[NiahPrompt] = (
        deque()
    )  # only those of one batch: a prompt of 4M tokens takes tens of megabytes

    def requests() -> Iterator[GenerationRequest]:
        for length in settings.lengths:
            for depth in settings.depths:
                for trial in range(settings.trials):
                    asked.append(builder.prompt(length, depth, trial))
                    yield asked[-1].request()

    trials = []
    for one in answer_all(backend, requests(), answers, batch=batch, progress=progress):
        prompt = asked.popleft()
        found = sum(is_correct(one.text, value) for value in prompt.answers)
        trials.append(
            {
                "length": prompt.length,
                "depth": prompt.depth,
                "trial": prompt.trial,
                "name": prompt.name,
                "answer": prompt.answer,
                "prediction": one.text,
                "correct": found == settings.needles,
                "found": found,
                "needles": settings.needles,
                "prompt_tokens": len(prompt.tokens),
                "needle_at": prompt.needle_at,
                **({} if one.answered else {"refused": one.finish}),
            }
        )
    return BenchmarkResult(
        task="niah",
        model=backend.describe(),
        settings={
            **asdict(settings),
            "chat": builder.encoder.chat,
            "haystack": haystack.name if haystack else "own filler sentences",
            "prompt": "own wording",
            "grid": "own grid",
        },
        scores=tuple(
            TaskScore(
                task="passkey" if settings.needles == 1 else "passkeys",
                length=length,
                score=100 * accuracy(some),
                count=len(some),
                notes={"refused": _refused(some)},
            )
            for length, some in _groups(trials, "length").items()
        ),
        extra={
            "accuracy": accuracy(trials),
            "cells": cells(trials),
            "trials": trials,
            "seconds": round(time.time() - started, 1),
        },
    )


def cells(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of the grid, in the order of the trials.

    `correct` counts prompts with every needle found, `found` counts needles, `accuracy` is the fraction of
    needles found. `refused` counts prompts that an endpoint refused; their needles count as not found.
    """
    return [
        {
            "length": length,
            "depth": depth,
            "trials": len(some),
            "correct": sum(trial["correct"] for trial in some),
            "needles": sum(trial["needles"] for trial in some),
            "found": sum(trial["found"] for trial in some),
            "accuracy": accuracy(some),
            "refused": _refused(some),
        }
        for (length, depth), some in _groups(trials, "length", "depth").items()
    ]


def accuracy(trials: list[dict[str, Any]]) -> float:
    """Fraction of the needles found."""
    return round(sum(trial["found"] for trial in trials) / sum(trial["needles"] for trial in trials), 4)


def _groups(trials: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for trial in trials:
        key = tuple(trial[name] for name in keys)
        groups.setdefault(key if len(keys) > 1 else key[0], []).append(trial)
    return groups


def _refused(trials: list[dict[str, Any]]) -> int:
    return sum("refused" in trial for trial in trials)


def _read(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path}: cannot be read as text ({error})") from None


def table(result: BenchmarkResult) -> str:
    """Lengths across, depths down, accuracy in percent, as plain text; a `*` marks lengths beyond the model's
    positions."""
    grid = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in result.extra["cells"]}
    depths = sorted({depth for _, depth in grid})
    means = {score.length: (score.score or 0.0) / 100 for score in result.scores if score.length is not None}
    lengths = sorted(means)
    limit = result.model.get("max_position") or float("inf")
    names = [short_count(length) + ("*" if length > limit else "") for length in lengths]
    rows = [["depth", *names]]
    rows += [[f"{depth:g}%", *(f"{grid[length, depth]:.0%}" for length in lengths)] for depth in depths]
    lines = text_table([*rows, ["all", *(f"{means[length]:.0%}" for length in lengths)]])
    if any(name.endswith("*") for name in names):
        lines.append(f"* beyond the {limit:,} positions of the model's config")
    refused = [trial["refused"] for trial in result.extra["trials"] if "refused" in trial]
    if refused:
        lines.append(refusals.told(refusals.count_reasons(refused)))
    return "\n".join(lines)


# ---- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_common_arguments(parser)
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of prompt and answer together, like 512,4K,1M",
    )
    depths = parser.add_mutually_exclusive_group()
    depths.add_argument(
        "--depths",
        default="0,25,50,75,100",
        metavar="P,P,...",
        help="positions of the needle in percent of the text (default: %(default)s)",
    )
    depths.add_argument(
        "--depth-count",
        type=int,
        metavar="N",
        help="N depths in place of --depths, evenly spaced from 0 to 100",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10,
        metavar="N",
        help="prompts for each length and depth (default: %(default)s)",
    )
    parser.add_argument(
        "--digits", type=int, default=5, metavar="N", help="digits of a pass key (default: %(default)s)"
    )
    parser.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="text to hide the needle in (default: own filler sentences)",
    )
    parser.add_argument(
        "--answer-tokens",
        metavar="N",
        help="tokens to generate (default: the size of the answer; 24 in a chat)",
    )
    parser.add_argument(
        "--needles",
        type=int,
        default=1,
        metavar="N",
        help="pass keys in a prompt, all of them requested, spread evenly from the depth to the end; the score is the "
        "fraction found (default: 1)",
    )


def run_command(args: argparse.Namespace) -> None:
    settings = NiahSettings(
        lengths=command.parse_lengths(args.lengths),
        depths=parse_depths(args.depths, args.depth_count),
        trials=args.samples,
        digits=args.digits,
        needles=args.needles,
        chat=args.chat,
        seed=args.seed,
        answer_tokens=parse_count(args.answer_tokens, "--answer-tokens") if args.answer_tokens else None,
    )
    command.check_out(args.output)
    total = len(settings.lengths) * len(settings.depths) * settings.trials
    with options.open_backend(args) as backend, command.progress_bar("niah", total) as bar:
        result = run(
            backend,
            settings,
            haystack=args.haystack,
            batch=options.batch_size(args),
            answers=args.output / "niah.predictions.jsonl",
            progress=bar.update,
        )
    title = f"{result.model['path']}, {total} prompts"
    extra = result.extra
    command.write_results(
        result,
        args.output,
        table(result),
        f"and niah.png written; {extra['accuracy']:.1%} of {total * settings.needles} pass keys found, {extra['seconds']:.0f} s",
        lambda: heat_map.heat_maps(
            [result], [title], args.output / "niah.png", trained=[result.model["max_position"]]
        ),
    )


def parse_depths(text: str, count: int | None = None) -> tuple[float, ...]:
    """The depths of --depths, or the `count` evenly spaced ones of --depth-count, in percent."""
    if count is not None:
        if not 2 <= count <= 1000:
            raise UserError(f"--depth-count {count}: must be from 2 to 1000")
        return tuple(round(100 * i / (count - 1), 2) for i in range(count))
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--depths {text}: expected percents like 0,50,100") from None
