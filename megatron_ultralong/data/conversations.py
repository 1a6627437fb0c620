"""Conversations from files, in the forms in which instruction data is published.

    sharegpt        conversations: [{from: human|gpt|system, value}]   ShareGPT, SlimOrca, Evol-Instruct V2
    messages        messages: [{role: user|assistant|system, content}] OpenAI; refine writes it
    alpaca          instruction, input (empty or missing), output      Alpaca-GPT4, MathInstruct, GPTeacher
    QUESTION/ANSWER two columns by their names, like question/answer   OrcaMath, Glaive, MetaMath, Magicoder

The form is detected record by record unless it is given. A record that cannot be used is reported with file
and line; nothing is guessed: only turns before the first question and after the last answer are removed.
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.data import input_files
from megatron_ultralong.errors import UserError

KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
DOMAINS = ("general", "math", "code")
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
"""Names of the three roles; ShareGPT's files name the assistant after the model."""
TOOL_ROLES = (
    "tool",
    "tools",
    "function",
    "function_call",
    "function_response",
    "tool_call",
    "tool_response",
    "observation",
    "ipython",
)
LISTS = ("conversations", "messages", "conversation")
"""Columns that contain a list of turns."""
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
)
"""Columns of a question and its answer; the first pair that a record has is used."""
SYSTEM_KEYS = ("system", "system_prompt")
MARKS = ("weight", "train", "train_on_turn")
"""Keys of a turn that say whether it is trained on: 0 or false = no (OpenAI and Mistral; axolotl)."""


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str
    trained: bool = True
    """False for an answer that its file marks as context only (`MARKS`)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """At most one system message, then user and assistant in turn, the assistant last. No content is
    blank."""

    messages: tuple[Message, ...]
    id: str
    """The record's own, or file and line."""
    place: str
    """File, and line, row or item, for messages."""
    domain: str
    source: str
    turns_cut: int = 0
    """Turns left out before the first question and after the last answer."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record without a conversation."""

    place: str
    kind: Literal["broken", "unsupported"]
    """unsupported = valid, but not trained on: tools, images."""
    reason: str


class Refused(ValueError):
    """Why a record has no conversation; kind as in Unusable."""

    def __init__(self, reason: str, kind: Literal["broken", "unsupported"] = "broken") -> None:
        super().__init__(reason)
        self.kind = kind


def files(inputs: Iterable[str]) -> list[Path]:
    """The files that paths, directories (all of known kinds below, sorted) and globs name. UserError for one
    that names no file."""
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            some = [p for p in input_files.files_below(path) if p.name.lower().endswith(KINDS)]
        elif not path.exists() and glob.has_magic(text):
            some = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())
        else:
            some = [path]
        if not some:
            raise UserError(f"{text}: contains no file of a known kind ({', '.join(KINDS)})")
        files += some
    for path in files:
        if not path.name.lower().endswith(KINDS):
            raise UserError(f"{path}: unknown kind of file; the name must end in one of {', '.join(KINDS)}")
        input_files.opened(path).close()
    return list(dict.fromkeys(files))


