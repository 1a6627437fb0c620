"""The three stages of a benchmark whose questions come from files; each reads files and writes files, and can
be run again alone.

    prepare   NAME.prompts.jsonl       {"id", "text", "start", "tokens"}: what is asked, and tokens to write at most
              NAME.answers.jsonl       {"id", ...}: what the scorer needs
    predict   NAME.journal.jsonl       answers as they come: a run that was stopped, however, asks for none of them again
              NAME.predictions.jsonl   {"id", "prediction", "prompt_tokens", "cut"}, once all are there; `refused` where an endpoint
                                       gave no answer: why. Those are asked again by the next run
    score     NAME.scores.jsonl        {"id", "score", "prediction", ...}; what is made of them goes to NAME.json

Each file's first line says what it was made from. A stage that finds its output made from the same, with
nothing refused, does nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Backend, Request, identity
from megatron_ultralong.evaluate.pipeline import predictions, stage_files
from megatron_ultralong.evaluate.prompts.truncate import Fitter, Prompt

STAGES = ("prepare", "predict", "score")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question."""

    id: str
    """Of its own in the benchmark."""
    task: str
    """Its set or task."""
    text: str
    """The whole prompt, without a chat template."""
    start: str = ""
    """What of its end begins the answer: in a chat it goes where the answer stands."""
    tokens: int
    """To write at most."""
    gold: dict[str, Any]
    """What its scorer needs, as JSON has it."""


