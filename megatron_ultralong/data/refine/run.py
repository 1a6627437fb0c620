"""Answers of instruction data rewritten by a model behind an OpenAI-compatible endpoint, as the UltraLong
recipe does with GPT-4o.

NAME.jsonl          the conversations in the order of the input, each with its outcome; appears when complete
NAME.json           report: counts, reasons, tokens, cost, settings
NAME.journal.jsonl  request log: every answer that was paid for; a stopped run resumes from it
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import DOMAINS
from megatron_ultralong.data.refine.next_step import RewriteRequest, next_step
from megatron_ultralong.data.refine.prompts import RewritePrompts
from megatron_ultralong.data.refine.read import RefineInput
from megatron_ultralong.data.refine.requests import request_all
from megatron_ultralong.data.refine.settings import RefineSettings
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files, endpoint_client
from megatron_ultralong.io.request_log import RequestLog

FORMAT = 1
"""Of output and report."""


def refine(
    inputs: list[Path],
    output: Path,
    settings: RefineSettings,
    prompts: RewritePrompts,
    *,
    form: str = "auto",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Request the answers that the log lacks, write `output` (NAME.jsonl) and its report; return the report.

    inputs: files, folders or globs of conversations in `form` (conversations.py). UserError for mistakes of
    the user, KeyboardInterrupt with a message after a signal: then neither is written, and the log keeps
    every answer. Memory: one example per request in flight, and some 100 bytes per answer.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: the name must end in .jsonl")
    conversations.check_form(form)
    inputs = conversations.files(map(str, inputs))
    log_path = output.with_suffix(".journal.jsonl")
    for path in inputs:
        if path.resolve() in (output.resolve(), log_path.resolve()):
            raise UserError(f"--input {path}: would be replaced by --output {output}; use different folders")
    endpoint_client.api_key(
        settings.key_env, settings.base_url
    )  # a missing key fails before any file is made
    examples = RefineInput(
        paths=inputs, domain=settings.domain, turns=settings.turns, limit=settings.limit, form=form
    )
    count = sum(1 for _ in examples)
    if not count:
        first = "; the first: {place}: {reason}".format(**examples.broken[0]) if examples.broken else ""
        others = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
        raise UserError(f"no conversation in {inputs[0]}{others}, {len(examples.broken)} broken lines{first}")
    atomic_files.check_writable(output.parent, f"--output {output}")
    forget = "failed" if settings.retry_failed else None
    with contextlib.closing(RequestLog(log_path, forget=forget)) as log:
        request_all(examples, count, settings, prompts, log, show_progress)
        return _write_output(output, examples, settings, prompts, log)


def _write_output(
    output: Path, examples: RefineInput, settings: RefineSettings, prompts: RewritePrompts, log: RequestLog
) -> dict[str, Any]:
    """Write the conversations, then the report; return the report. Examples that were not requested are left
    out."""
    domains = {domain: Counter({"examples": 0, "refined": 0}) for domain in DOMAINS}
    outcomes: Counter[str] = Counter()
    not_asked = 0
    with atomic_files.whole_file(output) as file:
        for example in examples:
            step = next_step(example, settings, prompts, log)
            if isinstance(step, RewriteRequest):
                not_asked += 1
                continue
            record, reasons = example.record, [outcome for outcome in step.outcomes if outcome != "refined"]
            refined = len(reasons) < len(step.outcomes)
            domains[record["domain"]].update(examples=1, refined=int(refined))
            outcomes.update(step.outcomes)
            line = {
                **record,
                "messages": step.messages,
                "original": [record["messages"][turn]["content"] for turn in example.turns],
                "refined": refined,
                "refine": {
                    "model": settings.model,
                    "prompt_sha256": prompts.sha256(record["domain"]),
                    "tokens_in": step.tokens_in,
                    "tokens_out": step.tokens_out,
                    "reason": "; ".join(dict.fromkeys(reasons)) or None,
                },
            }
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    report = {
        "format": FORMAT,
        "kind": "refine",
        "settings": asdict(settings),
        "prompt_sha256": {domain: prompts.sha256(domain) for domain in DOMAINS},
        "inputs": [str(path) for path in examples.paths],
        "form": examples.form,
        "examples": sum(count["examples"] for count in domains.values()),
        "refined": sum(count["refined"] for count in domains.values()),
        "not_asked": not_asked,
        "domains": domains,
        "turns": dict(sorted(outcomes.items())),
        "tokens_in": log.tokens_in,
        "tokens_out": log.tokens_out,
        "cost_usd": settings.cost(log.tokens_in, log.tokens_out),
        "broken_lines": examples.broken,
    }
    atomic_files.write_json(output.with_suffix(".json"), report)
    return report
