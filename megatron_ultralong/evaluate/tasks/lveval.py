"""LV-Eval: questions about long mixed passages, 11 sets at 5 lengths (16k to 256k words), infinigence/LVEval.

Everything but the wording follows that repository: tokens to write (config.py), cutting of the middle
(utils.py), scorers (flops.py). Its wording is read from a checkout (`official`); ours asks the same in the
same order.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import stage_files, stages
from megatron_ultralong.evaluate.prompts import official
from megatron_ultralong.evaluate.scorers.lveval import score
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files.lveval import LEVELS, SETS

AVERAGES = {"<128K": LEVELS[:4], "<256K": LEVELS}
"""As the UltraLong paper names them (arXiv 2504.06214): the lengths up to it. All sets and lengths weigh the
same."""

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
    "factrecall_en": "Below is an article, then a question about it.\n\nArticle: {context}\n\nAnswer the question from the article above.\n\n"
    "Question: {input}\nAnswer:",
    "factrecall_zh": "以下是一篇文章，后面有一个关于它的问题。\n\n文章：{context}\n\n请根据以上文章作答。\n\n问题：{input}\n回答：",
    **dict.fromkeys(("cmrc_mixup", "lic_mixup", "dureader_mixup"), _ONE_ZH.format(alone="")),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is asked."""

    sets: tuple[str, ...] = SETS
    levels: tuple[str, ...] = LEVELS
    limit: int | None = None
    """The first so many questions of each set and length; None = all."""
    official: Path | None = None
    """A checkout of infinigence/LVEval, for its wording; None = our own."""

    def __post_init__(self) -> None:
        stages.check_names("--sets", self.sets, SETS)
        stages.check_names("--lengths", self.levels, LEVELS)
        stages.check_limit(self.limit)


def answer_tokens(name: str) -> int:
    """Tokens that a set's answers may have."""
    return 16 if name.startswith("factrecall") else 64


def find_files(data: str | Path, choice: Choice) -> list[Path]:
    """The official files in `data`, or of the hub, that hold what is asked for; UserError where there are
    none."""
    return official_files.find_files(
        "lveval",
        data,
        names=[*choice.sets, *(f"{name}_{level}" for name in choice.sets for level in choice.levels)],
    )


def prepare(out: Path, data: str | Path, choice: Choice, progress: Any = lambda n: None) -> int:
    """The first stage (stages.py) of the official files in `data`, or on the hub; returns the number of
    questions. UserError where a set or length that was asked for is not among them."""
    paths, templates = find_files(data, choice), OWN
    if choice.official is not None:
        templates = official.read(
            choice.official / "config.py", "DATASET_PROMPT", {name: {"context", "input"} for name in SETS}
        )
    of = {
        "wording": "own" if choice.official is None else "official",
        "sets": choice.sets,
        "lengths": choice.levels,
        "limit": choice.limit,
        "templates_sha256": hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest(),
        "files": stages.sources(paths),
    }
    return stages.prepare(out, "lveval", of, _items(paths, choice, templates), progress)


def _items(paths: Iterable[Path], choice: Choice, templates: dict[str, str]) -> Iterator[stages.Item]:
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for example in official_files.read_examples("lveval", paths):
        name, level = example.task, example.meta["level"]
        if name not in choice.sets or level not in choice.levels or taken[name, level] == choice.limit:
            continue
        taken[name, level] += 1
        yield stages.Item(
            id=f"{name}/{example.id}",
            task=name,
            tokens=answer_tokens(name),
            text=official.fill(templates[name], {"context": example.context, "input": example.question}),
            gold={
                "level": level,
                "answers": list(example.answers),
                "keywords": example.meta.get("answer_keywords"),
            },
        )
    missing = [f"{name}_{level}" for name in choice.sets for level in choice.levels if not taken[name, level]]
    # All sets at all lengths is what is asked where nothing is: then whatever there is will do, and the
    # averages say how much it was.
    if missing and (choice.sets, choice.levels) != (SETS, LEVELS):
        raise UserError(
            f"--data holds no {', '.join(missing)}; download it, or leave it out with --sets and --lengths"
        )


def results(out: Path) -> dict[str, Any]:
    """The last stage: the results JSON's values. Scores are percent."""
    head, rows = stages.score(
        out, "lveval", lambda gold, text: score(gold["task"], text, gold["answers"], gold["keywords"])
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["level"]].append(row)
    cells = [
        {"set": name, "length": level, **stages.mean(group)}
        for (name, level), group in sorted(groups.items(), key=_order)
    ]
    averages = {
        label: stages.average(
            [cell["score"] for cell in cells if cell["length"] in levels], len(SETS) * len(levels)
        )
        for label, levels in AVERAGES.items()
    }
    by_length = {
        level: stages.average([cell["score"] for cell in cells if cell["length"] == level], len(SETS))
        for level in LEVELS
    }
    return {
        "format": stage_files.FORMAT,
        "task": "lveval",
        "wording": head["of"]["wording"],
        **head,
        "averages": averages,
        "by_length": by_length,
        "cells": cells,
    }


def _order(item: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    (name, level), _ = item
    return SETS.index(name), LEVELS.index(level)


def table(result: dict[str, Any]) -> str:
    """Lengths across, sets down, as plain text, with `staged.mark`s."""
    cells = {(cell["set"], cell["length"]): cell for cell in result["cells"]}
    names, levels = (
        [name for name in SETS if any(key[0] == name for key in cells)],
        [x for x in LEVELS if any(key[1] == x for key in cells)],
    )
    rows = [f"{'':24}" + "".join(level.rjust(9) for level in levels)]
    for name in names:
        rows.append(f"{name:24}" + "".join(_cell(cells.get((name, level))) for level in levels))
    rows.append(f"{'mean':24}" + "".join(f"{result['by_length'][level]['score']:8.2f} " for level in levels))
    return "\n".join([*rows, *stages.notes(result)])


def _cell(cell: dict[str, Any] | None) -> str:
    return f"{cell['score']:8.2f}" + stages.mark(cell) if cell else "-".rjust(8) + " "
