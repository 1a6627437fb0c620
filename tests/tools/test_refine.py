"""tools/prepare_data.py refine against a real HTTP server that answers, is late, refuses, disconnects and
counts its requests."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ultralong.data.refine import requests, validate
from megatron_ultralong.data.refine.prompts import RewritePrompts, load_prompts
from megatron_ultralong.data.refine.run import refine
from megatron_ultralong.data.refine.settings import RefineSettings
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client, progress
from megatron_ultralong.io.request_log import RequestLog
from tests import processes
from tests.server import Server

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
KEY = "sk-secret-4711"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def example(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


def error_of(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    return {"status": status, "raw": json.dumps({"error": {"message": message, "code": code}})}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8"
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> list[str]:
    return [record["messages"][-1]["content"] for record in read(path)]


def run(
    server: Server,
    inputs: Path,
    output: Path,
    prompts: RewritePrompts = RewritePrompts(),  # noqa: B008
    **settings: Any,
) -> dict[str, Any]:
    settings = {"base_url": server.url, "model": "m", "retries": 2, "backoff": 0.01, **settings}
    return refine([inputs], output, RefineSettings(**settings), prompts, show_progress=False)


def test_answers_keep_their_order_with_limited_concurrency(server, tmp_path):
    server.delay = 0.02
    # Later ones are answered sooner.
    server.script = lambda draft, nth: {
        "text": f"Better: {draft}",
        "sleep": 0.04 if draft.endswith("0") else 0,
    }
    records = [example(f"question {i % 25}", f"draft {i % 25}", tag=[i]) for i in range(30)]
    records[3] |= {"id": "three", "domain": "code", "source": "s"}
    report = run(
        server,
        write(tmp_path / "in.jsonl", records),
        tmp_path / "deep" / "out.jsonl",
        concurrency=4,
        price_in=1,
        price_out=10,
    )
    made = read(tmp_path / "deep" / "out.jsonl")
    assert [r["messages"] for r in made] == [
        example(f"question {i % 25}", f"Better: draft {i % 25}")["messages"] for i in range(30)
    ]
    assert [r["tag"] for r in made] == [[i] for i in range(30)]
    assert made[0] == {
        **example("question 0", "Better: draft 0"),
        "tag": [0],
        "id": "in.jsonl:1",
        "domain": "general",
        "original": ["draft 0"],
        "refined": True,
        "refine": {
            "model": "m",
            "prompt_sha256": RewritePrompts().sha256("general"),
            "tokens_in": 100,
            "tokens_out": 10,
            "reason": None,
        },
    }
    assert (
        made[3]["id"] == "three"
        and made[3]["source"] == "s"
        and made[3]["refine"]["prompt_sha256"] == RewritePrompts().sha256("code")
    )
    assert server.most == 4
    # Example 28 equals 3 but for the domain, so it is another request; the other equal ones are
    # requested once.
    assert server.asked == Counter({f"draft {i}": 1 for i in range(25)} | {"draft 3": 2})
    assert report == json.loads((tmp_path / "deep" / "out.json").read_text())
    assert report["examples"] == report["refined"] == 30 and report["domains"]["code"] == {
        "examples": 1,
        "refined": 1,
    }
    assert (report["tokens_in"], report["tokens_out"]) == (2600, 260) and report["cost_usd"] == pytest.approx(
        0.0026 + 0.0026
    )
    assert report["turns"] == {"refined": 30} and report["format"] == 1 and report["settings"]["model"] == "m"
    assert server.keys == {f"Bearer {KEY}"} and {body["model"] for body in server.bodies} == {"m"}
    assert all("temperature" not in body and body["max_tokens"] == 4096 for body in server.bodies)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        "out.journal.jsonl",
        "out.json",
        "out.jsonl",
    ]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY in p.read_text()]
    before = (tmp_path / "deep" / "out.jsonl").read_bytes()
    run(server, tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl", concurrency=2)
    assert server.asked.total() == 26 and (tmp_path / "deep" / "out.jsonl").read_bytes() == before


def test_transient_errors_are_retried(server, tmp_path):
    first = {
        "busy": {"status": 429, "raw": "{}", "headers": {"Retry-After": "0.4"}},
        "date": {"status": 429, "raw": "{}", "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}},
        "down": {"status": 500, "raw": "oops"},
        "odd": {"raw": "not JSON"},
        "page": {"raw": "<html>", "headers": {"Content-Type": "text/html"}},
        "none": {"raw": '{"choices": []}'},
        "list": {"raw": "[1]"},
        "null": {"raw": '{"choices": [{"message": null}]}'},
        "half": {"text": "\ud83d"},
        "number": {"text": 7},
        "cut": {"hang_up": True},
    }
    server.script = lambda draft, nth: f"Better: {draft}" if nth else first[draft]
    report = run(
        server, write(tmp_path / "in.jsonl", [example("q", name) for name in first]), tmp_path / "out.jsonl"
    )
    assert answers(tmp_path / "out.jsonl") == [f"Better: {name}" for name in first]
    assert server.asked == Counter(dict.fromkeys(first, 2)) and report["refined"] == len(first)
    assert server.times["busy"][1] - server.times["busy"][0] >= 0.4


def test_equal_examples_are_requested_once(server, tmp_path):
    server.delay = 0.02
    server.script = lambda draft, nth: f"Better: {draft}" if nth == 2 else ""
    report = run(
        server,
        write(tmp_path / "in.jsonl", [example("q", "a")] * 12),
        tmp_path / "out.jsonl",
        attempts=3,
        concurrency=6,
    )
    assert server.asked == {"a": 3} and answers(tmp_path / "out.jsonl") == ["Better: a"] * 12
    assert report["refined"] == 12 and report["tokens_in"] == 300


def test_openai_has_another_name_for_the_token_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_client, "OPENAI", server.url)
    run(server, write(tmp_path / "in.jsonl", [example("q", "a")]), tmp_path / "out.jsonl")
    assert server.bodies[0]["max_completion_tokens"] == 4096 and "max_tokens" not in server.bodies[0]


def test_a_slow_drip_is_a_timeout(server, tmp_path):
    """The HTTP client's own timeout limits the time between two bytes."""
    server.script = lambda draft, nth: {"text": "x", "drip": 0.1} if nth == 0 else {"text": "x", "sleep": 5}
    start = time.monotonic()
    report = run(
        server,
        write(tmp_path / "in.jsonl", [example("q", "a")]),
        tmp_path / "out.jsonl",
        timeout=0.3,
        retries=1,
    )
    assert (
        report["turns"] == {"failed: timeout": 1}
        and server.asked == {"a": 2}
        and time.monotonic() - start < 4
    )


