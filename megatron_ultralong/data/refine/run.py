"""Answers of instruction data, rewritten by a model behind an OpenAI-compatible endpoint, as UltraLong refines its own by GPT-4o.

NAME.jsonl          the conversations in the order of the input, each with what became of it; only ever whole
NAME.json           report: counts, reasons, tokens, cost, settings
NAME.journal.jsonl  every answer that was paid for; a run that was stopped goes on from it
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_ultralong.data import conversations
from megatron_ultralong.data.refine.next_step import Request, Settings, advance
from megatron_ultralong.data.refine.prompts import DOMAINS, Prompts
from megatron_ultralong.data.refine.read import Input
from megatron_ultralong.data.refine.requests import ask_all
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client
from megatron_ultralong.io.request_log import RequestLog

FORMAT = 1
"""Of output and report."""


def refine(
    inputs: list[Path],
    output: Path,
    settings: Settings,
    prompts: Prompts,
    *,
    form: str = "auto",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write `output` (NAME.jsonl) and its report from what the journal holds and what is asked now; returns
    the report.

    inputs: files, folders or globs of conversations in `form` (conversations.py). UserError for what a user
    can mend, KeyboardInterrupt with a line after a signal: then neither is written, and the journal keeps
    every answer. Memory: one example a request on its way, and some 100 bytes an answer.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: the name must end in .jsonl")
    conversations.check_form(form)
    inputs = conversations.files(map(str, inputs))
    journal_path = output.with_suffix(".journal.jsonl")
    for path in inputs:
        if path.resolve() in (output.resolve(), journal_path.resolve()):
            raise UserError(
                f"--input {path}: is what --output {output} writes; keep the two in different folders"
            )
    endpoint_client.api_key(
        settings.key_env, settings.base_url
    )  # a missing key is said before anything is made
    examples = Input(
        paths=inputs, domain=settings.domain, turns=settings.turns, limit=settings.limit, form=form
    )
    count = sum(1 for _ in examples)
    if not count:
        first = (
            f"; the first: {examples.broken[0]['place']}: {examples.broken[0]['reason']}"
            if examples.broken
            else ""
        )
        raise UserError(
            f"no conversation in {inputs[0]}{' and others' if len(inputs) > 1 else ''}, {len(examples.broken)} broken lines{first}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    with contextlib.closing(
        RequestLog(journal_path, forget="failed" if settings.retry_failed else None)
    ) as journal:
        ask_all(examples, count, settings, prompts, journal, show_progress)
        return _write(output, examples, settings, prompts, journal)


# ---- output ------------------------------------------------------------------------------------


def _write(
    output: Path, examples: Input, settings: Settings, prompts: Prompts, journal: RequestLog
) -> dict[str, Any]:
    """The conversations, then the report, each renamed when whole; returns the report. Examples not asked for
    yet are left out."""
    domains = {domain: Counter({"examples": 0, "refined": 0}) for domain in DOMAINS}
    outcomes: Counter[str] = Counter()
    not_asked = 0
    with _staged(output) as file:
        for example in examples:
            result = advance(example, settings, prompts, journal)
            if isinstance(result, Request):
                not_asked += 1
                continue
            record, reasons = example.record, [outcome for outcome in result.outcomes if outcome != "refined"]
            refined = len(reasons) < len(result.outcomes)
            domains[record["domain"]].update(examples=1, refined=int(refined))
            outcomes.update(result.outcomes)
            line = {
                **record,
                "messages": result.messages,
                "original": [record["messages"][turn]["content"] for turn in example.turns],
                "refined": refined,
                "refine": {
                    "model": settings.model,
                    "prompt_sha256": prompts.sha256(record["domain"]),
                    "tokens_in": result.tokens_in,
                    "tokens_out": result.tokens_out,
                    "reason": "; ".join(dict.fromkeys(reasons)) or None,
                },
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    report = {
        "format": FORMAT,
        "kind": "refine",
        "settings": asdict(settings),
        "prompt_sha256": {d: prompts.sha256(d) for d in DOMAINS},
        "inputs": [str(path) for path in examples.paths],
        "form": examples.form,
        "examples": sum(count["examples"] for count in domains.values()),
        "refined": sum(count["refined"] for count in domains.values()),
        "not_asked": not_asked,
        "domains": domains,
        "turns": dict(sorted(outcomes.items())),
        "tokens_in": journal.tokens_in,
        "tokens_out": journal.tokens_out,
        "cost_usd": settings.cost(journal.tokens_in, journal.tokens_out),
        "broken_lines": examples.broken,
    }
    with _staged(output.with_suffix(".json")) as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[IO[str]]:
    """A file that takes its place under `path` when it is whole."""
    stage = path.with_name(f".{path.name}.partial")
    try:
        with stage.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from None
    finally:
        stage.unlink(missing_ok=True)
