"""What writes the answers: prompts, ends, options; an endpoint that times out, is busy and breaks, from a
real server."""

from __future__ import annotations

import json
import re
import runpy
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Model, Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check, model_files
from megatron_ultralong.evaluate.backends import protocol as backends
from megatron_ultralong.evaluate.backends.model_files import position_limit
from megatron_ultralong.evaluate.backends.openai_endpoint import EndpointSettings, OpenAIEndpoint
from megatron_ultralong.evaluate.backends.parallel_model import ParallelModel
from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.evaluate.prompts import encode
from megatron_ultralong.evaluate.prompts.encode import PromptEncoder
from tests import server as servers
from tests.text import save_tokenizer

KEY = "sk-secret-4711"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant] "
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = servers.Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "llama3", chat_template=CHAT)


def endpoint(
    server: servers.Server,
    folder: Path,
    sampling: Sampling = Sampling(),  # noqa: B008
    **more: Any,
) -> OpenAIEndpoint:
    return OpenAIEndpoint(
        EndpointSettings(
            **{"base_url": server.url, "model": "m", "retries": 2, "backoff": 0.01, "timeout": 5, **more}
        ),
        folder,
        sampling=sampling,
    )


def ask(backend: Any, *texts: str, **more: Any) -> dict[str, Completion]:
    requests = [GenerationRequest(id=text, text=text, max_tokens=7, **more) for text in texts]
    return {requests[i].id: one for i, one in backend.generate(requests)}


# ---- an endpoint -------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again_and_the_rest_is_kept(server, folder):
    """429, 500, a timeout and a broken connection, twice each; then one that never answers among those that
    do."""
    trouble = {
        "busy": {"status": 429, "headers": {"Retry-After": "0.05"}, "raw": "{}"},
        "broken": {"status": 500, "raw": "{}"},
        "late": {"sleep": 1.6},
        "gone": {"hang_up": True},
    }
    server.script = lambda text, nth: trouble[text] if text in trouble and nth < 2 else f" {text}! "
    found = ask(endpoint(server, folder, timeout=1.2), "fine", *trouble)
    assert {name: one.text for name, one in found.items()} == {
        name: f"{name}!" for name in ("fine", *trouble)
    }
    assert found["fine"] == Completion(text="fine!", tokens_in=100, tokens_out=10, finish="stop")
    assert {name: server.asked[name] for name in trouble} == dict.fromkeys(trouble, 3)

    server.script = lambda text, nth: (
        {"status": 503, "raw": "{}"} if text == "down" else {"text": text, "finish": "length"}
    )
    got: list[str] = []
    with pytest.raises(
        UserError,
        match=r"1 of 3 requests got no answer from http.*, the last because of HTTP 503 .*run the same command again",
    ) as error:
        for _, one in endpoint(server, folder).generate(
            [GenerationRequest(id=name, text=name, max_tokens=7) for name in ("a", "down", "b")]
        ):
            got.append(one.text)
            assert one.finish == "length"
    assert sorted(got) == ["a", "b"] and server.asked["down"] == 3 and KEY not in str(error.value)