def read(
    path: Path,
    *,
    source: str,
    domain: str | None = None,
    form: str = "auto",
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[Conversation | Unusable]:
    """Yield what each record of a file contains, in order. domain: None = the record's own `domain`, or
    "general".

    progress: called with the bytes of the file read since the last call. Memory: a record of .jsonl, some
    rows of .parquet, all of a .json. UserError where the file cannot be read.
    """
    check_form(form)
    for number, record in records(path, progress):
        at = place(path, number)
        try:
            messages, cut = turns(record, form)
            own = record.get("domain")
            yield Conversation(
                messages, _id(record, at), at, domain or (own if own in DOMAINS else "general"), source, cut
            )
        except Refused as refused:
            yield Unusable(at, refused.kind, str(refused))


def check_form(form: str) -> None:
    """UserError for an unknown form."""
    if form not in ("auto", "sharegpt", "messages", "alpaca") and len(form.split("/")) != 2:
        raise UserError(
            f"form {form}: must be auto, sharegpt, messages, alpaca, or two columns like question/answer"
        )


# ---- a record's turns --------------------------------------------------------------------------


def turns(record: Any, form: str) -> tuple[tuple[Message, ...], int]:
    """The messages of a record as in Conversation, and how many turns were removed. Refused where it has no
    conversation."""
    if isinstance(record, Refused):
        raise record
    if not isinstance(record, dict):
        raise Refused(f"contains {_kind(record)}, not an object with columns")
    column = list_column(record, form)
    if form in ("sharegpt", "messages") and column is None:
        raise Refused(f"no list of turns under {' or '.join(LISTS)}")
    if column is None:
        return _in_turn(_pair(record, form))
    messages = [_turn(turn) for turn in record[column]]
    return _in_turn(messages if messages and messages[0].role == "system" else _system(record) + messages)


def as_messages(record: Any, form: str, name: str) -> dict[str, Any]:
    """Convert a record to the form `messages`, with its own `id`, or `name`. Refused where it has no
    conversation.

    From a record in another form only the domain is kept: its other columns could be detected as that form
    again.
    """
    messages, _ = turns(record, form)
    kept = (
        record
        if list_column(record, form) == "messages"
        else {key: record[key] for key in ("domain",) if key in record}
    )
    return {
        **kept,
        "id": _id(record, name),
        "messages": [
            {"role": message.role, "content": message.content, **({} if message.trained else {"weight": 0})}
            for message in messages
        ],
    }


def list_column(record: dict[str, Any], form: str) -> str | None:
    """The column with the turns, where the form has one."""
    return (
        next((name for name in LISTS if isinstance(record.get(name), list)), None)
        if form in ("auto", "sharegpt", "messages")
        else None
    )


def _id(record: dict[str, Any], name: str) -> str:
    return next(
        (str(record[key]) for key in ("id", "idx", "conversation_id") if record.get(key) not in (None, "")),
        name,
    )


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Refused(f"a turn is {_kind(turn)}, not an object with a role and its content")
    name = turn.get("from") or turn.get("role")  # in parquet a turn has every column, some of them empty
    if name in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise Refused(f"uses tools ({name})", "unsupported")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused(f"unknown role {name!r}")
    content = _text(turn.get("content") if turn.get("value") is None else turn["value"], role)
    return Message(role, content, role != "assistant" or _trained(turn))


def _trained(turn: dict[str, Any]) -> bool:
    """Whether a turn is trained on. Refused where its marks are neither yes nor no, or contradict each
    other."""
    marks = {name: turn[name] for name in MARKS if turn.get(name) is not None}
    for name, value in marks.items():
        if value not in (0, 1):
            raise Refused(f"{name}={value!r} of a turn must be 0 or 1", "unsupported")
    if len(set(map(bool, marks.values()))) > 1:
        raise Refused(f"the marks of a turn contradict each other ({', '.join(marks)})")
    return all(marks.values())


def _pair(record: dict[str, Any], form: str) -> list[Message]:
    pairs: Iterable[tuple[str, ...]] = PAIRS
    if "/" in form:
        pairs = [tuple(form.split("/"))]
    elif form == "alpaca":
        pairs = PAIRS[:3]
    pair = next((pair for pair in pairs if all(name in record for name in pair)), None)
    if pair is None:
        wanted = "" if form == "auto" else f" for form {form}"
        raise Refused(f"no known columns{wanted} among {', '.join(list(record)[:8]) or 'none'}")
    question, answer = (_text(record[name], name) for name in pair)
    if pair[0] == "instruction" and record.get("input"):
        question += "\n\n" + _text(record["input"], "input")
    return [*_system(record), Message("user", question), Message("assistant", answer)]


def _system(record: dict[str, Any]) -> list[Message]:
    return [
        Message("system", _text(record[key], key)) for key in SYSTEM_KEYS if isinstance(record.get(key), str)
    ][:1]


def _in_turn(turns: list[Message]) -> tuple[tuple[Message, ...], int]:
    """The turns that a Conversation keeps, and how many were removed."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = turns[len(system) :]
    first = next((i for i, turn in enumerate(rest) if turn.role == "user"), len(rest))
    last = next((i for i in range(len(rest), 0, -1) if rest[i - 1].role == "assistant"), 0)
    if last <= first:
        raise Refused("no question with an answer after it")
    kept = rest[first:last]
    for i, turn in enumerate(kept):
        wanted = ("user", "assistant")[i % 2]
        if turn.role != wanted:
            raise Refused(
                "a system message in the middle"
                if turn.role == "system"
                else f"two turns of the {turn.role} in a row"
            )
        if not turn.content.strip():
            raise Refused(f"turn {first + i + 1} ({turn.role}) is empty")
    if not any(turn.trained for turn in kept if turn.role == "assistant"):
        raise Refused("none of its answers is to be trained on", "unsupported")
    return tuple([turn for turn in system if turn.content.strip()] + kept), len(rest) - len(kept)


def _text(value: Any, name: str) -> str:
    if isinstance(value, list):
        parts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
            for part in value
        ]
        if not all(isinstance(part, str) for part in parts):
            raise Refused(f"{name} contains parts that are not text", "unsupported")
        value = "".join(str(part) for part in parts)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(f"{name} contains {_kind(value)}, not text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:  # JSON can spell "\ud800", which no tokenizer accepts
        raise Refused(f"{name} contains a lone surrogate, which is not text") from None
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# ---- files -------------------------------------------------------------------------------------


def place(path: Path, number: int) -> str:
    """File, and line, row or item, of a record, for messages."""
    name = path.name.lower()
    return f"{path}, {'row' if name.endswith('.parquet') else 'item' if name.endswith('.json') else 'line'} {number}"


def records(path: Path, progress: Callable[[int], Any] = lambda n: None) -> Iterator[tuple[int, Any]]:
    """Yield number (line, row or item, from 1) and record of each; a Refused where a line is not JSON.
    progress, memory and errors as in `read`."""
    name = path.name.lower()
    with input_files.opened(path) as file, input_files.readable(path):
        if name.endswith(".parquet"):
            yield from _parquet(path, file)
        elif name.endswith(".json"):
            try:
                items = json.load(file)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}: not JSON ({error}); fix it, or name it .jsonl if each line is a record"
                ) from None
            if not isinstance(items, list):
                raise UserError(f"{path}: expected a list of records; name it .jsonl if each line is one")
            yield from enumerate(items, 1)
        else:
            done = 0
            lines = input_files.decompressed(file, input_files.compression(path))
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield number, _parsed(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                progress(file.tell() - done)
                done = file.tell()
            return
        progress(file.seek(0, 2))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Refused(f"not UTF-8 text ({error.reason})")
    except (ValueError, RecursionError) as error:
        return Refused(f"not JSON ({error})")


def _parquet(path: Path, file: Any) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {input_files.one_line(error)}") from None
