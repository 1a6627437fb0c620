"""The tokenizer and chat template of an export of the demo's model, in each client's own environment (`make
test-clients`): the same ids and text in all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf.assets import write_assets
from tests.clients.test_rope_clients import CLIENTS, ENVIRONMENTS, HERE, installed

BASE = HERE.parents[1] / "examples" / "demo" / "base"
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
)
REQUESTS = {
    "texts": [
        "Anna is in Rome. 1234 <extra> <|end_of_text|>",
        " two  spaces\n\nand lines",
        "zürich 東京",
        "",
    ],
    "chats": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <extra>"}]],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An export of the demo's model, to which transformers 5 has added a special token."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("out")
    shutil.copytree(BASE, base, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    assert json.loads((base / "tokenizer_config.json").read_text())["extra_special_tokens"] == ["<extra>"]
    read = hf_config.read_config(base)
    config = hf_config.export_config(read.model, read.rope, read.max_position, torch.float32, read.raw)
    write_assets(out, base, config, {})
    return out


@pytest.mark.parametrize("client", [name for name in CLIENTS if name != "vllm"])
def test_tokenizer_and_template(client, exported, tmp_path):
    if not installed(client):
        pytest.skip(f"{client} is not installed, see {ENVIRONMENTS.name}/{client}/log")
    python = sys.executable if client == "transformers" else ENVIRONMENTS / client / "bin" / "python"
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(REQUESTS))
    command = [python, HERE / "probe_tokenizer.py", exported, requests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].split("+")[0] == CLIENTS[client]

    from tokenizers import Tokenizer

    backend, results = Tokenizer.from_file(str(exported / "tokenizer.json")), found["results"]
    assert results["ids"] == [backend.encode(text).ids for text in REQUESTS["texts"]]
    assert results["decoded"] == REQUESTS["texts"]
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    assert results["chats"] == [f"{bos}user: Hi{eos}{bos}assistant: Hello <extra>{eos}"]
    assert results["special"] == [backend.token_to_id(token) for token in (bos, eos, "<extra>")]