def test_what_a_server_will_not_take_is_an_answer(server, folder):
    too_long = {
        "status": 400,
        "raw": json.dumps(
            {"error": {"message": "maximum context length is 8", "code": "context_length_exceeded"}}
        ),
    }
    script = {
        "long": too_long,
        "bad": {"text": None, "refusal": "no"},
        "filtered": {"text": "It is", "finish": "content_filter"},
    }
    server.script = lambda text, nth: script.get(text, "yes")
    found = ask(endpoint(server, folder), *script, "good")
    assert {name: one.answered for name, one in found.items()} == {
        **dict.fromkeys(script, False),
        "good": True,
    }
    assert found["filtered"].finish == "content_filter" and found["filtered"].text == "", (
        "what is left of it is no answer"
    )
    assert (
        found["long"].finish.startswith("HTTP 400: ")
        and "maximum context length" in found["long"].finish
        and found["long"].text == ""
    )
    assert found["bad"].finish == "refused" and found["good"].finish == "stop"
    # Words of a server's own for an end are an end; what says that there is no answer leaves none.
    for finish, want in (
        ("eos_token", ("stop", "x")),
        ("end_turn", ("stop", "x")),
        ("max_tokens", ("length", "x")),
        ("length", ("length", "x")),
        ("content_filter", ("content_filter", "")),
        ("abort", ("abort", "")),
    ):
        server.script = lambda text, nth, finish=finish: {"text": "x", "finish": finish}
        one = ask(endpoint(server, folder), f"ends by {finish}")[f"ends by {finish}"]
        assert (one.finish, one.text) == want
    # What no request will get ends the run; answers on their way are kept, and no more are asked.
    server.script = lambda text, nth: (
        {"status": 404, "raw": "{}"} if text == "x" else {"text": text, "sleep": 0.3}
    )
    got = []
    with pytest.raises(UserError, match="no model 'm'"):
        for _, one in endpoint(server, folder, concurrency=2).generate(
            [GenerationRequest(id=t, text=t, max_tokens=7) for t in ("y", "x", "z")]
        ):
            got.append(one.text)
    assert got == ["y"] and "z" not in server.asked


def test_a_server_that_comes_back_on_another_port_is_the_same_model(server, folder):
    here, there = endpoint(server, folder), endpoint(server, folder, base_url="http://127.0.0.1:1/v1")
    assert (
        backends.identity(here) == backends.identity(there)
        and here.describe()["base_url"] == server.url != there.describe()["base_url"]
    )


def test_answers_come_as_they_are_there_some_at_a_time(server, folder):
    server.script = lambda text, nth: {"text": text, "sleep": 1 if text == "slow" else 0}
    order = list(ask(endpoint(server, folder, concurrency=2), "slow", "1", "2", "3"))
    assert order == ["1", "2", "3", "slow"] and server.most == 2
    # Nothing is left running where the caller stops.
    server.script = lambda text, nth: {"text": text, "sleep": 5 if text == "slow" else 0}
    began = time.monotonic()
    for _ in endpoint(server, folder, concurrency=2).generate(
        [GenerationRequest(id=t, text=t, max_tokens=7) for t in ("a", "slow", "b")]
    ):
        break
    assert time.monotonic() - began < 3 and threading.active_count() < 20


def test_what_is_sent(server, folder):
    request = {"prefix": "The answer is", "stop": ("\n\n",)}
    ask(endpoint(server, folder), "Why?", **request)
    assert server.bodies[-1] == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.0,
        "stop": ["\n\n"],
        "messages": [{"role": "user", "content": "Why?\nThe answer is"}],
    }
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=4)
    ask(endpoint(server, folder, sampling, prefill="assistant"), "Why?", **request)
    body = server.bodies[-1]
    assert body["messages"] == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "The answer is"},
    ]
    assert {
        name: body[name]
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "continue_final_message",
            "add_generation_prompt",
        )
    } == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 4,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }

    server.script = lambda text, nth: {"text": " 42 "}
    backend = endpoint(server, folder, api="completions")
    assert ask(backend, "Why?", **request)["Why?"].text == " 42 ", "white space is the model's"
    sent = server.bodies[-1]["prompt"]
    assert backend.tokenizer.decode(
        sent
    ) == "<|begin|>[user] Why?[assistant] The answer is" and server.bodies[-1]["stop"] == ["\n\n"]
    ask(backend, "unused", ids=[5, 6, 7])
    assert server.bodies[-1]["prompt"] == [5, 6, 7]
    asked = len(server.bodies)
    with pytest.raises(UserError, match="use --api completions"):  # no empty message is sent in its place
        list(endpoint(server, folder).generate([GenerationRequest(id="x", ids=[5, 6, 7], max_tokens=7)]))
    assert len(server.bodies) == asked


