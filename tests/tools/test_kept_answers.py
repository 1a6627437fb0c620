"""Answers that are kept: what a stopped run asks again, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.pipeline.kept_answers import answer_all
from tests import processes


class Echo:
    """Answers with what it was asked, and can stop in the middle."""

    chat, max_position, tokenizer = "auto", None, None

    def __init__(
        self, *, model: str = "m", seed: int = 0, fails_at: str = "", refuses: str = "", seconds: float = 0.0
    ) -> None:
        self.model, self.seed, self.fails_at, self.refuses, self.seconds = (
            model,
            seed,
            fails_at,
            refuses,
            seconds,
        )
        self.calls: list[list[str]] = []

    def check(self, length: int, batch: int) -> None: ...

    def generate(self, requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        self.calls.append([request.id for request in requests])
        for i, request in reversed(list(enumerate(requests))):
            if request.id == self.fails_at:
                raise UserError("no answer")
            time.sleep(self.seconds)
            refused = request.id == self.refuses
            yield (
                i,
                Completion(
                    text="" if refused else f"<{request.text}>",
                    tokens_in=3,
                    tokens_out=2,
                    finish="HTTP 400: long" if refused else "stop",
                ),
            )

    def describe(self) -> dict:
        return {
            "backend": "echo",
            "path": self.model,
            "device": str(time.time()),
            "layout": {"cp": os.getpid()},
            "settings": {"seed": self.seed},
        }

    def close(self) -> None: ...


def requests(n: int, tokens: int = 5) -> list[GenerationRequest]:
    return [GenerationRequest(id=f"q{i}", text=f"text {i}\u2028é", max_tokens=tokens) for i in range(n)]


def test_nothing_answered_is_asked_again(tmp_path):
    path, done = tmp_path / "p.jsonl", []
    backend = Echo(fails_at="q4")
    with pytest.raises(UserError, match="no answer"):
        list(answer_all(backend, requests(9), path, batch=3))
    assert backend.calls == [["q0", "q1", "q2"], ["q3", "q4", "q5"]]
    path.write_bytes(path.read_bytes() + b'{"key": "q7", "predict')  # killed while it wrote
    backend = Echo()
    found = list(answer_all(backend, requests(9), path, batch=3, progress=done.append))
    assert backend.calls == [["q3", "q4"], ["q6", "q7", "q8"]], "q5 had its answer before the failure"
    assert [one.id for one in found] == [f"q{i}" for i in range(9)] and [one.text for one in found] == [
        f"<text {i}\u2028é>" for i in range(9)
    ]
    assert sum(done) == 9 and all(
        (one.tokens_in, one.tokens_out, one.finish) == (3, 2, "stop") and one.seconds >= 0 for one in found
    )
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert lines[0] == {
        "journal": "predictions",
        "format": 1,
        "model": {"backend": "echo", "path": "m", "settings": {"seed": 0}},
    }
    assert len(lines) == 10 and set(lines[1]) == {
        "key",
        "prompt_sha256",
        "prediction",
        "tokens_in",
        "tokens_out",
        "finish",
        "seconds",
    }
    backend = Echo()
    assert list(answer_all(backend, requests(12), path))[:9] == found and backend.calls == [
        ["q9", "q10", "q11"]
    ], "more questions later"
    # Without a file all are asked, and none is kept.
    assert [one.text for one in answer_all(Echo(), requests(9), None)] == [one.text for one in found]


def test_answers_of_something_else_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    list(answer_all(Echo(), requests(2), path))
    before = path.read_bytes()
    for backend, asked, words in (
        (
            Echo(model="n"),
            requests(2),
            'was written with model.path "m", not "n"; remove it, or choose another --output',
        ),
        (Echo(seed=1), requests(2), "was written with model.settings.seed 0, not 1"),
        (Echo(), requests(2, tokens=6), "contains an answer to another prompt with the id q0"),
        (
            Echo(),
            [GenerationRequest(id="q1", text="text 1\u2028é", ids=[1, 2], max_tokens=5)],
            "another prompt with the id q1",
        ),
    ):
        with pytest.raises(UserError, match=words) as error:
            list(answer_all(backend, asked, path))
        assert "\n" not in str(error.value) and not backend.calls and path.read_bytes() == before
    with pytest.raises(ValueError, match="two requests have the id 'q0'"):
        list(answer_all(Echo(), requests(1) * 2, None))
    path.write_text('{"journal": "refine", "format": 1}\n')
    with pytest.raises(UserError, match="is not a predictions log of format 1"):
        list(answer_all(Echo(), requests(1), path))


def test_what_was_refused_is_told_with_its_reason_and_asked_again(tmp_path):
    path = tmp_path / "p.jsonl"
    first = list(answer_all(Echo(refuses="q1"), requests(3), path))
    assert [(one.answered, one.finish) for one in first] == [
        (True, "stop"),
        (False, "HTTP 400: long"),
        (True, "stop"),
    ]
    assert '"finish": "HTTP 400: long"' in path.read_text()
    for refuses, again in (("q1", [["q1"]]), ("", [["q1"]]), ("", [])):
        backend = Echo(refuses=refuses)
        found = list(answer_all(backend, requests(3), path))
        assert (
            backend.calls == again
            and [one.answered for one in found] == [True, not refuses, True]
            and len(found) == 3
        )


def test_batches_are_taken_as_they_are_needed():
    taken: list[str] = []

    def stream() -> Iterator[GenerationRequest]:
        for i, size in enumerate((4000, 4000, 9000, 100, 20000, 10)):
            taken.append(f"q{i}")
            yield GenerationRequest(id=f"q{i}", ids=[0] * size, max_tokens=10)

    backend = Echo()
    rest = answer_all(backend, stream(), None)
    next(rest)
    assert backend.calls == [["q0", "q1"]] and taken == ["q0", "q1", "q2"]
    list(rest)
    assert backend.calls == [["q0", "q1"], ["q2", "q3"], ["q4"], ["q5"]], "no more than 16K tokens, or one"


KILLED = """
from pathlib import Path
from megatron_ultralong.evaluate.pipeline.kept_answers import answer_all
from tests.tools.test_kept_answers import Echo, requests
list(answer_all(Echo(seconds=0.02), requests(500), Path({path!r}), batch=50))
"""


def test_a_killed_run_loses_nothing(tmp_path):
    path = tmp_path / "p.jsonl"
    run = processes.Popen([sys.executable, "-c", KILLED.format(path=str(path))])
    while not path.exists() or path.read_bytes().count(b"\n") < 30:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {json.loads(line)["key"] for line in path.read_bytes().split(b"\n")[1:-1]}
    backend = Echo()
    found = list(answer_all(backend, requests(500), path, batch=50))
    asked = {i for call in backend.calls for i in call}
    assert len(kept) >= 29 and asked == {f"q{i}" for i in range(500)} - kept and len(found) == 500
