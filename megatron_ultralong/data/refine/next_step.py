"""The next step of one example: from the request log to the next request, or to the refined example.

A run that sends requests, one that resumes, and the writing of the output all use it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_ultralong.data.refine.prompts import RewritePrompts
from megatron_ultralong.data.refine.read import RefineExample
from megatron_ultralong.data.refine.settings import RefineSettings
from megatron_ultralong.io.request_log import RequestLog


@dataclass(frozen=True)
class RewriteRequest:
    """The next answer to be rewritten."""

    key: str
    """Of the request log."""
    example: RefineExample
    history: list[dict[str, Any]]
    """The messages before the answer."""
    answer: str
    attempt: int


@dataclass(frozen=True)
class RefinedExample:
    """An example that needs no further request."""

    messages: list[dict[str, Any]]
    outcomes: list[str]
    """For each turn: refined, or the reason why the original was kept."""
    tokens_in: int
    tokens_out: int


def next_step(
    example: RefineExample, settings: RefineSettings, prompts: RewritePrompts, log: RequestLog
) -> RewriteRequest | RefinedExample:
    """Return the next request for an example, or the refined example if it needs none."""
    messages = list(example.record["messages"])
    outcomes, tokens_in, tokens_out = [], 0, 0
    for turn in example.turns:
        history, answer = messages[:turn], messages[turn]["content"]
        key = _request_key(settings, prompts, example.record["domain"], history, answer)
        records = log.get(key)
        tokens_in += sum(record.get("tokens_in", 0) for record in records)
        tokens_out += sum(record.get("tokens_out", 0) for record in records)
        rejected = [record["rejected"] for record in records if "rejected" in record]
        failed = [record["failed"] for record in records if "failed" in record]
        accepted = [r["answer"] for r in records if "rejected" not in r and "failed" not in r]
        if accepted:
            messages[turn] = {**messages[turn], "content": accepted[0]}
            outcomes.append("refined")
        elif len(rejected) >= settings.attempts:
            outcomes.append(rejected[-1])
        elif failed:
            outcomes.append(f"failed: {failed[-1]}")
        else:
            return RewriteRequest(key, example, history, answer, len(rejected))
    return RefinedExample(messages, outcomes, tokens_in, tokens_out)


def _request_key(
    settings: RefineSettings, prompts: RewritePrompts, domain: str, history: list[dict[str, Any]], answer: str
) -> str:
    """Hash everything that determines the answer. Not the address, so that a server may move; not the limit
    of tokens, so that raising it for truncated answers does not repeat the other requests."""
    determining = [
        settings.model,
        settings.temperature,
        prompts.sha256(domain),
        [[message["role"], message["content"]] for message in history],
        answer,
    ]
    return hashlib.sha256(json.dumps(determining).encode()).hexdigest()