def test_failures_are_logged_and_repeated_only_on_demand(server, tmp_path):
    good = False
    server.script = lambda draft, nth: (
        f"Better: {draft}" if good or draft == "b" else error_of(503, f"busy {KEY}")
    )
    source, output = (
        write(tmp_path / "in.jsonl", [example("q", "a"), example("q", "b")]),
        tmp_path / "out.jsonl",
    )
    report = run(server, source, output)
    assert server.asked == Counter(a=3, b=1) and report["turns"] == {"failed: HTTP 503": 1, "refined": 1}
    assert (
        "busy ***" in (tmp_path / "out.journal.jsonl").read_text()
        and KEY not in (tmp_path / "out.journal.jsonl").read_text()
    )
    a, b = read(output)
    assert (
        not a["refined"]
        and a["messages"][-1]["content"] == "a"
        and a["refine"]["reason"] == "failed: HTTP 503"
        and b["refined"]
    )
    good = True
    assert run(server, source, output) == report and server.asked.total() == 4
    assert run(server, source, output, retry_failed=True)["refined"] == 2 and server.asked == Counter(
        a=4, b=1
    )
    assert run(server, source, output)["refined"] == 2 and server.asked.total() == 5


def test_many_failures_in_a_row_end_the_run(server, tmp_path):
    server.script = lambda draft, nth: {"status": 502, "raw": "bad gateway"}
    source = write(tmp_path / "in.jsonl", [example("q", str(i)) for i in range(100)])
    with pytest.raises(
        UserError, match=r"^20 requests in a row failed, the last with HTTP 502 .*--retry-failed$"
    ):
        run(server, source, tmp_path / "out.jsonl", concurrency=3, retries=0)
    assert 20 <= server.asked.total() <= 23 and not (tmp_path / "out.jsonl").exists()
    server.script = lambda draft, nth: f"Better: {draft}"
    assert run(server, source, tmp_path / "out.jsonl", retry_failed=True)["refined"] == 100
    server.script = lambda draft, nth: (
        f"Better: {draft}" if draft.endswith("9") else {"status": 502, "raw": "bad gateway"}
    )
    assert (
        run(server, source, tmp_path / "other.jsonl", concurrency=1, retries=0)["refined"] == 10
    )  # nine in a row are not many


