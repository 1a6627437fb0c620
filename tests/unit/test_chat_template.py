"""Chat templates: the same tokens as transformers' apply_chat_template, trained on answers and the tokens
that end them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
from transformers import AutoTokenizer

from megatron_ultralong.data.sft import chat_template, tokenise_chat
from megatron_ultralong.data.special_tokens import MixedEncoder, load_backend
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.errors import UserError
from tests import chat as made
from tests.chat import TALKS, by_transformers, encoded, plain, same_as_transformers, talk, trained_by_growing


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "llama": made.save_tokenizer(folder / "llama"),
        "chatml": made.save_tokenizer(folder / "chatml", made.CHATML, made.CHATML_TOKENS),
        "marked": made.save_tokenizer(folder / "marked", made.CHATML_MARKED, made.CHATML_TOKENS),
    }


# ---- Llama-3.1 ---------------------------------------------------------------------------------


def test_segments_of_llama31():
    rendered = chat_template.render_llama31(talk(" q ", " a\n", "r", "b", system=" s "), date="01 Jan 2025")
    assert rendered.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 01 Jan 2025\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    )
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["a<|eot_id|>", "b<|eot_id|>"]


@pytest.mark.parametrize("date", [chat_template.DATE, "01 Jan 2025"])
def test_llama31_is_what_transformers_gives(folders, date):
    same_as_transformers(folders["llama"], date)


# ---- the tokenizer's own template --------------------------------------------------------------


@pytest.mark.parametrize("name, way", [("chatml", "prefix"), ("marked", "generation")])
def test_the_tokenizers_own_template(folders, name, way):
    template = chat_template.select_template(folders[name])
    assert (template.name, template.spans) == ("tokenizer", way)
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    reference = AutoTokenizer.from_pretrained(
        folders["chatml"]
    )  # the same text, and a prompt to generate after
    for messages in TALKS:
        ids, trained = encoded(folders[name], template, messages)
        assert ids == by_transformers(tokenizer, messages)
        mask = (
            tokenizer.apply_chat_template(
                plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )["assistant_masks"]
            if way == "generation"
            else None
        )
        if not any(
            m.content[0] in "\n" for m in messages if m.role == "assistant"
        ):  # there "\n" of header and content are one token
            assert trained == trained_by_growing(
                reference, messages, tokenizer.convert_tokens_to_ids("<|im_end|>")
            )
            assert mask in (None, trained)
        for content in (m.content for m in messages if m.role == "assistant"):
            assert content in tokenizer.decode([i for i, on in zip(ids, trained) if on])


def test_a_template_that_changes_earlier_turns(tmp_path):
    folder = made.save_tokenizer(tmp_path / "thinking", made.THINKING, made.CHATML_TOKENS)
    with pytest.raises(
        UserError,
        match="cannot be trained on turn by turn: the chat template changes earlier turns as the conversation",
    ):
        chat_template.select_template(folder)
    template = chat_template.select_template(
        made.save_tokenizer(tmp_path / "stripping", made.STRIPPING, made.CHATML_TOKENS)
    )
    assert template.render(talk("q", "<think>x</think>a"))
    with pytest.raises(
        chat_template.NotRendered, match="changes earlier turns as the conversation continues"
    ):
        template.render(talk("q", "<think>x</think>a", "r", "b"))


def test_a_template_without_a_token_at_the_end_of_turns(tmp_path):
    text = "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') ~ m.content ~ '\n' }}{% endfor %}"  # nor a prompt
    rendered = chat_template.select_template(
        made.save_tokenizer(tmp_path / "plain", text, made.CHATML_TOKENS)
    ).render(talk("q", "a", "r", "Q"))
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["a\n", "Q\n"]


def test_a_template_that_refuses(tmp_path):
    text = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + made.CHATML
    )
    template = chat_template.select_template(
        made.save_tokenizer(tmp_path / "picky", text, made.CHATML_TOKENS)
    )
    with pytest.raises(chat_template.NotRendered, match="refuses it: no system here"):
        template.render(talk("q", "a", system="s"))


@pytest.mark.parametrize("name", ["llama", "chatml", "marked"])
def test_contents_that_spell_special_tokens(folders, name):
    """They are the characters that they are: with control tokens put out of sight, the tokens are those of
    the same contents with an unknown token."""
    begin, end = ("<|start_header_id|>", "<|eot_id|>") if name == "llama" else ("<|im_start|>", "<|im_end|>")
    folder, template = folders[name], chat_template.select_template(folders[name])
    tokenizer = load_tokenizer(folder)
    control = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    messages = talk(
        f"What is {end}?",
        f"{end} ends a turn{end}",
        f"{begin}{end}",
        f"{begin}user {end}{end}",
        system=f"{end}: x",
    )
    rendered = template.render(messages)
    assert len(rendered.as_text) == 9
    assert all(rendered.text[b:e] in (begin, end) for b, e in rendered.as_text)
    assert [rendered.text[b:e] for b, e in rendered.spans] == [
        f"{message.content}{end}" for message in messages if message.role == "assistant"
    ]
    ids, trained = encoded(folder, template, messages)
    plain_ids, plain_trained = encoded(folder, template, talk("a", "b", "c", "d", system="e"))
    assert [i for i in ids if i in control] == [i for i in plain_ids if i in control]
    assert [i for i, on in zip(ids, trained) if on and i in control] == [tokenizer.ids(end)[0]] * 2
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == rendered.text
    # Each turn, without its control tokens, as the tokenizer encodes text.
    text = load_backend(tokenizer.backend.to_str(), "text")
    want = list(text.encode(messages[2].content).ids)
    assert [i for i, on in zip(ids, trained) if on][: len(want)] == want
    messages[2] = dataclasses.replace(messages[2], trained=False)
    some, some_trained = encoded(folder, template, messages)
    assert some == ids and sum(some_trained) < sum(trained) == sum(some_trained) + len(want) + 1


@pytest.mark.parametrize("name", ["llama", "chatml", "marked"])
def test_contents_whose_special_tokens_are_control_tokens(folders, name):
    end = "<|eot_id|>" if name == "llama" else "<|im_end|>"
    template = chat_template.select_template(folders[name], special_tokens="control")
    messages = talk(f"one{end}two", f"three{end}")
    assert template.render(messages).as_text == ()
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids, _ = encoded(folders[name], template, messages)
    assert ids == by_transformers(tokenizer, messages, date_string=chat_template.DATE)


def test_a_noncharacter_beside_a_special_token(folders):
    template = chat_template.select_template(folders["llama"])
    assert template.render(talk("\ufdd0", "a")).as_text == ()
    with pytest.raises(
        chat_template.NotRendered, match=r"user's content has U\+FDD0, which is not a character"
    ):
        template.render(talk("\ufdd0", "<|eot_id|>"))


def test_which_template(tmp_path, folders):
    other = made.save_tokenizer(tmp_path / "other", made.LLAMA.replace("December 2023", "May 2024"))
    assert (
        chat_template.select_template(other).name == "tokenizer"
        and chat_template.select_template(other, "llama3.1").name == "llama3.1"
    )
    own = chat_template.select_template(folders["llama"], "tokenizer", "01 Jan 2025")
    assert own.spans == "prefix"
    for messages in TALKS:
        assert own.render(messages) == chat_template.render_llama31(messages, "01 Jan 2025")
    with pytest.raises(UserError, match=r"has no token <\|begin_of_text\|>; use --template tokenizer"):
        chat_template.select_template(folders["chatml"], "llama3.1")
    bare = made.save_tokenizer(tmp_path / "bare", None)
    assert chat_template.select_template(bare, "llama3.1").name == "llama3.1"
    with pytest.raises(UserError, match=r"has no chat template; .*or --template llama3.1"):
        chat_template.select_template(bare)


# ---- tokens ------------------------------------------------------------------------------------


def test_cut_to_whole_turns():
    trained = numpy.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], numpy.uint8)
    assert [tokenise_chat.tokens_to_keep(trained, most) for most in (3, 4, 9, 10, 11)] == [0, 4, 4, 10, 10]
    assert tokenise_chat.tokens_to_keep(numpy.append(trained, numpy.uint8(0)), 10) == 10


def test_many_batches_keep_their_order(folders, monkeypatch):
    monkeypatch.setattr(tokenise_chat, "BATCH_CHARACTERS", 300)
    template, backend = (
        chat_template.select_template(folders["llama"]),
        load_tokenizer(folders["llama"]).backend,
    )
    texts = [template.render(messages) for messages in TALKS * 3]
    encoded_chats = list(tokenise_chat.encode_chats(iter(texts), backend, workers=1))
    for (ids, trained), (want_ids, want_trained) in zip(
        encoded_chats, tokenise_chat.encode_batch(MixedEncoder(backend), texts), strict=True
    ):
        assert numpy.array_equal(ids, want_ids) and numpy.array_equal(trained, want_trained)


@pytest.mark.parametrize("name", ["llama", "chatml", "marked"])
def test_answers_that_are_context_only_are_not_trained_on(folders, name):
    template = chat_template.select_template(folders[name])
    messages = talk("one", "two", "three", "four", "five", "six")
    whole = template.render(messages)
    messages[3] = dataclasses.replace(messages[3], trained=False)
    some = template.render(messages)
    assert some.text == whole.text and some.spans == (whole.spans[0], whole.spans[2])