def sources(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files: whether prompts were made from the same ones."""
    return [[path.name, (found := path.stat()).st_size, found.st_mtime_ns] for path in paths]


def prepare(
    out: Path,
    name: str,
    of: dict[str, Any],
    items: Iterable[Item],
    progress: Callable[[int], Any] = lambda n: None,
) -> int:
    """Write prompts and answers of `items`, and say how many they are; nothing is done where they are there
    already, made from the same.

    of: the settings and files they are made from. UserError where there are none, or two with one id.
    """
    of = json.loads(json.dumps({"benchmark": name, "format": stage_files.FORMAT, **of}))
    prompts, answers = out / f"{name}.prompts.jsonl", out / f"{name}.answers.jsonl"
    if (there := stage_files.head(answers)).get("of") == of == stage_files.head(prompts).get(
        "of"
    ) and "items" in there:
        progress(there["items"])
        return there["items"]
    golds: dict[str, dict[str, Any]] = {}
    tokens: dict[str, int] = {}
    with stage_files.writer(prompts, {"of": of}) as write:
        for item in items:
            if item.id in golds:
                raise UserError(f"--data: two files hold {item.id}; keep one of them")
            golds[item.id] = {"task": item.task, **item.gold}
            tokens[item.task] = max(item.tokens, tokens.get(item.task, 0))
            write(
                {"id": item.id, "text": _whole(item.text), "start": _whole(item.start), "tokens": item.tokens}
            )
            progress(1)
        if not golds:
            raise UserError("--data: the files hold no question of those asked for")
    with stage_files.writer(answers, {"of": of, "items": len(golds), "tokens": tokens}) as write:
        for id, gold in golds.items():
            write({"id": id, **gold})
    return len(golds)


def count(out: Path, name: str) -> int:
    """Questions that were prepared; UserError where none were."""
    return stage_files.made(out / f"{name}.answers.jsonl", "prepare", "items")["items"]


def _whole(text: str) -> str:
    """Half a surrogate pair is no sign, and no tokenizer takes it."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def predict(
    backend: Backend,
    out: Path,
    name: str,
    *,
    max_length: int | None = None,
    batch: int | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> None:
    """Ask `backend` all that was prepared.

    max_length: prompt and answer together, tokens; None = the positions of the model's config, where it says
    them. batch: prompts at a time. progress: called with the number of answers since the last call. UserError
    where nothing is prepared, where a limit leaves no room, or where --out holds answers of another model.
    """
    prepared, model = (
        stage_files.made(out / f"{name}.answers.jsonl", "prepare", "items", "tokens"),
        backend.describe(),
    )
    if stage_files.head(out / f"{name}.prompts.jsonl").get("of") != prepared["of"]:
        raise UserError(
            f"{out}: {name}.prompts.jsonl and {name}.answers.jsonl are not of one run; use --stage prepare again"
        )
    max_length = max_length if max_length is not None else backend.max_position
    if max_length is None:
        print(
            f"{name}: prompts are not cut, the model's positions are not known; what is too long for an endpoint it refuses (see --max-length)"
        )
    fitter = Fitter(backend.tokenizer, chat=backend.chat, max_length=max_length)
    for task, tokens in prepared["tokens"].items():
        fitter.check(task, tokens)
    head = json.loads(
        json.dumps(
            {
                "of": prepared["of"],
                "model": model,
                "identity": identity(backend),
                "settings": {"max_length": max_length, "chat": fitter.chat},
            }
        )
    )
    path, asked = out / f"{name}.predictions.jsonl", deque[Prompt]()
    rows: list[dict[str, Any]] = []
    there = stage_files.head(path)
    if all(there.get(of) == head[of] for of in ("of", "settings", "identity")) and there.get("refused") == {}:
        progress(prepared["items"])
        return

    def prompts() -> Iterator[Prompt]:
        for line in stage_files.read(
            out / f"{name}.prompts.jsonl", "prepare", "id", "text", "start", "tokens"
        ):
            asked.append(fitter.prompt(line["id"], line["text"], line["tokens"], line["start"]))
            yield asked[-1]

    requests = (Request(id=p.id, text=p.text, prefix=p.prefix, ids=p.ids, tokens=p.tokens) for p in prompts())
    for one in predictions.run(
        backend, requests, out / f"{name}.journal.jsonl", batch=batch, progress=progress
    ):
        prompt = asked.popleft()
        rows.append(
            {
                "id": prompt.id,
                "prediction": one.text,
                "prompt_tokens": len(prompt.ids),
                "cut": prompt.cut,
                **({} if one.answered else {"refused": one.finish}),
            }
        )
    # By the kind of reason: its text may tell the size of each prompt.
    refused = Counter(row["refused"].partition(":")[0] for row in rows if "refused" in row)
    with stage_files.writer(path, {**head, "refused": refused}) as write:
        for row in rows:
            write(row)


def score(
    out: Path, name: str, scorer: Callable[[dict[str, Any], str], float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the answers are of, and for each question what it is, its `prediction`, `cut` and `score`);
    written to NAME.scores.jsonl too.

    scorer: called with an answers line and a prediction. UserError where a stage before was not run, or was
    run on something else.
    """
    prepared = stage_files.made(out / f"{name}.answers.jsonl", "prepare")
    head = stage_files.made(out / f"{name}.predictions.jsonl", "predict", "model", "settings", "refused")
    if head["of"] != prepared["of"]:
        raise UserError(
            f"{out}: the answers there are not to the questions that were prepared last; use --stage predict again"
        )
    found = {
        line["id"]: line
        for line in stage_files.read(
            out / f"{name}.predictions.jsonl", "predict", "id", "prediction", "prompt_tokens", "cut"
        )
    }
    rows = []
    for gold in stage_files.read(out / f"{name}.answers.jsonl", "prepare", "id", "task"):
        if gold["id"] not in found:
            raise UserError(
                f"{out}: {name}.predictions.jsonl has no answer to {gold['id']}; remove it and use --stage predict again"
            )
        one = found[gold["id"]]
        rows.append({**gold, **one, "score": 0.0 if "refused" in one else scorer(gold, one["prediction"])})
    with stage_files.writer(out / f"{name}.scores.jsonl", head) as write:
        for row in rows:
            write(
                {
                    key: row[key]
                    for key in ("id", "score", "prediction", "prompt_tokens", "cut", "refused")
                    if key in row
                }
            )
    return head, rows


# ---- what results are made of ------------------------------------------------------------------


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of one set or task: questions, mean score in percent, prompts that were cut, prompts that
    an endpoint refused."""
    return {
        "questions": len(rows),
        "score": 100 * sum(row["score"] for row in rows) / len(rows),
        "cut": sum(row["cut"] > 0 for row in rows),
        "refused": sum("refused" in row for row in rows),
    }


def mark(cell: dict[str, Any]) -> str:
    """What stands beside a cell's score in a table: `notes` says what it means."""
    return "!" if cell["refused"] else "*" if cell["cut"] else " "


def average(scores: list[float], of: int) -> dict[str, Any]:
    """Mean of the scores there are, how many they are, and how many there would be."""
    return {"score": sum(scores) / len(scores) if scores else None, "cells": len(scores), "of": of}


def notes(result: dict[str, Any]) -> list[str]:
    """What stands below a table: averages, and what the scores are of."""
    found = []
    for label, one in result["averages"].items():
        part = f" over {one['cells']} of {one['of']}" if one["cells"] < one["of"] else ""
        found.append(f"average {label}: " + (f"{one['score']:.2f}" if one["cells"] else "-") + part)
    if result["refused"]:
        reasons = ", ".join(f"{reason} ({number})" for reason, number in result["refused"].items())
        found.append(
            f"! {sum(result['refused'].values())} prompts were refused by the endpoint and count as 0: {reasons}; "
            "the same command asks them again"
        )
    if any(cell["cut"] for cell in result["cells"]):
        found.append(
            f"* the middle of some prompts was cut, to {result['settings']['max_length']:,} tokens with the answer"
        )
    if result["of"]["limit"]:
        found.append(f"only the first {result['of']['limit']} questions each")
    return [*found, f"wording: {result['wording']}"]


# ---- what is asked for -------------------------------------------------------------------------


def names(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """A list on the command line, "a,b"; all of `known` where there is none."""
    return (
        tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        if text is not None
        else known
    )


def check_names(flag: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """UserError where a name is not known, or none is given."""
    if not given:
        raise UserError(f"{flag}: give at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise UserError(f"{flag} {name}: known are {', '.join(known)}")


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError("--limit must be at least 1")