@pytest.mark.parametrize(
    "reply, message",
    [
        (error_of(401, f"wrong key {KEY}"), "answers 401: the key in OPENAI_API_KEY is not accepted"),
        (
            error_of(403, f"{KEY} is not\nallowed"),
            r"answers 403: the key in OPENAI_API_KEY may not use model 'm': .*\*\*\* is not allowed",
        ),
        (
            {"status": 404, "raw": "{}"},
            r"http://127.0.0.1:\d+/v1 answers 404: no model 'm', or no such address; check --model and --base-url",
        ),
        (
            error_of(400, "temperature is not supported"),
            "answers 400, which another try will not change: .*temperature is not",
        ),
        (
            error_of(429, "pay", "insufficient_quota"),
            "answers 429: the account of the key in OPENAI_API_KEY has no quota",
        ),
    ],
)
def test_errors_that_no_retry_fixes_are_one_line(server, tmp_path, reply, message):
    server.script = lambda draft, nth: reply
    source = write(tmp_path / "in.jsonl", [example("q", str(i)) for i in range(50)])
    with pytest.raises(UserError, match=message) as error:
        run(server, source, tmp_path / "out.jsonl", concurrency=2)
    assert "\n" not in str(error.value) and KEY not in str(error.value)
    assert server.asked.total() <= 4 and list(tmp_path.iterdir()) == [source]


def test_an_example_that_does_not_fit_is_one_failure(server, tmp_path):
    long = error_of(400, "This model's maximum context length is 8 tokens")
    server.script = lambda draft, nth: "Better" if draft == "fine" else long
    source = write(tmp_path / "in.jsonl", [*(example("q", str(i)) for i in range(30)), example("q", "fine")])
    report = run(server, source, tmp_path / "out.jsonl", concurrency=1)
    assert report["turns"] == {"failed: HTTP 400": 30, "refined": 1} and server.asked.total() == 31


def test_a_server_without_a_key(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    source = write(tmp_path / "in.jsonl", [example("q", "a")])
    assert run(server, source, tmp_path / "out.jsonl")["refined"] == 1
    server.script = lambda draft, nth: {"status": 401, "raw": "{}"}
    with pytest.raises(UserError, match="answers 401: a key is required; put it into MY_KEY"):
        run(server, source, tmp_path / "other.jsonl", key_env="MY_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        run(server, source, tmp_path / "third.jsonl", base_url=endpoint_client.OPENAI)
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UserError, match="OPENAI_API_KEY contains characters that no key has") as error:
        run(server, source, tmp_path / "third.jsonl")
    assert "schl" not in str(error.value)


# ---- checks ------------------------------------------------------------------------------------


def test_a_rejected_answer_is_requested_again_then_the_original_stays(server, tmp_path):
    bad = {
        "cut off": {"text": "Better, but", "finish": "length"},
        "refused": "I’m sorry, but I can’t help with that.",
        "filtered": {"text": "", "finish": "content_filter"},
        "marked": {"text": None, "refusal": "no"},
        "open": "Better:\n```python\nprint(1)",
        "empty": " \n",
    }
    server.script = lambda draft, nth: (
        bad[draft.removesuffix(" twice")] if nth == 0 or draft.endswith("twice") else f"Better: {draft}"
    )
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [example("q", name + end) for name in bad for end in ("", " twice")])
    report = run(server, source, output, temperature=0.0)
    assert report["turns"] == {"empty": 1, "refined": 6, "refusal": 3, "truncated": 2}
    made = read(output)
    assert answers(output) == [text for name in bad for text in (f"Better: {name}", f"{name} twice")]
    assert [r["refined"] for r in made] == [True, False] * 6 and all(
        r["refine"]["tokens_in"] == 200 for r in made
    )
    assert set(server.asked.values()) == {2} and Counter(body["temperature"] for body in server.bodies) == {
        0.0: 12,
        0.7: 12,
    }
    run(server, source, output, temperature=0.0)
    assert server.asked.total() == 24
    run(
        server, source, output, temperature=0.0, attempts=3, max_tokens=8000
    )  # requests the rejected ones once more, nothing else
    assert {draft for draft, count in server.asked.items() if count == 3} == {
        f"{name} twice" for name in bad
    } and server.asked.total() == 30