def test_a_chat_template_is_rendered_once_and_only_for_messages(server, folder, monkeypatch):
    rendered = []

    def render(tokenizer, messages, **more):
        rendered.append(messages)
        return f"[user] {messages[0]['content']}"

    monkeypatch.setattr(encode, "render_chat", render)
    server.script = lambda text, nth: "yes"
    backend = endpoint(server, folder, api="completions")
    ask(backend, "a", "b", ids=[5, 6, 7])
    assert not rendered
    ask(backend, "a", "b")
    ask(backend, "c")
    assert len(rendered) == 1

    model = object.__new__(ParallelModel)  # without weights and ranks
    model.tokenizer, model.end_tokens = backend.tokenizer, frozenset()
    model._encoder = partial(pytest.fail, "made")
    monkeypatch.setattr(model, "_together", lambda name, prompts, *_: prompts)
    assert ask(model, "a", ids=[5, 6, 7])["a"].tokens_in == 3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"base_url": "localhost"}, "--base-url: expected something like"),
        ({"concurrency": 0}, "--concurrency 0: must be at least 1"),
        ({"timeout": 0}, "--timeout 0: must be more than 0"),
        ({"retries": -1}, "--retries -1"),
        ({"base_url": "https://api.openai.com/v1"}, "X is not set"),
    ],
)
def test_settings_of_an_endpoint(change, words):
    with pytest.raises(UserError, match=words):
        EndpointSettings(**{"base_url": "http://h/v1", "model": "m", "key_env": "X", **change})


# ---- prompts and ends --------------------------------------------------------------------------


def test_prompts_and_completions(folder):
    tokenizer = model_files.load_tokenizer(folder)
    request = GenerationRequest(id="x", text="the sky", prefix=" is", max_tokens=3)
    for chat, text in (
        ("yes", "<|begin|>[user] the sky[assistant]  is"),
        ("auto", "<|begin|>[user] the sky[assistant]  is"),
        ("no", "the sky is"),
    ):
        assert tokenizer.decode(backends.prompt_ids(partial(PromptEncoder, tokenizer, chat), request)) == text
    # With ids no encoder is made, as its template may be refused.
    assert backends.prompt_ids(lambda: pytest.fail("made"), replace(request, ids=[3, 4])) == [3, 4]
    written = tokenizer.encode("blue and grey\nthe", add_special_tokens=False)
    end = frozenset([tokenizer.eos_token_id])
    for stop, ended, text, finish in (
        ((), [], "blue and grey\nthe", "length"),
        ((), [*end], "blue and grey\nthe", "stop"),
        (("the", "\n"), [], "blue and grey", "stop"),
        (("rings",), [], "blue and grey\nthe", "length"),
    ):
        one = backends.completion(
            tokenizer, [1, 2], [*written, *ended], GenerationRequest(id="x", max_tokens=9, stop=stop), end
        )
        assert one == Completion(text=text, tokens_in=2, tokens_out=len(written) + len(ended), finish=finish)


