"""The conversations that refinement reads, in the forms of conversations.py; records that cannot be used are
listed with their place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import DOMAINS

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class RefineExample:
    """A conversation of the input."""

    record: dict[str, Any]
    """Its record, with `messages`, `id` and `domain` filled in."""
    turns: tuple[int, ...]
    """Which of its messages are rewritten: assistant messages that answer a user."""


@dataclass(kw_only=True)
class RefineInput:
    """The examples of all files in order; can be iterated repeatedly. UserError if a file cannot be read."""

    paths: list[Path]
    domain: str
    """Of records without one."""
    turns: Literal["last", "all"]
    limit: int | None
    """Examples at most."""
    form: str = "auto"
    broken: list[dict[str, str]] = field(default_factory=list)
    """Place and reason of the records that were left out in the last iteration; with a limit, of the part
    that was read."""

    def __iter__(self) -> Iterator[RefineExample]:
        self.broken.clear()
        return islice(self._examples(), self.limit)

    def _examples(self) -> Iterator[RefineExample]:
        for path in self.paths:
            for number, record in conversations.records(path):
                try:
                    filled = conversation(record, f"{path.name}:{number}", self.domain, self.form)
                    yield RefineExample(filled, _rewritten_turns(filled["messages"], self.turns))
                except ValueError as error:
                    self.broken.append({"place": conversations.place(path, number), "reason": str(error)})


def conversation(record: Any, name: str, domain: str, form: str) -> dict[str, Any]:
    """Return the record with `messages`, and with `name` and `domain` if it has no `id` and `domain`.
    ValueError says what is wrong with it.

    A record that has `messages` already stays as it is, including further columns and unanswered turns.
    """
    if (
        isinstance(record, dict)
        and form in ("auto", "messages")
        and conversations.list_column(record, form) == "messages"
    ):
        _check_messages(record["messages"])
        name = name if record.get("id") is None else record["id"]
    else:
        record = conversations.as_messages(record, form, name)
        name = record["id"]
    domain = domain if record.get("domain") is None else record["domain"]
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is not one of {', '.join(DOMAINS)}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which is not text") from None
    except TypeError as error:  # parquet has types that JSON lacks
        raise ValueError(f"cannot be written as JSON ({error})") from None
    return {**record, "id": name, "domain": domain}


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise ValueError("no list of messages under 'messages'")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message whose role is not {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message whose content is not text")


def _rewritten_turns(messages: list[dict[str, Any]], which: Literal["last", "all"]) -> tuple[int, ...]:
    roles = [message["role"] for message in messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
    if not turns:
        raise ValueError("no assistant message that answers a user")
    return tuple(turns if which == "all" else turns[-1:])
