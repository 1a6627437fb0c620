"""The three stages of a benchmark with questions from official files. Each reads and writes files and can run
alone.

    prepare   NAME.prompts.jsonl      {"id", "text", "start", "tokens"}: prompts, length of the answers
              NAME.answers.jsonl      {"id", ...}: what the scorer needs
    predict   NAME.journal.jsonl      answers as they arrive: a resumed run repeats no request
              NAME.predictions.jsonl  {"id", "prediction", "prompt_tokens", "cut"}, once all are available;
                                      `refused`: why an endpoint refused it. The next run requests it again
    score     NAME.scores.jsonl       {"id", "score", "prediction", ...}; the results go to NAME.json

The header of each file records what it was made from. A stage does nothing if its output was made from the
same inputs and no prompt was refused.
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
from megatron_ultralong.evaluate.backends.protocol import Backend, GenerationRequest, identity
from megatron_ultralong.evaluate.pipeline import refusals, stage_files
from megatron_ultralong.evaluate.pipeline.kept_answers import answer_all
from megatron_ultralong.evaluate.prompts.truncate import PromptTruncator, TruncatedPrompt
from megatron_ultralong.io import jsonl

STAGES = ("prepare", "predict", "score")


@dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion:
    """One question of a benchmark."""

    id: str
    """Unique in the benchmark."""
    task: str
    """Its set or task."""
    text: str
    """The complete prompt, without a chat template."""
    start: str = ""
    """The end of `text` that begins the answer: in a chat it goes to the assistant's turn."""
    max_tokens: int
    """Maximum length of the answer."""
    gold: dict[str, Any]
    """What its scorer needs, as JSON values."""


