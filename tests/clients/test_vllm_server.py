"""An export served by vLLM on this machine: its limit, its chat template, and the answers of `evaluate.py`
as with plain transformers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import processes
from tests.clients.environments import ROOT, require
from tests.clients.test_tokenizer_clients import CONVERSATIONS, TEMPLATE, rendered

BASE = ROOT / "examples" / "demo" / "base"
LENGTH = 1024
NAME = "extended"


def tool(name: str, *arguments: object) -> str:
    done = processes.run([sys.executable, ROOT / "tools" / name, *arguments], capture_output=True)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The demo's model with a chat template, after a few iterations at twice its length."""
    require("vllm")
    folder = tmp_path_factory.mktemp("exported")
    base = folder / "base"
    shutil.copytree(BASE, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    corpus = [
        sys.executable,
        ROOT / "examples/demo/corpus.py",
        "documents",
        "--tokenizer",
        base,
        "--length",
        str(LENGTH),
    ]
    processes.run([*corpus, "--rows", "16", "--output", folder / "text.jsonl"], check=True)
    tool(
        "prepare_data.py", "pretrain", "--input", folder / "text.jsonl", "--tokenizer", base,
        "--seq-length", LENGTH, "--separator-token", "eos", "--output", folder / "rows",
    )  # fmt: skip
    tool(
        "train.py", "--recipe", "tiny_extend", "--load-hf", base, "--data", folder / "rows", "--save", folder / "train",
        "--set", "runtime.device=cpu", f"train.seq_length={LENGTH}", "rope.factor=2", "rope.type=yarn",
        "train.iterations=4", "train.warmup=0", "train.global_batch=2", "parallel.cp=1",
    )  # fmt: skip
    tool("convert_hf.py", "export", "--load", folder / "train", "--output", folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def server(exported) -> Iterator[str]:
    """The URL of vLLM's own server, started with nothing but the directory and the settings of a CPU."""
    python = require("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = exported.parent / "server.log"
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        exported,
        "--served-model-name",
        NAME,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=os.environ | settings,
            start_new_session=True,
            cwd=exported.parent,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline and not answers(f"{url}/health"):
            time.sleep(1)
        assert answers(f"{url}/health"), log.read_text()[-3000:]
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine too
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_limit_is_that_of_the_export(exported, server):
    (model,) = get(f"{server}/v1/models")["data"]
    assert (
        model["max_model_len"]
        == json.loads((exported / "config.json").read_text())["max_position_embeddings"]
    )
    assert model["max_model_len"] == LENGTH


def test_chat_template(exported, server):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for conversation in CONVERSATIONS:
        body = {"model": NAME, "messages": conversation, "add_generation_prompt": False}
        served = get(f"{server}/tokenize", body)["tokens"]
        assert served == tokenizer(rendered(conversation), add_special_tokens=False)["input_ids"], (
            conversation
        )


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_answers_equal_transformers(exported, server, api, tmp_path):
    """Greedy answers to the passkey grid and to a RULER task, word for word (an answer in a chat without the
    spaces around it)."""
    chat = ("--chat", "yes" if api == "chat" else "no")
    ours = ("--model", exported, "--device", "cpu", *chat)
    served = ("--model", NAME, "--tokenizer", exported, "--base-url", f"{server}/v1", "--api", api, *chat)
    if api == "chat":
        served += ("--prefill", "assistant")
    niah = ("niah", "--lengths", f"512,{LENGTH}", "--depths", "0,50,100", "--samples", "3")
    ruler = ("ruler", "--tasks", "niah_single_1", "--lengths", f"{LENGTH}", "--samples", "6")
    texts: dict[str, dict[str, list[str]]] = {}
    for engine, model in (("transformers", ours), ("vllm", served)):
        for task, arguments in (("niah", niah), ("ruler", ruler)):
            out = tmp_path / engine / task
            tool("evaluate.py", *arguments, *model, "--output", out)
            result = json.loads((out / f"{task}.json").read_text())
            if task == "niah":
                found = [trial["prediction"] for trial in result["extra"]["trials"]]
            else:
                lines = (out / "predictions" / "niah_single_1" / f"{LENGTH}.jsonl").read_text().splitlines()
                found = [json.loads(line)["pred"] for line in lines]
            texts.setdefault(task, {})[engine] = [text.strip() if api == "chat" else text for text in found]
    for task, found in texts.items():
        assert found["vllm"] == found["transformers"], task
        assert len(set(found["vllm"])) > 1
