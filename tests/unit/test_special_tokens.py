"""Special tokens that a text spells out are text, unless the data say that they are control tokens."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer

from megatron_ultralong.data.pretrain import pack, packing_report, sources
from megatron_ultralong.data.special_tokens import MixedEncoder, load_backend, spelled_pattern
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.prompts.encode import PromptEncoder
from megatron_ultralong.evaluate.prompts.truncate import PromptTruncator
from megatron_ultralong.evaluate.tasks import perplexity
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahPromptBuilder, NiahSettings
from tests import text as made
from tests.answering import SPECIAL, byte_tokenizer

SPELLED = ("<|begin|>", "<|end|>", "<|end|><|begin|>")


def spelling(seed: int) -> str:
    """A text that spells special tokens at random places, with and without spaces around them."""
    rng = random.Random(seed)
    words = made.text(seed, 20).split(" ")
    for _ in range(rng.randrange(4)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(SPELLED))
    return rng.choice((" ", "")).join(words)


def control_ids(backend: Tokenizer) -> set[int]:
    return {backend.token_to_id(token) for token in ("<|begin|>", "<|end|>")}


@pytest.mark.parametrize("family", made.FAMILIES)
def test_text_is_text_in_every_family(tmp_path, family):
    made.save_tokenizer(tmp_path, family)
    transformers_own = AutoTokenizer.from_pretrained(tmp_path)
    written = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    text, control = load_backend(written, "text"), load_backend(written, "control")
    for seed in range(50):
        ordinary = made.text(seed, 30)
        assert text.encode(ordinary).ids == control.encode(ordinary).ids
        spelled = spelling(seed)
        assert control.encode(spelled, add_special_tokens=False).ids == (
            transformers_own(spelled, add_special_tokens=False).input_ids
        )
        (batched,) = text.encode_batch_fast([spelled], add_special_tokens=False)
        assert not control_ids(control) & set(batched.ids)
        if family == "llama3":  # loses nothing, so that the text can be compared
            assert text.decode(batched.ids, skip_special_tokens=True) == spelled
        if family != "unigram":  # where transformers finds the control pieces in the text
            want = transformers_own(spelled, add_special_tokens=False, split_special_tokens=True).input_ids
            assert batched.ids == want


@pytest.mark.parametrize("family", made.FAMILIES)
def test_text_and_control_tokens_in_one_text(family):
    backend = made.tokenizer(family)
    text, mixed = load_backend(backend.to_str(), "text"), MixedEncoder(backend)
    for seed in range(50):
        spelled = spelling(seed)
        for want, ranges in (
            (backend.encode(spelled, add_special_tokens=False), []),
            (text.encode(spelled, add_special_tokens=False), [(0, len(spelled))]),
        ):
            ids, characters = mixed.encode(spelled, ranges)
            assert ids == want.ids and [tuple(span) for span in characters.tolist()] == want.offsets
    ids, characters = mixed.encode("<|begin|>a<|end|><|end|>", [(10, 17)])
    own = [i for i, number in enumerate(ids) if number in control_ids(backend)]
    assert own == [0, len(ids) - 1] and characters[own].tolist() == [[0, 9], [17, 24]]


def test_flags_of_special_tokens_stay(tmp_path):
    """White space that a control token takes with it, and a token that only counts as a word of its own."""
    backend = made.tokenizer("llama3")
    backend.add_special_tokens(
        [
            AddedToken("<|strips|>", lstrip=True, rstrip=True, special=True),
            AddedToken("WORD", single_word=True, special=True),
            AddedToken("<|end|>s", special=True),
        ]
    )
    backend.add_tokens([AddedToken("<tool>", special=False)])
    backend.enable_truncation(5)
    mixed = MixedEncoder(backend)
    backend.no_truncation()
    text = "a  <|strips|>  b WORD sWORDs <|end|>s <|end|> s <tool>"
    assert mixed.encode(text, [])[0] == backend.encode(text).ids
    ids, _ = mixed.encode(text, [(0, len(text))])
    assert spelled_pattern(backend.get_added_tokens_decoder().values()).findall(text) == [
        "<|strips|>",
        "WORD",
        "<|end|>s",
        "<|end|>",
    ]
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    assert not special & set(ids) and backend.decode(ids, skip_special_tokens=False) == text
    assert ids[-1] == backend.token_to_id("<tool>")  # vocabulary, not a control token


def test_a_word_that_is_also_a_special_token(tmp_path):
    """Some tokenizers pad with an ordinary token. A text keeps it, because the model itself makes it."""
    backend = made.tokenizer("llama3")
    number = backend.token_to_id("!")
    backend.add_special_tokens(["!"])
    assert load_backend(backend.to_str(), "text").encode("!").ids == [number]


def test_tokenizers_without_special_tokens():
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    mixed = MixedEncoder(backend)
    for text in ("", "a <|end|>", "<s>"):
        ids, characters = mixed.encode(text, [(0, len(text))])
        assert ids == mixed.encode(text, [])[0] == backend.encode(text).ids and len(characters) == len(ids)
        assert spelled_pattern(backend.get_added_tokens_decoder().values()).search(text) is None


# ---- pretraining data --------------------------------------------------------------------------

DOCUMENTS = ["", "<|end|>", "a <|begin|> page about <|end|>, and <|end|>", made.text(1, 40), "<|en", "d|>"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return made.save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def packed(mix: sources.DocumentMix, tokenizer_dir: Path, output: Path, **settings: object) -> dict:
    packing = pack.Packing(seq_length=15, separator=pack.Separator(special="eos"), last_row="pad")
    return pack.pack(mix, tokenizer_dir, packing, str(output), workers=1, show_progress=False, **settings)


def tokens(output: Path) -> list[int]:
    rows = IndexedDataset(str(output))
    return numpy.concatenate([rows[i] for i in range(len(rows))]).tolist()


@pytest.mark.parametrize("mode", ["text", "control"])
def test_documents(tmp_path, tokenizer_dir, mode):
    source = made.write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    manifest = packed(sources.from_inputs([source], special_tokens=mode), tokenizer_dir, tmp_path / "out")
    assert manifest["sources"][0]["files"][0]["special_tokens"] == 4
    assert manifest["sources"][0]["special_tokens"] == {"encoded_as": mode, "spelled_out": 4}
    assert manifest["skipped"]["empty"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    end = tokenizer.eos_token_id
    want = []
    for document in DOCUMENTS[1:]:
        ids = tokenizer(document, add_special_tokens=False, split_special_tokens=mode == "text").input_ids
        assert (end in ids) == (mode == "control" and "<|end|>" in document)
        want += [*([end] if want else []), *ids]
    assert tokens(tmp_path / "out")[: len(want)] == want and manifest["tokens"] == len(want)
    (line,) = [text for text in packing_report.warnings(manifest, "out") if "special" in text]
    assert line.startswith(f"input: special tokens spelled out in texts: 4, encoded as {mode}")
    assert ("--special-tokens control makes" in line) == (mode == "text")


def test_each_source_says_what_its_texts_contain(tmp_path, tokenizer_dir):
    for name in ("web", "chats"):
        made.write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} <|end|>"])
    file = tmp_path / "mix.yaml"
    text = "sources:\n  web: {input: web.jsonl}\n  chats: {input: chats.jsonl, special_tokens: MODE}\nshuffle: false\n"
    file.write_text(text.replace("MODE", "control"))
    manifest = packed(sources.load(file), tokenizer_dir, tmp_path / "out")
    assert [source["special_tokens"] for source in manifest["sources"]] == [
        {"encoded_as": "text", "spelled_out": 1},
        {"encoded_as": "control", "spelled_out": 1},
    ]
    end = AutoTokenizer.from_pretrained(tokenizer_dir).eos_token_id
    assert tokens(tmp_path / "out")[: manifest["tokens"]].count(end) == 2  # the separator, and one of chats
    file.write_text(text.replace("MODE", "no"))
    with pytest.raises(UserError, match=r"sources.chats.special_tokens must be text or control"):
        sources.load(file)


def test_tokens_of_both_modes_are_not_mixed(tmp_path, tokenizer_dir):
    source = made.write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    folder = tmp_path / "tokens"
    text, control = (sources.from_inputs([source], special_tokens=mode) for mode in ("text", "control"))
    packed(text, tokenizer_dir, tmp_path / "one", tokens_dir=folder)
    with pytest.raises(UserError, match=r"from other inputs or settings \(special_tokens differ\)"):
        packed(control, tokenizer_dir, tmp_path / "two", tokens_dir=folder)
    # As after a stop: the tokens of the other mode in the working folder are made again.
    work = tmp_path / ".two.work"
    work.mkdir()
    folder.rename(work / "tokens")
    packed(control, tokenizer_dir, tmp_path / "two")
    packed(control, tokenizer_dir, tmp_path / "three")
    assert tokens(tmp_path / "two") == tokens(tmp_path / "three") != tokens(tmp_path / "one")


# ---- prompts -----------------------------------------------------------------------------------

MESSAGE, PREFIX = "What is <|end|>?<|begin|>", "It ends<|end|> a"


def control_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    return tokenizer.convert_ids_to_tokens([i for i in ids if i in special])


@pytest.mark.parametrize("chat", [False, True])
def test_prompts(chat):
    tokenizer = byte_tokenizer(chat)
    encoder = PromptEncoder(tokenizer, "auto")
    of_template = ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"] if chat else []
    text = f"{encoder.head}{MESSAGE}{encoder.tail}{PREFIX}"
    for ids in (
        encoder.encode(MESSAGE, PREFIX),
        encoder.assemble(encoder.ids(MESSAGE), encoder.ids(PREFIX)),
        encoder.encode("ordinary", ""),
    ):
        assert control_tokens(tokenizer, ids) == of_template
    assert tokenizer.decode(encoder.encode(MESSAGE, PREFIX)) == text
    assert len(encoder.encode(MESSAGE, PREFIX)) == encoder.size(MESSAGE, PREFIX)
    assert encoder.counts([MESSAGE, "ab"]) == [len(MESSAGE), 2]  # a token per byte
    # A prompt file with a template of its own starts with a special token.
    own = encoder.encode(f"<|user|>{MESSAGE}<|assistant|>", PREFIX)
    assert control_tokens(tokenizer, own) == ["<|user|>", "<|end|>", "<|begin|>", "<|assistant|>", "<|end|>"]
    # Benchmarks: a haystack, and a document that is cut.
    haystack = NiahPromptBuilder(
        tokenizer, NiahSettings(lengths=(400,), depths=(50,)), "Pages say <|end|>. Others <|begin|>!"
    ).prompt(400, 50, 0)
    assert control_tokens(tokenizer, haystack.tokens) == of_template and len(haystack.tokens) <= 400
    truncator = PromptTruncator(tokenizer, chat="auto", max_length=100)
    cut = truncator.prompt("a", MESSAGE * 9, 10)
    assert cut.cut and control_tokens(tokenizer, cut.request.ids) == of_template
    assert cut.request.text in text + MESSAGE * 9 or "<|end|>" in cut.request.text


def test_prompts_of_every_family(tmp_path):
    """A message in a template is encoded as one text with it, also if it spells a special token."""
    for family in made.FAMILIES:
        tokenizer = AutoTokenizer.from_pretrained(made.save_tokenizer(tmp_path / family, family))
        tokenizer.chat_template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
        encoder = PromptEncoder(tokenizer, "auto")
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        spelled, ordinary = encoder.encode("the <|end|> sky", ""), encoder.encode("the sky", "")
        assert [i for i in spelled if i in (begin, end)] == [begin, end]
        assert ordinary == tokenizer("<|begin|>the sky<|end|>", add_special_tokens=False).input_ids
        assert not {begin, end} & set(encoder.ids("the <|end|> sky"))


def test_prompts_of_a_tokenizer_in_python():
    tokenizer = ByT5Tokenizer()
    control = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def in_bytes(text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    encoder = PromptEncoder(tokenizer, "no")
    assert not tokenizer.is_fast
    assert encoder.encode("a<extra_id_0>", "b") == in_bytes("a<extra_id_0>b")
    assert encoder.counts(["<extra_id_0>", "ab"]) == [12, 2] and encoder.encode("ab", "c") == in_bytes("abc")
    tokenizer.chat_template = "{% for m in messages %}<extra_id_0>{{ m.content }}<extra_id_0>{% endfor %}"
    for message in ("so", "so <extra_id_0>?"):
        assert PromptEncoder(tokenizer, "yes").encode(message, "!") == [
            *(control, *in_bytes(message), control),
            *in_bytes("!"),
        ]


def test_a_tokenizer_that_is_told_to_split(tmp_path, tokenizer_dir):
    """split_special_tokens in tokenizer_config.json is about texts; a template keeps its control tokens."""
    folder = shutil.copytree(tokenizer_dir, tmp_path / "split")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": True}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
    ids = PromptEncoder(tokenizer, "yes").encode("the sky", "")
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    manifest = packed(
        sources.from_inputs([made.write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)], special_tokens="control"),
        folder,
        tmp_path / "out",
    )
    assert tokens(tmp_path / "out")[: manifest["tokens"]].count(tokenizer.eos_token_id) == 4 + 3


def test_perplexity_of_a_document(tmp_path):
    tokenizer = byte_tokenizer()
    file = made.write_jsonl(tmp_path / "a.jsonl", ["a<|end|>b"])
    ((ids, _),) = perplexity.read_rows([str(file)], tokenizer)
    assert not control_tokens(tokenizer, ids.tolist()) and tokenizer.decode(ids) == "a<|end|>b"
