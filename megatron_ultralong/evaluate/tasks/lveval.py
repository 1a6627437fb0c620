"""LV-Eval (infinigence/LVEval): questions about long mixed passages, 11 sets at 5 lengths, 16k to 256k words.

Everything but the wording follows that repository: length of the answers (config.py), cutting of the middle
(utils.py), scorers (metrics.py). Its wording is read from a checkout (--official); this project's own wording
asks the same, in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import command, file_benchmark, stages
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from megatron_ultralong.evaluate.prompts import official
from megatron_ultralong.evaluate.scorers.lveval import score
from megatron_ultralong.io.text_table import text_table
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files.lveval import LEVELS, SETS

HELP = "LV-Eval: questions about long mixed passages, 16k to 256k words"
DESCRIPTION = "LV-Eval, from its official files: 11 sets, 5 lengths, F1 that requires the answer's keywords."
LENGTHS = {level: parse_count(level, "level") for level in LEVELS}
"""Words or characters of each level: 16k = 16384."""
AVERAGES = {"<128K": LEVELS[:4], "<256K": LEVELS}
"""The UltraLong paper's averages (arXiv 2504.06214) and their levels. All sets and levels have the same
weight."""

_ONE = (
    "Below are passages. A single one of them is about the question that follows. {alone}\n\nPassages: {{context}}\n\n"
    "Answer from the passages above; a single one of them is about the question. {alone}\n\nQuestion: {{input}}\nAnswer:"
).format(alone="Reply with the answer and nothing else: no reasons, no quotations.")
_ONE_ZH = (
    "以下是若干篇文章，其中只有一篇与后面的问题有关。{alone}\n\n文章：{{context}}\n\n"
    "请根据以上文章作答，其中只有一篇与问题有关。{alone}\n\n问题：{{input}}\n回答："
)
OWN = {
    "hotpotwikiqa_mixup": _ONE.replace("A single one of them is", "Some of them are").replace(
        "a single one of them is", "some of them are"
    ),
    **dict.fromkeys(
        ("loogle_SD_mixup", "loogle_CR_mixup", "loogle_MIR_mixup", "multifieldqa_en_mixup"), _ONE
    ),
    "multifieldqa_zh_mixup": _ONE_ZH.format(alone="请用中文只写出答案，不要写理由和出处。"),
    "factrecall_en": "Below is an article, then a question about it.\n\nArticle: {context}\n\nAnswer the question "
    "from the article above.\n\n"
    "Question: {input}\nAnswer:",
    "factrecall_zh": "以下是一篇文章，后面有一个关于它的问题。\n\n文章：{context}\n\n请根据以上文章作答。\n\n"
    "问题：{input}\n回答：",
    **dict.fromkeys(("cmrc_mixup", "lic_mixup", "dureader_mixup"), _ONE_ZH.format(alone="")),
}


@dataclass(frozen=True, kw_only=True)
class LVEvalSettings:
    """Which questions are asked, and how."""

    sets: tuple[str, ...] = SETS
    levels: tuple[str, ...] = LEVELS
    limit: int | None = None
    """Only the first questions of each set and level; None = all."""
    official: Path | None = None
    """A checkout of infinigence/LVEval, for its wording; None = own wording."""

    def __post_init__(self) -> None:
        command.check_names("--sets", self.sets, SETS)
        command.check_names("--lengths", self.levels, LEVELS)
        command.check_limit(self.limit)


def answer_tokens(name: str) -> int:
    """Maximum tokens of the answers of a set."""
    return 16 if name.startswith("factrecall") else 64


def find_files(data: str | Path, settings: LVEvalSettings) -> list[Path]:
    """The official files in `data`, or on the hub, that contain the requested sets; UserError where none
    exists."""
    names = [f"{name}_{level}" for name in settings.sets for level in settings.levels]
    return official_files.find_files("lveval", data, names=[*settings.sets, *names])


def prepare(out: Path, data: str | Path, settings: LVEvalSettings, progress: Any = lambda n: None) -> int:
    """Write the prompts (stages.py) of the official files in `data`, or on the hub; returns the number of
    questions. UserError where a requested set or level is missing."""
    paths, templates = find_files(data, settings), OWN
    if settings.official is not None:
        fields = {name: {"context", "input"} for name in SETS}
        templates = official.read(settings.official / "config.py", "DATASET_PROMPT", fields)
    made_from = {
        "wording": "own" if settings.official is None else "official",
        "sets": settings.sets,
        "lengths": settings.levels,
        "limit": settings.limit,
        "templates_sha256": hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest(),
        "files": stages.file_versions(paths),
    }
    return stages.prepare(out, "lveval", made_from, _questions(paths, settings, templates), progress)


def _questions(
    paths: Iterable[Path], settings: LVEvalSettings, templates: dict[str, str]
) -> Iterator[stages.BenchmarkQuestion]:
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for example in official_files.read_examples("lveval", paths):
        name, level = example.task, example.meta["level"]
        if name not in settings.sets or level not in settings.levels or taken[name, level] == settings.limit:
            continue
        taken[name, level] += 1
        yield stages.BenchmarkQuestion(
            id=f"{name}/{example.id}",
            task=name,
            max_tokens=answer_tokens(name),
            text=official.fill(templates[name], {"context": example.context, "input": example.question}),
            gold={
                "level": level,
                "answers": list(example.answers),
                "keywords": example.meta.get("answer_keywords"),
            },
        )
    missing = [
        f"{name}_{level}" for name in settings.sets for level in settings.levels if not taken[name, level]
    ]
    # By default all sets and levels are requested: then those in --data suffice, and the averages say how
    # many they are.
    if missing and (settings.sets, settings.levels) != (SETS, LEVELS):
        raise UserError(
            f"--data contains no {', '.join(missing)}; download it, or leave it out with --sets and --lengths"
        )


def results(out: Path) -> BenchmarkResult:
    """Score the predictions in `out`."""
    header, scored = stages.score(
        out, "lveval", lambda gold, text: score(gold["task"], text, gold["answers"], gold["keywords"])
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in scored:
        groups[line["task"], line["level"]].append(line)
    scores = [
        file_benchmark.task_score(name, groups[name, level], LENGTHS[level])
        for name in SETS
        for level in LEVELS
        if (name, level) in groups
    ]
    return file_benchmark.benchmark_result("lveval", header, scores, averages(scores))


def averages(scores: Iterable[TaskScore]) -> dict[str, Any]:
    """The means over the levels up to each of `AVERAGES`: {label: {"score", "cells", "of"}}."""
    return {label: average(scores, *levels) for label, levels in AVERAGES.items()}


def average(scores: Iterable[TaskScore], *levels: str) -> dict[str, Any]:
    """The mean over all sets at `levels`."""
    lengths = [LENGTHS[level] for level in levels]
    values = [one.score for one in scores if one.length in lengths and one.score is not None]
    return file_benchmark.average(values, len(SETS) * len(levels))


def table(result: BenchmarkResult) -> str:
    """Levels across, sets down, as plain text."""
    cells = {(one.task, one.length): one for one in result.scores}
    levels = [level for level in LEVELS if any(length == LENGTHS[level] for _, length in cells)]
    rows = [["set", *(f"{level} " for level in levels)]]
    for name in dict.fromkeys(task for task, _ in cells):
        rows.append([name, *(_cell(cells.get((name, LENGTHS[level]))) for level in levels)])
    rows.append(["mean", *(f"{average(result.scores, level)['score']:.2f} " for level in levels)])
    return "\n".join([*text_table(rows), *file_benchmark.footnotes(result)])


def _cell(one: TaskScore | None) -> str:
    return f"{one.score:.2f}{file_benchmark.mark(one)}" if one else "- "


# ---- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    file_benchmark.add_arguments(parser, "LV-Eval", "SET_LENGTH.jsonl, plain or .gz, or SET.zip")
    parser.add_argument(
        "--sets", metavar="SET,SET,...", help=f"any of {', '.join(SETS)} (default: those in --data)"
    )
    parser.add_argument(
        "--lengths", metavar="N,N,...", help=f"any of {', '.join(LEVELS)} (default: those in --data)"
    )


def run_command(args: argparse.Namespace) -> None:
    settings = LVEvalSettings(
        sets=command.parse_names(args.sets, SETS),
        levels=command.parse_names(args.lengths and args.lengths.lower(), LEVELS),
        limit=args.samples,
        official=args.official,
    )
    benchmark = file_benchmark.FileBenchmark(
        name="lveval",
        find_files=lambda data: find_files(data, settings),
        prepare=lambda out, data, progress: prepare(out, data, settings, progress),
        score=results,
        table=table,
    )
    file_benchmark.run(args, benchmark)