def against(
    answer: str, original: str = "An answer.", domain: str = "general", finish: str | None = "stop"
) -> str | None:
    reply = endpoint_client.Reply(text=answer, finish=finish, refused=False, tokens=None)
    return validate.rejection_reason(reply, original, domain=domain, tags=RewritePrompts().tags("general"))


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("A good answer.", None),
        ("I can't stress enough how good it is.", None),
        ("Sorry to hear that! Try this.", None),
        ("I can't help but smile.", None),
        ("I'm afraid of spiders too.", None),
        ("I'm afraid I have to say no.", "refusal"),
        ("Here is an improved version of your essay.", None),
        ("Here is the draft of your letter.", None),
        ("The error in the draft is", "speaks of the rewriting"),
        ("", "empty"),
        ("As an AI language model, I have no body.", "refusal"),
        ("Sorry, but I cannot do this.", "refusal"),
        ("I am unable to help.", "refusal"),
        ("**I cannot assist** with that", "refusal"),
        ("<draft>\nAn answer", "echoes the request"),
        ("Text </conversation>", "echoes the request"),
        ("Here is the rewritten answer: 4", "speaks of the rewriting"),
        ("The draft's result is wrong.", "speaks of the rewriting"),
        ("```\ncode\n```", None),
        ("```\ncode\n", "truncated"),
        ("````md\n```\n````", None),
        ("```py\n# ```sh inside\n```", None),
        ("~~~\n```\n~~~", None),
        ("```one line```", None),
        ("  1. x\n     ```c\n     int a;\n     ```\n", None),
    ],
)
def test_check_of_answers(answer, reason):
    assert against(answer) == reason


def test_checks_that_compare_with_the_original():
    assert against("I cannot help with that.", "I'm sorry, but I can't do that.") is None
    assert against("As drafts go: <draft> is a tag", "Use the <draft> tag") is None
    assert against("x" * 19, "y" * 100) == "much shorter" and against("x" * 20, "y" * 100) is None
    assert against("Fine", finish="length") == "truncated" and against("Fine", finish=None) is None


@pytest.mark.parametrize(
    "new, old, same",
    [
        (r"So \boxed{42}.", r"Thus \boxed{42}", True),
        (r"\boxed{42.0}", "work\n#### 42", True),
        ("#### 1,234", "#### 1234", True),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
        (r"\boxed{\dfrac12}", r"\boxed{1/2}", True),
        (r"\boxed{-\frac{3}{4}}", r"\boxed{-.75}", True),
        (r"\boxed{\$18}", "#### 18", True),
        (r"\boxed{18\text{ apples}}", "#### 18", True),
        (r"\boxed{20\%}", "#### 20", True),
        (r"\boxed{\left( 1, 2 \right)}", r"\boxed{(1,2)}", True),
        (r"\boxed{x^{2}+1}", r"\boxed{x^{2} + 1}", True),
        ("The answer is 7.", "The answer is: 7", True),
        (r"first \boxed{1}, then \boxed{2}", "#### 2", True),
        (r"The final answer is $\boxed{5}$.", "The answer is: 5", True),
        (r"\boxed{43}", r"\boxed{42}", False),
        ("It is 42.", "#### 42", False),
        ("#### 0.33", r"\boxed{1/3}", False),
        (r"\boxed{(1,3)}", r"\boxed{(1,2)}", False),
        ("#### 2*3", "#### 23", False),
        ("#### (1,200)", "#### (1200)", False),
        (r"\boxed{4", "#### 4", False),
        ("#### 1/0", "#### 0", False),
        ("#### 18", "#### 18 \u00bd", False),
    ],
)
def test_final_answer_of_mathematics(new, old, same):
    assert against(new + " ", old, domain="math") == (None if same else "other final answer")
    assert against(new, old, domain="general") is None


def test_reasoning_is_removed(server, tmp_path):
    server.script = lambda draft, nth: "<think>\nhm\n</think>\n\nBetter."
    run(server, write(tmp_path / "in.jsonl", [example("q", "a")]), tmp_path / "out.jsonl")
    assert answers(tmp_path / "out.jsonl") == ["Better."]


# ---- turns, prompts, input ---------------------------------------------------------------------

CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1", "weight": 2},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "{answer}"},
        {"role": "user", "content": "bye"},
    ]
}


