"""The tokenizer and chat template of an export of the demo's model, in each client's own environment (`make
test-clients`): the same ids and text in all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf.assets import write_assets
from tests.clients.environments import CLIENTS, ROOT, probe

BASE = ROOT / "examples" / "demo" / "base"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


CONVERSATIONS = [
    conversation("Hi", "Hello"),
    conversation("What is the pass key of Anna?", "12345", "And of Hans?", "67890", "Both?"),
    conversation("Who?", "Me.", system="You are terse."),
    conversation("  spaces around  ", "\n\nlines around\n"),
    conversation("zürich 東京 \U0001f600", "é"),
    conversation("a\nb\n\nc\t d", "one\r\ntwo"),
    conversation("", ""),
    conversation("x" * 300, "y " * 200),
    conversation("{{ messages }} {% if %} </s> [INST]", '"quoted" \\ and {braces}'),
    conversation("0", "1", "2", "3", "4", "5", "6", "7", system=""),
]
REQUESTS = {
    "texts": [
        "Anna is in Rome. 1234 <extra> <|end_of_text|>",
        " two  spaces\n\nand lines",
        "zürich 東京",
        "",
    ],
    "chats": [*CONVERSATIONS, conversation("Hi", "Hello <extra>")],
}


def rendered(chat: list[dict[str, str]]) -> str:
    """What TEMPLATE makes of a conversation."""
    return "".join(f"{BOS}{turn['role']}\n{turn['content']}{EOS}" for turn in chat)


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


@pytest.mark.parametrize("client", [name for name in CLIENTS if name.startswith("transformers")])
def test_tokenizer_and_template(client, exported, tmp_path):
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(REQUESTS))
    results = probe(client, "probe_tokenizer.py", exported, requests)

    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert results["ids"] == [backend.encode(text).ids for text in REQUESTS["texts"]]
    assert results["decoded"] == REQUESTS["texts"]
    assert results["chats"] == [rendered(chat) for chat in REQUESTS["chats"]]
    assert results["special"] == [backend.token_to_id(token) for token in (BOS, EOS, "<extra>")]
