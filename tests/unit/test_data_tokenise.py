"""Long documents are encoded in windows: the tokens are those of the whole text, for every family of
tokenizers."""

from __future__ import annotations

import random

import numpy
import pytest

from megatron_ultralong.data.pretrain import tokenise
from megatron_ultralong.data.tokenizer import Tokenizer, load_tokenizer
from tests import text as made


@pytest.fixture(scope="module", params=made.FAMILIES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(made.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def tokens(documents: list[list[str]], tokenizer: Tokenizer) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for ids, ends in tokenise.tokenise(documents, tokenizer.backend):
        assert ids.dtype == numpy.int32
        found[-1] += ids.tolist()
        if ends:
            found.append([])
    assert found.pop() == []
    return found


def in_pieces(text: str, seed: int) -> list[str]:
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.choice((1, 7, 100, 1000))
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def test_windows_give_the_tokens_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "WINDOW", 500)
    monkeypatch.setattr(tokenise, "OVERLAP", 120)
    monkeypatch.setattr(tokenise, "BATCH", 1800)  # windows of one document fall into several batches
    texts = [
        "",
        "one",
        made.text(1, 20),
        *(made.text(seed, 1500) for seed in range(2, 8)),
        " ",
        made.text(9, 130) * 3,
        "",
    ]
    want = [tokenizer.ids(text) for text in texts]
    assert sum(len(list(tokenise.windows([text]))) > 10 for text in texts) == 6
    assert tokens([[text] for text in texts], tokenizer) == want
    assert tokens([in_pieces(text, seed) for seed, text in enumerate(texts)], tokenizer) == want


@pytest.mark.parametrize("run", ["1234567890", "a", " ", "\n", "=-", "é", "😀", "ab"])
def test_long_runs_without_a_place_to_cut(tokenizer, monkeypatch, run):
    monkeypatch.setattr(tokenise, "WINDOW", 300)
    monkeypatch.setattr(tokenise, "OVERLAP", 64)
    calls = []
    encode = tokenise._encode_parts
    monkeypatch.setattr(
        tokenise,
        "_encode_parts",
        lambda backend, parts: calls.extend(len(w.text) for w in parts) or encode(backend, parts),
    )
    text = made.text(1, 300) + run * 4001 + made.text(2, 300)
    got, want = tokens([[text]], tokenizer)[0], tokenizer.ids(text)
    if (type(tokenizer.backend.model).__name__, run) == (
        "Unigram",
        "\n",
    ):  # 4001 line ends in pairs: which one is alone is a tie
        assert sorted(got) == sorted(want)
        assert "".join(map(tokenizer.backend.id_to_token, got)) == "".join(
            map(tokenizer.backend.id_to_token, want)
        )
    else:
        assert got == want
    assert sum(calls) < 8 * len(text)  # what is encoded again doubles each time


def test_windows_cover_the_text_and_overlap():
    size, overlap = tokenise.WINDOW, tokenise.OVERLAP
    for length in (0, 1, size - 1, size, size + 1, 2 * size - overlap, 2 * size - overlap + 1, 3 * size):
        text = "".join(map(chr, numpy.random.default_rng(length).integers(97, 123, length)))
        windows = list(tokenise.windows([text[: length // 3], text[length // 3 :]]))
        assert (
            windows[0].first
            and windows[-1].last
            and sum(w.first for w in windows) == sum(w.last for w in windows) == 1
        )
        assert windows[0].text + "".join(w.text[overlap:] for w in windows[1:]) == text
        assert all(len(w.text) == size for w in windows[:-1]) and all(
            len(w.text) > overlap for w in windows[1:]
        )


def test_a_long_document_as_it_comes(tokenizer):
    text = made.text(3, 60_000)
    assert len(list(tokenise.windows([text]))) > 2
    assert tokens([[text]], tokenizer) == [tokenizer.ids(text)]