def test_all_turns_see_the_new_ones_before(server, tmp_path):
    source = write(tmp_path / "in.jsonl", [CHAT])
    run(server, source, tmp_path / "last.jsonl")
    run(server, source, tmp_path / "all.jsonl", turns="all")
    last, every = (read(tmp_path / f"{name}.jsonl")[0] for name in ("last", "all"))
    assert [m["content"] for m in last["messages"]] == [
        "be kind",
        "hello",
        "one",
        "1",
        "two",
        "Better: {answer}",
        "bye",
    ]
    assert [m["content"] for m in every["messages"]] == [
        "be kind",
        "hello",
        "one",
        "Better: 1",
        "two",
        "Better: {answer}",
        "bye",
    ]
    assert (
        last["original"] == ["{answer}"]
        and every["original"] == ["1", "{answer}"]
        and every["messages"][3]["weight"] == 2
    )
    assert every["refine"]["tokens_in"] == 200
    before = "[system]\nbe kind\n\n[assistant]\nhello\n\n[user]\none\n\n[assistant]\n{}\n\n[user]\ntwo\n</conversation>"
    assert (
        before.format("1") in server.bodies[0]["messages"][-1]["content"]
        and before.format("Better: 1") in server.bodies[2]["messages"][-1]["content"]
    )
    server.script = lambda draft, nth: "" if draft == "1" else f"Better: {draft}"
    report = run(server, source, tmp_path / "part.jsonl", turns="all")
    part = read(tmp_path / "part.jsonl")[0]
    assert (
        report["turns"] == {"empty": 1, "refined": 1}
        and part["refined"]
        and part["refine"]["reason"] == "empty"
    )
    assert part["messages"][3] == CHAT["messages"][3]


def test_custom_prompts(server, tmp_path):
    file = tmp_path / "prompts.yaml"
    file.write_text("system: ''\nmath: |\n  Solve {conversation}; they said {answer}.\n")
    prompts = load_prompts(file)
    assert prompts.messages("math", CHAT["messages"][2:3], "{conversation}") == [
        {"role": "user", "content": "Solve [user]\none; they said {conversation}.\n"}
    ]
    assert prompts.general == RewritePrompts().general and prompts.sha256("math") != RewritePrompts().sha256(
        "math"
    )
    source = write(tmp_path / "in.jsonl", [example("q", "a", domain="math")])
    run(server, source, tmp_path / "out.jsonl")
    run(server, source, tmp_path / "out.jsonl", prompts)
    assert server.asked.total() == 2  # another prompt is another request
    for text, message in (
        ("maths: x", "no template is named 'maths'; did you mean 'math'"),
        ("math: x", "the template 'math' lacks {conversation}"),
        ("- a", "expected a mapping with some of system, general"),
        ("math: 3", "'math' must be text"),
        ("a: [", "not YAML: "),
        ("system: x\nsystem: y", "duplicate key system"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            load_prompts(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_prompts(tmp_path / "none.yaml")


def test_broken_lines_are_reported_with_their_places(server, tmp_path):
    lines = [
        json.dumps(example("q", "a")),
        "{",
        "",
        "[]",
        '{"messages": []}',
        '{"messages": [{"role": "tool", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 3}]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        json.dumps(example("q", "a", domain="art")),
        json.dumps(example("q", "\ud800")),
        json.dumps(example("q", "b")),
    ]
    raw = ("\ufeff" + "\n".join(lines)).encode()
    for name, content in (
        ("a.jsonl", raw),
        ("a.jsonl.gz", gzip.compress(raw)),
        ("a.jsonl.zst", zstandard.compress(raw)),
    ):
        (tmp_path / name).write_bytes(content)
        report = run(server, tmp_path / name, tmp_path / "out.jsonl")
        assert [r["id"] for r in read(tmp_path / "out.jsonl")] == [f"{name}:1", f"{name}:11"]
        assert [broken["place"] for broken in report["broken_lines"]] == [
            f"{tmp_path / name}, line {i}" for i in (2, 4, 5, 6, 7, 8, 9, 10)
        ]
        reasons = [broken["reason"] for broken in report["broken_lines"]]
        assert reasons[0].startswith("not JSON (") and reasons[1:] == [
            "contains a list, not an object with columns",
            "no list of messages under 'messages'",
            "a message whose role is not system, user or assistant",
            "a message whose content is not text",
            "no assistant message that answers a user",
            "domain 'art' is not one of general, math, code",
            "contains a lone surrogate, which is not text",
        ]
    assert server.asked.total() == 2


def test_every_form_is_read_and_written_as_messages(server, tmp_path):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "r"},
        {"from": "gpt", "value": "b"},
    ]
    (tmp_path / "share.json").write_text(
        json.dumps([{"id": "s", "conversations": turns}, {"id": "t", "conversations": turns[:1]}])
    )
    source = write(
        tmp_path / "a.jsonl",
        [
            {"instruction": "do", "input": "this", "output": "c", "domain": "code"},
            example("q", "d", id=5, more=[1]),
            {"system_prompt": "be kind", "question": "q", "response": "e"},
        ],
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "q", "answer": "f", "weight": 1.5}]), tmp_path / "p.parquet"
    )
    settings = RefineSettings(base_url=server.url, model="m", turns="all", domain="math")
    report = refine(
        [tmp_path / "share.json", source, tmp_path / "p.parquet"],
        tmp_path / "out" / "x.jsonl",
        settings,
        RewritePrompts(),
        show_progress=False,
    )
    found = read(tmp_path / "out" / "x.jsonl")
    assert [(r["id"], r["domain"], [m["content"] for m in r["messages"]], r["original"]) for r in found] == [
        ("s", "math", ["q", "Better: a", "r", "Better: b"], ["a", "b"]),
        ("a.jsonl:1", "code", ["do\n\nthis", "Better: c"], ["c"]),
        (5, "math", ["q", "Better: d"], ["d"]),
        ("a.jsonl:3", "math", ["be kind", "q", "Better: e"], ["e"]),
        ("p.parquet:1", "math", ["q", "Better: f"], ["f"]),
    ]
    assert found[2]["more"] == [1] and all("conversations" not in r and "output" not in r for r in found)
    assert report["form"] == "auto" and report["broken_lines"] == [
        {"place": f"{tmp_path / 'share.json'}, item 2", "reason": "no question with an answer after it"}
    ]
    named = refine(
        [source],
        tmp_path / "out" / "y.jsonl",
        settings,
        RewritePrompts(),
        form="question/response",
        show_progress=False,
    )
    assert (
        named["examples"] == 1
        and len(named["broken_lines"]) == 2
        and answers(tmp_path / "out" / "y.jsonl") == ["Better: e"]
    )


