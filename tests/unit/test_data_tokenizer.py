"""A directory's tokenizer is AutoTokenizer's, whether read here or by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import transformers

from megatron_ultralong.data import tokenizer as tokenizer_module
from megatron_ultralong.data.tokenizer import encode_all, load_plain, load_tokenizer
from megatron_ultralong.errors import UserError
from tests import text as made

SAMPLE = made.text(5, 300) + "<|begin|> a<|end|>  <|extra|> <s> <|pad|>\n"


def assert_auto_tokenizer(folder: Path) -> None:
    """Same backend, but for what is put around a text; same special ids; same tokens."""
    found, want = (
        load_tokenizer(folder),
        transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True),
    )
    ours, theirs = (json.loads(backend.to_str()) for backend in (found.backend, want.backend_tokenizer))
    for part in ("truncation", "padding", "post_processor"):
        ours.pop(part), theirs.pop(part)
    assert ours == theirs
    assert found.special == {name: getattr(want, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert (
        found.vocab_size == len(want)
        and found.ids(SAMPLE)
        == want(SAMPLE, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    )


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | values), encoding="utf-8")


@pytest.mark.parametrize("family", made.FAMILIES)
def test_read_here_as_transformers_reads_it(tmp_path, family):
    folder = made.save_tokenizer(tmp_path / "tokenizer", family)
    assert load_plain(folder)
    assert_auto_tokenizer(folder)
    token = {
        "content": "<|begin|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    number = load_tokenizer(folder).special["bos"]
    # As transformers 4 wrote Llama-3.1's: tokens as objects, all added tokens again, a map of special tokens,
    # no pad token.
    change(
        folder,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=token | {"__type": "AddedToken"},
        added_tokens_decoder={str(number): token},
    )
    change(folder, "special_tokens_map.json", bos_token=token, eos_token="<|end|>")
    change(folder, "config.json", model_type="llama")
    assert load_plain(folder)
    assert_auto_tokenizer(folder)


ADDED = {
    "content": "<|extra|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("tokenizer_config.json", {"pad_token": "<|pad|>"}),  # not in tokenizer.json: transformers adds it
        (
            "tokenizer_config.json",
            {"bos_token": "the"},
        ),  # there, but no special token: transformers makes it one
        ("tokenizer_config.json", {"added_tokens_decoder": {"399": ADDED}}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<|extra|>"]}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("special_tokens_map.json", {"pad_token": "<|end|>"}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|extra|>"]}),
        ("added_tokens.json", {"<|extra|>": 400}),
        ("config.json", {"model_type": "mistral"}),
        ("special_tokens_map.json", {"sep_token": "<|extra|>"}),
        ("special_tokens_map.json", {"split_special_tokens": True}),
        (
            "tokenizer.json",
            {
                "padding": {
                    "strategy": "BatchLongest",
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 1,
                    "pad_type_id": 0,
                    "pad_token": "<|end|>",
                }
            },
        ),
    ],
)
def test_what_transformers_might_change_is_left_to_it(tmp_path, name, values):
    folder = made.save_tokenizer(tmp_path / "tokenizer")
    change(folder, name, **values)
    assert load_plain(folder) is None
    assert_auto_tokenizer(folder)


@pytest.mark.parametrize("value", [["<|end|>"], {"content": "<|end|>"}, 3])
def test_what_transformers_does_not_take_is_not_taken(tmp_path, value):
    folder = made.save_tokenizer(tmp_path / "tokenizer")
    change(folder, "tokenizer_config.json", eos_token=value)
    with pytest.raises(UserError, match="cannot be loaded: .*eos_token"):
        load_tokenizer(folder)


def test_the_tokenizer_is_taken_bare(tmp_path):
    """No BOS is put in front, and no truncation or padding that a tokenizer.json carries is done."""
    folder = made.save_tokenizer(tmp_path / "tokenizer", pad_token="<|pad|>")
    tokenizer = load_tokenizer(folder)
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding(length=9)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    again = load_tokenizer(folder)
    assert len(again.ids("the sky is blue")) > 3
    trained = made.tokenizer("llama3").get_vocab_size()
    assert (
        again.vocab_size == max(again.backend.get_vocab().values()) + 1 == trained + 1
    )  # the pad token came on top
    assert again.special == {"bos": 0, "eos": 1, "pad": trained} and again.sha256 != tokenizer.sha256


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be loaded") as error:
        load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(error.value)
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    (tmp_path / "empty" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(UserError, match="empty: cannot be loaded"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("family", made.FAMILIES)
def test_batches_give_the_tokens_of_each_text(tmp_path, monkeypatch, family):
    tokenizer = load_tokenizer(made.save_tokenizer(tmp_path, family))
    monkeypatch.setattr(tokenizer_module, "BATCH", 1800)
    texts = ["", "one", made.text(1, 20), *(made.text(seed, 1500) for seed in range(2, 8)), " ", ""]
    texts += [made.text(1, 300) + run * 4001 for run in ("1234567890", "a", " ", "\n", "=-", "é", "😀")]
    got = list(encode_all(iter(texts), tokenizer.backend))
    assert all(ids.dtype == numpy.int32 for ids in got)
    assert [ids.tolist() for ids in got] == [tokenizer.ids(text) for text in texts]
    assert list(encode_all([], tokenizer.backend)) == []
