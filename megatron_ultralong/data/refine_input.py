"""The conversations that refinement reads: JSON lines with `messages`; what cannot be used is kept in mind, with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.data import documents
from megatron_ultralong.data.refine_prompts import DOMAINS

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A conversation of the input."""

    record: dict[str, Any]
    """Its line, with `id` and `domain` filled in."""
    turns: tuple[int, ...]
    """Which of its messages are to be rewritten; assistant messages that answer a user."""


@dataclass(kw_only=True)
class Input:
    """The examples of all files in order; may be gone through again and again. UserError where a file cannot be read."""

    paths: list[Path]
    domain: str
    """Of lines that name none."""
    turns: Literal["last", "all"]
    limit: int | None
    """Examples at most."""
    broken: list[dict[str, str]] = field(default_factory=list)
    """Place and reason of the lines that are left out, as of the last time through; with a limit, of the part that was read."""

    def __iter__(self) -> Iterator[Example]:
        self.broken.clear()
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator[Example]:
        for path in self.paths:
            for number, line in documents.lines(path):
                try:
                    record = conversation(line, f"{path.name}:{number}", self.domain)
                    yield Example(record, _turns(record["messages"], self.turns))
                except ValueError as error:
                    self.broken.append({"place": f"{path}, line {number}", "reason": str(error)})


def conversation(line: bytes, name: str, domain: str) -> dict[str, Any]:
    """A line's record; `name` and `domain` where it has no `id` and `domain`. ValueError says what is wrong with the line."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list of messages under 'messages'")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message whose role is not {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message whose content is not text")
    found = domain if record.get("domain") is None else record["domain"]
    if found not in DOMAINS:
        raise ValueError(f"domain {found!r} is not one of {', '.join(DOMAINS)}")
    return {**record, "id": name if record.get("id") is None else record["id"], "domain": found}


def _turns(messages: list[dict[str, Any]], which: Literal["last", "all"]) -> tuple[int, ...]:
    roles = [message["role"] for message in messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
    if not turns:
        raise ValueError("no assistant message that answers a user")
    return tuple(turns if which == "all" else turns[-1:])