# ---- stopping and resuming -----------------------------------------------------------------------


def test_limit_and_budget(server, tmp_path):
    source, output = (
        write(tmp_path / "in.jsonl", [example("q", str(i)) for i in range(20)]),
        tmp_path / "out.jsonl",
    )
    assert (
        run(server, source, output, limit=3)["examples"] == 3
        and server.asked.total() == 3
        and len(read(output)) == 3
    )
    prices = {"price_in": 10.0, "price_out": 100.0}  # 0.002 USD per answer
    report = run(server, source, output, budget=0.0155, concurrency=1, **prices)
    assert (
        server.asked.total() == 8
        and report["not_asked"] == 12
        and report["cost_usd"] == pytest.approx(0.016)
        and len(read(output)) == 8
    )
    assert (
        run(server, source, output, budget=0.0155, **prices)["not_asked"] == 12 and server.asked.total() == 8
    )
    assert run(server, source, output, budget=1, **prices)["not_asked"] == 0 and server.asked.total() == 20
    assert answers(output) == [f"Better: {i}" for i in range(20)]
    server.script = lambda draft, nth: {"text": "Better", "usage": None}
    with pytest.raises(
        UserError, match="does not report the tokens of an answer, so --budget cannot be kept"
    ):
        run(server, source, tmp_path / "other.jsonl", budget=1, **prices)
    report = run(server, source, tmp_path / "other.jsonl")
    assert report["tokens_in"] == 0 and report["cost_usd"] is None and report["refined"] == 20


def start(server: Server, source: Path, output: Path) -> processes.Popen:
    return processes.Popen(
        [
            sys.executable,
            str(TOOL),
            "refine",
            "--input",
            str(source),
            "--output",
            str(output),
            "--model",
            "m",
            "--base-url",
            server.url,
            "--concurrency",
            "4",
        ],
        stdout=processes.PIPE,
        stderr=processes.PIPE,
    )


