"""What is asked of whom, and the way through one example: from the journal to the next request, or to the
result.

A run that asks, one that goes on after a stop and the writing of the output are this same walk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ultralong.data.refine.prompts import Prompts
from megatron_ultralong.data.refine.read import Example
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client
from megatron_ultralong.io.request_log import RequestLog


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of whom. Fields but the last are the tool's flags."""

    model: str
    base_url: str = endpoint_client.OPENAI
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the key."""
    concurrency: int = 16
    """Requests on their way at a time."""
    timeout: float = 300.0
    """Seconds for one try."""
    retries: int = 6
    """Tries after the first where the endpoint is busy or broken."""
    attempts: int = 2
    """Answers asked for until one is good enough."""
    max_tokens: int = 4096
    temperature: float | None = None
    """None: the endpoint's own."""
    domain: Literal["general", "math", "code"] = "general"
    """Of examples that name none."""
    turns: Literal["last", "all"] = "last"
    """Which assistant messages are rewritten."""
    price_in: float | None = None
    """USD per million tokens sent."""
    price_out: float | None = None
    limit: int | None = None
    """Examples, from the first."""
    budget: float | None = None
    """USD for everything in the journal, earlier runs included."""
    retry_failed: bool = False
    backoff: float = 1.0
    """Upper limit of the first wait before another try, seconds."""

    def __post_init__(self) -> None:
        for name, least in (
            ("concurrency", 1),
            ("retries", 0),
            ("attempts", 1),
            ("max_tokens", 1),
            ("limit", 1),
            ("temperature", 0),
            ("price_in", 0),
            ("price_out", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        for name in ("timeout", "budget"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} {value}: must be more than 0")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out: give both or none")
        if self.budget is not None and self.price_in is None:
            raise UserError("--budget: needs --price-in and --price-out, USD per million tokens")
        object.__setattr__(self, "base_url", endpoint_client.check_base_url(self.base_url))

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """USD; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(frozen=True)
class Request:
    """What is to be asked next for an example."""

    key: str
    example: Example
    before: list[dict[str, Any]]
    answer: str
    """The one to be rewritten."""
    attempt: int


@dataclass(frozen=True)
class Result:
    """What became of an example."""

    messages: list[dict[str, Any]]
    outcomes: list[str]
    """A turn: refined, or the reason why the original was kept."""
    tokens_in: int
    tokens_out: int


def advance(example: Example, settings: Settings, prompts: Prompts, journal: RequestLog) -> Request | Result:
    """The next request for an example, or its result."""
    messages = list(example.record["messages"])
    outcomes, tokens_in, tokens_out = [], 0, 0
    for turn in example.turns:
        answer = messages[turn]["content"]
        key = _key(settings, prompts, example.record["domain"], messages[:turn], answer)
        records = journal.get(key)
        tokens_in += sum(record.get("tokens_in", 0) for record in records)
        tokens_out += sum(record.get("tokens_out", 0) for record in records)
        rejected = [record["rejected"] for record in records if "rejected" in record]
        good = next(
            (record["answer"] for record in records if "rejected" not in record and "failed" not in record),
            None,
        )
        if good is not None:
            messages[turn] = {**messages[turn], "content": good}
            outcomes.append("refined")
        elif len(rejected) >= settings.attempts:
            outcomes.append(rejected[-1])
        elif failures := [record["failed"] for record in records if "failed" in record]:
            outcomes.append(f"failed: {failures[-1]}")
        else:
            return Request(key, example, messages[:turn], answer, len(rejected))
    return Result(messages, outcomes, tokens_in, tokens_out)


def _key(settings: Settings, prompts: Prompts, domain: str, before: list[dict[str, Any]], answer: str) -> str:
    """Of all that decides what the answer is like. Not the address, so that a server may move; not the limit
    of tokens, so that raising it for those that were truncated does not ask for the others again."""
    asked = [
        settings.model,
        settings.temperature,
        prompts.sha256(domain),
        [[m["role"], m["content"]] for m in before],
        answer,
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
