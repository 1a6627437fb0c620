"""A benchmark's answers, kept on disk as they come: a run that was stopped, however, asks for none of them
again.

What an endpoint refused (`Completion.answered`) is written down with its reason, but is no answer: the next
run asks again.

    {"journal": "predictions", "format": 1, "model": {...}}      the first line: the model and how it writes
    {"key": ID, "prompt_sha256": ..., "prediction": ..., "tokens_in": ..., "tokens_out": ..., "finish": ..., "seconds": ...}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Backend, Completion, Request, identity
from megatron_ultralong.io.request_log import RequestLog


@dataclass(frozen=True, kw_only=True)
class Prediction(Completion):
    """What was answered to one request."""

    id: str
    seconds: float
    """Since the batch it was asked in began."""


TOKENS_AT_A_TIME = 16384
"""Of the prompts of a batch, where no other size is asked for."""


def run(
    backend: Backend,
    requests: Iterable[Request],
    path: Path | None,
    *,
    batch: int | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[Prediction]:
    """The answers to `requests`, in their order, refusals among them; those that `path` does not hold are
    asked for, and added to it one by one.

    path: None = keep none. batch: requests asked at a time; None = as many as make 16K tokens. Requests are
    taken as they are needed: a prompt of 4M tokens is a list of tens of megabytes. progress: called with the
    number of answers since the last call. UserError where `path` is of another model or settings or of
    another prompt with the same id, and where a request got no answer.
    """
    journal = (
        RequestLog(path, kind="predictions", of={"model": identity(backend)}, flag="--out")
        if path is not None
        else None
    )
    with contextlib.closing(journal) if journal is not None else contextlib.nullcontext():
        asked: set[str] = set()
        for group in _batches(requests, batch):
            found = [_known(journal, request, asked) for request in group]
            progress(sum(one is not None for one in found))
            missing = [i for i, one in enumerate(found) if one is None]
            began = time.monotonic()
            for place, completion in backend.generate([group[i] for i in missing]) if missing else ():
                i = missing[place]
                found[i] = Prediction(
                    id=group[i].id, seconds=round(time.monotonic() - began, 3), **vars(completion)
                )
                if journal is not None:
                    journal.add(_record(found[i], group[i]))  # type: ignore[arg-type]
                progress(1)
            for one in found:
                assert one is not None, "a backend that gives no answer raises UserError"
                yield one


def _batches(requests: Iterable[Request], size: int | None) -> Iterator[list[Request]]:
    group: list[Request] = []
    total = 0
    for request in requests:
        tokens = (
            len(request.text) // 4 if request.ids is None else len(request.ids)
        ) + request.tokens  # some four letters make a token
        if group and (len(group) == size if size else total + tokens > TOKENS_AT_A_TIME):
            yield group
            group, total = [], 0
        group.append(request)
        total += tokens
    if group:
        yield group


def _known(journal: RequestLog | None, request: Request, asked: set[str]) -> Prediction | None:
    """The kept answer to a request."""
    if request.id in asked:
        raise ValueError(f"two requests have the id {request.id!r}")
    asked.add(request.id)
    lines = journal.get(request.id) if journal is not None else []
    if not lines:
        return None
    line = lines[-1]
    kept = Prediction(
        id=request.id,
        text=line["prediction"],
        **{name: line[name] for name in ("tokens_in", "tokens_out", "finish", "seconds")},
    )
    if not kept.answered:
        return None
    if line["prompt_sha256"] != prompt_hash(request):
        assert journal is not None
        raise UserError(
            f"{journal.path} holds an answer to another prompt with the id {request.id}; remove it, or choose another --out"
        )
    return kept


def _record(one: Prediction, request: Request) -> dict[str, Any]:
    return {
        "key": one.id,
        "prompt_sha256": prompt_hash(request),
        "prediction": one.text,
        "tokens_in": one.tokens_in,
        "tokens_out": one.tokens_out,
        "finish": one.finish,
        "seconds": one.seconds,
    }


def prompt_hash(request: Request) -> str:
    """Of all that a request says but its id."""
    found = hashlib.sha256(json.dumps([request.text, request.prefix, request.tokens, request.stop]).encode())
    if request.ids is not None:
        found.update(array("q", request.ids).tobytes())
    return found.hexdigest()