def test_end_tokens(tmp_path, folder):
    tokenizer = model_files.load_tokenizer(folder)
    assert model_files.end_tokens(tmp_path, tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert model_files.end_tokens(tmp_path, tokenizer) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert model_files.end_tokens(tmp_path, tokenizer) == {128001, 128008, 128009}


def test_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0 - 1e-4, -5.0])

    def drawn(**settings: Any) -> list[float]:
        sampling = Sampling(temperature=1.0, **settings)
        generator = sampling.generator([1, 2, 3])
        found = torch.tensor([sampling.choose(logits, generator) for _ in range(4000)])
        return (torch.bincount(found, minlength=5) / 4000).tolist()

    assert drawn() == pytest.approx(torch.softmax(logits, 0).tolist(), abs=0.03)
    assert drawn(top_k=2) == pytest.approx([0, 0.5, 0, 0.5, 0], abs=0.03)
    assert drawn(top_p=0.5) == pytest.approx([0, 0.5, 0, 0.5, 0], abs=0.03), (
        "the token that reaches top_p counts"
    )
    assert drawn(top_p=1e-9) == [0, 1, 0, 0, 0] and drawn(top_k=1, seed=3) == [0, 1, 0, 0, 0]
    assert Sampling().choose(logits, Sampling().generator([])) == 1
    same = [
        float(torch.rand(1, generator=Sampling(temperature=2.0, seed=s).generator(p)))
        for s, p in ((0, [1]), (0, (1,)), (1, [1]), (0, [2]))
    ]
    assert same[0] == same[1] and len(set(same)) == 3, "seed and prompt both count"
    for wrong, words in (
        ({"temperature": -1}, "--temperature"),
        ({"top_p": 0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
    ):
        with pytest.raises(UserError, match=words):
            Sampling(**wrong)


def test_fingerprint_sees_a_change_in_the_middle_and_of_what_else_decides_answers(tmp_path):
    whole = bytearray(4 << 20)
    (tmp_path / "model.safetensors").write_bytes(whole)
    seen = {model_files.fingerprint(tmp_path)}
    whole[1 << 20 : 2 << 20] = b"\1" * (1 << 20)
    (tmp_path / "model.safetensors").write_bytes(whole)
    seen.add(model_files.fingerprint(tmp_path))
    for name in ("generation_config.json", "tokenizer.json", "hf/chat_template.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        seen.add(model_files.fingerprint(tmp_path))
    assert len(seen) == 5
    (tmp_path / "niah.json").write_text("{}")  # results that a user keeps there
    assert model_files.fingerprint(tmp_path) in seen


def test_fingerprint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(200000))
    first = model_files.fingerprint(tmp_path)
    assert first == model_files.fingerprint(tmp_path) and len(first) == 12
    (tmp_path / "model.safetensors").write_bytes(bytes(199999) + b"x")
    assert model_files.fingerprint(tmp_path) != first


# ---- memory ------------------------------------------------------------------------------------

EIGHT_B = Model(
    hidden_size=4096, ffn_size=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab_size=128256
)


def test_bytes_of_llama_8b():
    million, gib = 2**20, 2**30
    assert memory_check.kept_bytes(EIGHT_B, Parallel(), million, 2) == 128 * gib, "all of it on one rank"
    assert memory_check.kept_bytes(EIGHT_B, Parallel(tp=4, pp=2), million // 4, 2) == 4 * gib
    assert memory_check.weight_bytes(EIGHT_B, Parallel(), 2) == 2 * 8_030_261_248
    # The last stage: 16 layers, of which only the norms (2 x 4096) are whole, half an output layer and the
    # last norm.
    layer = (218_112_000 - 8192) // 2 + 8192
    assert memory_check.weight_bytes(EIGHT_B, Parallel(tp=2, pp=2), 2) == 2 * (
        16 * layer + 128256 // 2 * 4096 + 4096
    )


def test_a_plan_that_does_not_fit_says_what_would(monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 80 * 2**30)
    check = {"device": torch.device("cpu"), "chunk": 16384, "itemsize": 2}
    memory_check.check_plan(EIGHT_B, Parallel(tp=2, cp=2), tokens=2**20, **check)
    with pytest.raises(
        UserError,
        match=r"^a rank needs 1\d\d GiB \(15 for weights, 128 for keys and values of 1,048,576 tokens\) but has 76 GiB at "
        r"--tp 1 --pp 1 --cp 1; --cp 4 or --tp 2 on correspondingly more ranks would fit$",
    ):
        memory_check.check_plan(EIGHT_B, Parallel(), tokens=2**20, **check)
    with pytest.raises(
        UserError, match=r"needs 131,\d\d\d GiB \(15 for weights, 131,072 for keys and values"
    ):
        memory_check.check_plan(EIGHT_B, Parallel(), tokens=2**30, **check)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 2**30)
    with pytest.raises(UserError, match="use a larger --tp or --pp, or fewer tokens at a time"):
        memory_check.check_plan(EIGHT_B, Parallel(), tokens=2**20, **check)


# ---- the command -------------------------------------------------------------------------------


def command(monkeypatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "niah", *map(str, words)])
    runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]()


