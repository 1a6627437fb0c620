"""Answers of a model, stored on disk as they arrive: a resumed run repeats no request, however the earlier
one was stopped.

A request that an endpoint refused (`Completion.answered`) is recorded with the reason, but counts as
unanswered: the next run sends it again.

    {"journal": "predictions", "format": 1, "model": {...}}      first line: model and generation settings
    {"key": ID, "prompt_sha256": ..., "prediction": ..., "tokens_in": ..., "tokens_out": ..., "finish": ...,
     "seconds": ...}
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
from megatron_ultralong.evaluate.backends.protocol import Backend, Completion, GenerationRequest, identity
from megatron_ultralong.io.request_log import RequestLog

BATCH_TOKENS = 16384
"""Tokens of the prompts of a batch, where no batch size is requested."""


@dataclass(frozen=True, kw_only=True)
class Answer(Completion):
    """The answer to one request."""

    id: str
    seconds: float
    """Since the start of its batch."""


def answer_all(
    backend: Backend,
    requests: Iterable[GenerationRequest],
    path: Path | None,
    *,
    batch: int | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[Answer]:
    """Yield the answers to `requests` in their order, refusals included; those that `path` does not contain
    are requested from `backend` and appended to it one by one.

    path: None = keep no answers. batch: requests per batch; None = as many as make `BATCH_TOKENS`. Requests
    are consumed batch by batch, since a prompt of 4M tokens is a list of tens of megabytes. progress: called
    with the number of answers since the last call. UserError where `path` belongs to another model, to other
    settings or to another prompt with the same id, and where a request got no answer.
    """
    log = (
        RequestLog(path, kind="predictions", of={"model": identity(backend)}, flag="--output")
        if path is not None
        else None
    )
    with contextlib.closing(log) if log is not None else contextlib.nullcontext():
        seen: set[str] = set()
        for group in _batches(requests, batch):
            answers = [_kept(log, request, seen) for request in group]
            progress(sum(answer is not None for answer in answers))
            missing = [i for i, answer in enumerate(answers) if answer is None]
            began = time.monotonic()
            for place, completion in backend.generate([group[i] for i in missing]) if missing else ():
                i = missing[place]
                seconds = round(time.monotonic() - began, 3)
                new = answers[i] = Answer(id=group[i].id, seconds=seconds, **vars(completion))
                if log is not None:
                    log.add(_record(new, group[i]))
                progress(1)
            for answer in answers:
                assert answer is not None, "a backend without an answer raises UserError"
                yield answer


def _batches(requests: Iterable[GenerationRequest], size: int | None) -> Iterator[list[GenerationRequest]]:
    group: list[GenerationRequest] = []
    total = 0
    for request in requests:
        prompt_tokens = (
            len(request.text) // 4 if request.ids is None else len(request.ids)
        )  # ~4 letters per token
        tokens = prompt_tokens + request.max_tokens
        if group and (len(group) == size if size else total + tokens > BATCH_TOKENS):
            yield group
            group, total = [], 0
        group.append(request)
        total += tokens
    if group:
        yield group


def _kept(log: RequestLog | None, request: GenerationRequest, seen: set[str]) -> Answer | None:
    """The answer to a request that an earlier run recorded."""
    if request.id in seen:
        raise ValueError(f"two requests have the id {request.id!r}")
    seen.add(request.id)
    lines = log.get(request.id) if log is not None else []
    if not lines:
        return None
    line = lines[-1]
    answer = Answer(
        id=request.id,
        text=line["prediction"],
        **{name: line[name] for name in ("tokens_in", "tokens_out", "finish", "seconds")},
    )
    if not answer.answered:
        return None
    if line["prompt_sha256"] != prompt_hash(request):
        assert log is not None
        raise UserError(
            f"{log.path} contains an answer to another prompt with the id {request.id}; remove it, or choose another --output"
        )
    return answer


def _record(answer: Answer, request: GenerationRequest) -> dict[str, Any]:
    return {
        "key": answer.id,
        "prompt_sha256": prompt_hash(request),
        "prediction": answer.text,
        "tokens_in": answer.tokens_in,
        "tokens_out": answer.tokens_out,
        "finish": answer.finish,
        "seconds": answer.seconds,
    }


def prompt_hash(request: GenerationRequest) -> str:
    """Hash everything that a request contains except its id."""
    values = [request.text, request.prefix, request.max_tokens, request.stop]
    digest = hashlib.sha256(json.dumps(values).encode())
    if request.ids is not None:
        digest.update(array("q", request.ids).tobytes())
    return digest.hexdigest()