def wait_for(what, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_a_killed_run_resumes_and_ends_the_same(server, tmp_path):
    records = [example(f"q{i}", f"draft {i}", domain="math" if i % 2 else "code") for i in range(40)]
    source = write(tmp_path / "in.jsonl", records)
    server.script = lambda draft, nth: "" if draft.endswith("7") else f"Better: {draft}"
    run(server, source, tmp_path / "whole.jsonl")
    server.asked.clear()
    server.delay = 0.1
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.journal.jsonl"
    process = start(server, source, output)
    wait_for(lambda: server.asked.total() >= 16)
    process.kill()
    process.communicate()
    assert (
        process.returncode == -signal.SIGKILL and not output.exists() and not (tmp_path / "out.json").exists()
    )
    server.delay = 0
    wait_for(lambda: server.in_flight == 0)
    done, asked = Counter(record["key"] for record in read(journal)[1:]), server.asked.total()
    assert 8 <= done.total() < 44 and asked - done.total() <= 4  # only requests in flight were lost
    with journal.open("ab") as file:
        file.write(b'{"key": "half of a l')
    report = run(server, source, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert server.asked.total() == asked + 44 - done.total()  # 40 and the second attempts of 4
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert report == whole and len(read(journal)) == 45


def test_a_log_of_version_0_1_is_used(server, tmp_path):
    """Keys of requests do not change: what an earlier version paid for is not requested again."""
    key = "4860dd3cdedb66e2dca986cac50571e06e7a0beee3bca25e18038cfd51669fc0"
    record = {
        "key": key,
        "id": "in.jsonl:1",
        "attempt": 0,
        "answer": "Better: a",
        "tokens_in": 100,
        "tokens_out": 10,
    }
    write(tmp_path / "out.journal.jsonl", [{"journal": "refine", "format": 1}, record])
    report = run(server, write(tmp_path / "in.jsonl", [example("q", "a")]), tmp_path / "out.jsonl")
    assert (
        not server.asked and answers(tmp_path / "out.jsonl") == ["Better: a"] and report["tokens_in"] == 100
    )


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_one_line(server, tmp_path, name):
    source, output = (
        write(tmp_path / "in.jsonl", [example("q", str(i)) for i in range(200)]),
        tmp_path / "out.jsonl",
    )
    server.delay = 0.05
    process = start(server, source, output)
    wait_for(lambda: server.asked.total() >= 8)
    process.send_signal(name)
    printed = process.communicate(timeout=60)
    last = printed[1].strip().splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in printed[1] and not output.exists()
    assert (
        last.endswith("out.journal.jsonl contains every answer so far; run the same command again to resume")
        and "interrupted: " in last
    )
    asked = server.asked.total()
    assert len(read(tmp_path / "out.journal.jsonl")) == 1 + asked < 150  # it waited for requests in flight
    server.delay = 0
    assert run(server, source, output)["refined"] == 200 and server.asked.total() == 200


def test_a_stopped_run_does_not_wait_long(server, tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "GRACE", 0.1)
    server.script = lambda draft, nth: {"text": "late", "sleep": 5}
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:  # not before the run handles the signal
        wait_for(lambda: server.asked)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run(server, write(tmp_path / "in.jsonl", [example("q", "a")]), tmp_path / "out.jsonl")
    assert time.monotonic() - begin < 4 and signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out.journal.jsonl").exists()  # it was empty


def test_request_log(tmp_path):
    path = tmp_path / "j.jsonl"
    with contextlib.closing(RequestLog(path)) as journal:
        journal.add({"key": "a", "answer": "é\ud800", "tokens_in": 3})
        journal.add({"key": "a", "failed": "x"})
        with pytest.raises(UserError, match="is being written by another run"):
            RequestLog(path)
        assert [record.get("answer") for record in journal.get("a")] == ["é\ud800", None] and journal.get(
            "b"
        ) == []
    whole = path.read_bytes()
    for cut in range(len(whole)):  # wherever it was cut, complete lines are kept and the rest is removed
        path.write_bytes(whole[:cut])
        with contextlib.closing(RequestLog(path)) as journal:
            assert len(journal.get("a")) == max(0, whole[:cut].count(b"\n") - 1)
            kept = path.read_bytes()
            assert kept == whole[: whole[:cut].rfind(b"\n") + 1]
            journal.add({"key": "b"})
            assert journal.get("b") == [{"key": "b"}]
    path.write_bytes(whole)
    with contextlib.closing(RequestLog(path, forget="failed")) as journal:
        assert len(journal.get("a")) == 1 and journal.tokens_in == 3
    path.write_bytes(whole.replace(b'"key": "a", "answer"', b'"key", "a" "answer"'))
    with pytest.raises(UserError, match="line 2: is not a JSON object; remove that line"):
        RequestLog(path)
    path.write_bytes(b'{"other": 1}\n')
    with pytest.raises(UserError, match="is not a refine log of format 1"):
        RequestLog(path)
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        RequestLog(tmp_path)


# ---- the tool ----------------------------------------------------------------------------------


def command(monkeypatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "refine", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    runpy.run_path(str(TOOL))["main"]()


def test_from_the_command_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    server.script = lambda draft, nth: (
        f"Better: {draft}" if draft != "b" else {"text": "", "finish": "length"}
    )
    source = write(tmp_path / "in.jsonl", [example("q", "a"), "{", example("q", "b"), example("q", "c")])
    monkeypatch.setenv("MINE", KEY)
    (tmp_path / "p.yaml").write_text("system: write well\n")
    command(
        monkeypatch,
        "--input",
        source,
        "--output",
        tmp_path / "out.jsonl",
        "--base-url",
        server.url + "/",
        "--model",
        "org/m",
        "--key-env",
        "MINE",
        "--price-in",
        1,
        "--price-out",
        2.5,
        "--prompts",
        tmp_path / "p.yaml",
        "--domain",
        "math",
        "--examples",
        2,
        "--temperature",
        0.5,
        "--max-tokens",
        "2K",
        "--timeout",
        9,
        "--retries",
        1,
        "--concurrency",
        2,
        "--turns",
        "all",
        "--attempts",
        1,
        "--budget",
        5,
    )
    printed = capsys.readouterr()
    assert re.search(
        r"out.jsonl: 1 of 2 conversations refined; original answers kept: 1 truncated; 1 broken lines left out; "
        r"200 prompt and 20 completion tokens, 0.00 USD\nbroken: .*in.jsonl, line 2: not JSON",
        printed.out,
    )
    assert (
        "refining" in printed.err
        and "tokens_in 200" in printed.err
        and "rejected 1" in printed.err
        and KEY not in printed.err + printed.out
    )
    body = server.bodies[0]
    assert (
        body["messages"][0] == {"role": "system", "content": "write well"}
        and body["temperature"] == 0.5
        and body["max_tokens"] == 2048
    )
    assert json.loads((tmp_path / "out.json").read_text())["settings"] == {
        "model": "org/m",
        "base_url": server.url,
        "key_env": "MINE",
        "concurrency": 2,
        "timeout": 9.0,
        "retries": 1,
        "attempts": 1,
        "max_tokens": 2048,
        "temperature": 0.5,
        "domain": "math",
        "turns": "all",
        "price_in": 1.0,
        "price_out": 2.5,
        "limit": 2,
        "budget": 5.0,
        "retry_failed": False,
        "backoff": 1.0,
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["--concurrency", 0], "--concurrency 0: must be at least 1"),
        (["--timeout", "nan"], "--timeout nan: must be more than 0"),
        (["--budget", 3], "--budget requires --price-in and --price-out"),
        (["--price-in", 3], "--price-in and --price-out: give both or neither"),
        (["--output", "out.json"], "--output out.json: the name must end in .jsonl"),
        (["--input", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["--output", "in.jsonl"], "--input in.jsonl: would be replaced by --output in.jsonl"),
        (["--input", "a.txt"], "a.txt: unknown kind of file"),
        (["--base-url", "localhost:8000"], "--base-url: expected something like http"),
        (["--base-url", "http://[::1"], "--base-url: expected something like http"),
        (["--base-url", "http://h:99999/v1"], "--base-url: expected"),
        (["--base-url", "http://me:pass@host/v1"], "--base-url: give scheme, host, port and path only"),
        (["--output", "/dev/null/x.jsonl"], "cannot be written"),
        (["--input", "empty2.jsonl", "--examples", "1"], None),
        (["--prompts", "none.yaml"], "--prompts none.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(server, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), [example("q", "a")])
    Path("a.txt").write_text("text")
    write(Path("empty.jsonl"), ["{}"])
    write(Path("empty2.jsonl"), ["{}"])
    before = sorted(tmp_path.rglob("*"))
    first = ["--input", "empty.jsonl"] if message is None else ["--input", "in.jsonl"]
    with pytest.raises(UserError) as error:
        command(
            monkeypatch, *first, "--output", "out.jsonl", "--model", "m", "--base-url", server.url, *words
        )
    wanted = (
        message
        or "no conversation in empty.jsonl and 1 more, 2 broken lines; the first: empty.jsonl, line 1: "
        "no known columns among none"
    )
    assert wanted in str(error.value) and "\n" not in str(error.value) and "pass@" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before and not server.asked