def test_niah_of_an_endpoint(server, folder, tmp_path, monkeypatch):
    """Over chat messages and over tokens; what was answered before a failure is not asked for again."""

    def answer(text: str, nth: int) -> Any:
        name = re.findall(r"What is the pass key of (\w+)\?", text)[-1]
        value = re.findall(rf"of {name} is (\d+)", text)[0]
        if refused:
            return {"text": None, "refusal": "no"}
        return {"status": 503, "raw": "{}"} if broken and len(server.asked) > 3 else f"It is {value}."

    server.script, broken, refused = answer, True, False
    words = [
        "--base-url",
        server.url,
        "--model",
        "org/m",
        "--tokenizer",
        folder,
        "--lengths",
        "500",
        "--depths",
        "0,100",
        "--samples",
        "3",
        "--output",
        tmp_path,
        "--retries",
        0,
        "--concurrency",
        1,
    ]
    with pytest.raises(UserError, match="3 of 6 requests got no answer"):
        command(monkeypatch, *words)
    broken, refused = False, True
    command(monkeypatch, *words)
    result = json.loads((tmp_path / "niah.json").read_text())
    assert (
        [one["refused"] for one in result["scores"]] == [3]
        and [cell["refused"] for cell in result["extra"]["cells"]] == [0, 3]
        and result["extra"]["accuracy"] == 0.5
    )
    assert [trial.get("refused") for trial in result["extra"]["trials"]] == [None] * 3 + ["refused"] * 3
    refused = False
    command(monkeypatch, *words)
    result = json.loads((tmp_path / "niah.json").read_text())
    assert (
        result["extra"]["accuracy"] == 1.0
        and result["model"]["path"] == "org/m"
        and result["model"]["lengths_by"] == "llama3"
    )
    assert (
        result["scores"][0]["refused"] == 0
        and sorted(server.asked.values()) == [1, 1, 1, 3, 3, 3]
        and (tmp_path / "niah.png").exists()
    )
    [message] = server.bodies[-1]["messages"]
    assert message["content"].startswith("Some pass keys are hidden") and re.search(
        r"\?\nThe pass key of \w+ is$", message["content"]
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --model DIR, or --load CKPT"),
        (["--model", "a", "--load", "b"], "give --model or --load, not both"),
        (["--load", "b", "--engine", "hf"], "--load requires --engine megatron"),
        (["--model", "a", "--engine", "hf", "--cp", "2"], "--cp requires --engine"),
        (
            ["--model", "a", "--engine", "hf", "--base-url", "http://h/v1"],
            "--base-url requires --engine endpoint",
        ),
        (["--model", "a", "--engine", "endpoint"], "needs --base-url URL"),
        (["--model", "a", "--base-url", "http://h/v1"], "needs --tokenizer DIR"),
        (["--model", "a", "--cp", "2"], "--model a: no such directory"),
        (["--load", "none"], "contains no complete checkpoint"),
        (["--model", "a", "--tp", "1", "--read-chunk", "0"], "--read-chunk must be at least 1"),
        (["--model", "a", "--temperature", "-1"], "--temperature -1"),
        (
            ["--model", "a", "--base-url", "http://h/v1", "--tokenizer", "none"],
            "--tokenizer none: transformers cannot load its tokenizer",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=message) as error:
        command(monkeypatch, *words, "--lengths", "100", "--output", tmp_path)
    assert "\n" not in str(error.value)


def test_ranks_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for words, message in (
        (["--engine", "hf"], "--engine hf runs in one process; start it without torchrun"),
        (["--tp", "3"], "--tp 3 x --pp 1 x --cp 1 needs 3 ranks, but 4 were started"),
        (["--tp", "2", "--cp", "4"], "--tp 2 x --pp 1 x --cp 4 needs 8 ranks"),
        (["--pp", "0"], "parallel.pp=0 must be at least 1"),
        (["--pp", "2", "--dtype", "fp16"], "--dtype fp16"),
        (["--pp", "2", "--device", "cuda:1"], "each rank uses its own"),
    ):
        with pytest.raises(UserError, match=message):
            command(
                monkeypatch,
                "--model",
                ROOT / "examples" / "demo" / "base",
                *words,
                "--lengths",
                "100",
                "--output",
                tmp_path,
            )


def test_position_limit():
    assert position_limit({}) is None and position_limit({"max_position_embeddings": 512}) == 512
    for block in ({"rope_scaling": {"type": "dynamic"}}, {"rope_parameters": {"rope_type": "dynamic"}}):
        assert position_limit({"max_position_embeddings": 512, **block}) is None