def file_versions(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files: whether prompts were made from the same ones."""
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def prepare(
    out: Path,
    name: str,
    made_from: dict[str, Any],
    questions: Iterable[BenchmarkQuestion],
    progress: Callable[[int], Any] = lambda n: None,
) -> int:
    """Write the prompts and gold answers of `questions` and return their number; do nothing where they exist
    already and were made from the same inputs.

    made_from: the settings and files they are made from. UserError where there are no questions, or two with
    one id.
    """
    made_from = json.loads(json.dumps({"benchmark": name, "format": stage_files.FORMAT, **made_from}))
    prompts, answers = out / f"{name}.prompts.jsonl", out / f"{name}.answers.jsonl"
    existing = stage_files.read_header(answers)
    if existing.get("of") == made_from == stage_files.read_header(prompts).get("of") and "items" in existing:
        progress(existing["items"])
        return existing["items"]
    golds: dict[str, dict[str, Any]] = {}
    max_tokens: dict[str, int] = {}
    with jsonl.complete_file(prompts, {"of": made_from}) as write:
        for question in questions:
            if question.id in golds:
                raise UserError(f"--data: two files contain {question.id}; keep one of them")
            golds[question.id] = {"task": question.task, **question.gold}
            max_tokens[question.task] = max(question.max_tokens, max_tokens.get(question.task, 0))
            text, start = (_without_surrogates(part) for part in (question.text, question.start))
            write({"id": question.id, "text": text, "start": start, "tokens": question.max_tokens})
            progress(1)
        if not golds:
            raise UserError("--data: the files contain none of the requested questions")
    header = {"of": made_from, "items": len(golds), "tokens": max_tokens}
    with jsonl.complete_file(answers, header) as write:
        for id, gold in golds.items():
            write({"id": id, **gold})
    return len(golds)


def count(out: Path, name: str) -> int:
    """Number of prepared questions; UserError where none were prepared."""
    return stage_files.require_header(out / f"{name}.answers.jsonl", "prepare", "items")["items"]


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which no tokenizer accepts."""
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
    """Answer all prepared questions with `backend`.

    max_length: tokens of prompt and answer together; None = the positions of the model's config, where known.
    batch: prompts per batch. progress: called with the number of answers since the last call. UserError where
    nothing is prepared, where a limit leaves no room, or where --output contains answers of another model.
    """
    prepared = stage_files.require_header(out / f"{name}.answers.jsonl", "prepare", "items", "tokens")
    if stage_files.read_header(out / f"{name}.prompts.jsonl").get("of") != prepared["of"]:
        raise UserError(
            f"{out}: {name}.prompts.jsonl and {name}.answers.jsonl are from different runs; run --stage prepare again"
        )
    max_length = max_length if max_length is not None else backend.max_position
    if max_length is None:
        print(
            f"{name}: prompts are not cut, since the model's positions are not known; an endpoint refuses those that are too "
            "long (see --max-length)"
        )
    truncator = PromptTruncator(backend.tokenizer, chat=backend.chat, max_length=max_length)
    for task, max_tokens in prepared["tokens"].items():
        truncator.check(task, max_tokens)
    header = {
        "of": prepared["of"],
        "model": backend.describe(),
        "identity": identity(backend),
        "settings": {"max_length": max_length, "chat": truncator.chat},
    }
    header = json.loads(json.dumps(header))
    path = out / f"{name}.predictions.jsonl"
    existing = stage_files.read_header(path)
    if all(existing.get(key) == header[key] for key in ("of", "settings", "identity")) and not existing.get(
        "refused", True
    ):
        progress(prepared["items"])
        return

    asked: deque[TruncatedPrompt] = deque()

    def requests() -> Iterator[GenerationRequest]:
        lines = stage_files.read_lines(
            out / f"{name}.prompts.jsonl", "prepare", "id", "text", "start", "tokens"
        )
        for line in lines:
            asked.append(truncator.prompt(line["id"], line["text"], line["tokens"], line["start"]))
            yield asked[-1].request

    predictions: list[dict[str, Any]] = []
    log = out / f"{name}.journal.jsonl"
    for answer in answer_all(backend, requests(), log, batch=batch, progress=progress):
        prompt = asked.popleft()
        predictions.append(
            {
                "id": answer.id,
                "prediction": answer.text,
                "prompt_tokens": len(prompt.request.ids or ()),
                "cut": prompt.cut,
                **({} if answer.answered else {"refused": answer.finish}),
            }
        )
    # Count by the kind of reason: its text may contain the size of each prompt.
    refused = Counter(line["refused"].partition(":")[0] for line in predictions if "refused" in line)
    with jsonl.complete_file(path, {**header, "refused": refused}) as write:
        for line in predictions:
            write(line)


def score(
    out: Path, name: str, scorer: Callable[[dict[str, Any], str], float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score all predictions and write NAME.scores.jsonl; returns (header of the predictions, with the reasons
    of refusals in full; for each question its gold answer, `prediction`, `cut` and `score`).

    scorer: called with a line of the gold answers and a prediction. UserError where a previous stage is
    missing, or was run on other inputs.
    """
    prepared = stage_files.require_header(out / f"{name}.answers.jsonl", "prepare")
    path = out / f"{name}.predictions.jsonl"
    header = stage_files.require_header(path, "predict", "model", "settings", "refused")
    if header["of"] != prepared["of"]:
        raise UserError(
            f"{out}: the predictions do not belong to the questions that were prepared last; run --stage predict again"
        )
    fields = ("id", "prediction", "prompt_tokens", "cut")
    predictions = {line["id"]: line for line in stage_files.read_lines(path, "predict", *fields)}
    scored = []
    for gold in stage_files.read_lines(out / f"{name}.answers.jsonl", "prepare", "id", "task"):
        if gold["id"] not in predictions:
            raise UserError(
                f"{out}: {path.name} has no answer to {gold['id']}; remove it and run --stage predict again"
            )
        line = predictions[gold["id"]]
        points = 0.0 if "refused" in line else scorer(gold, line["prediction"])
        scored.append({**gold, **line, "score": points})
    with jsonl.complete_file(out / f"{name}.scores.jsonl", header) as write:
        names = ("id", "score", "prediction", "prompt_tokens", "cut", "refused")
        for line in scored:
            write({key: line[key] for key in names if key in line})
    reasons = refusals.count_reasons(line["refused"] for line in scored if "refused" in line)
    return {**header, "refused": reasons}, scored
