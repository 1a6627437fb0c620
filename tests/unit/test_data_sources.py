"""Files of sources: what they may say, and one line for whatever is wrong; directories and globs as files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_ultralong.data.pretrain import sources
from megatron_ultralong.data.pretrain.length_buckets import LengthBuckets
from megatron_ultralong.errors import UserError
from tests import text as made

WHOLE = """
tokens: 0.5B
seed: 7
max_repeats: 3
shuffle: false
rates: {<4K: 0.25, 4K-8K: 1, ">=8K": 3}
sources:
  books: {input: [books, more/*.jsonl], weight: 0.7, text_key: body, id_key: name, shares: {">=8K": 0.8, <8K: 0.2}}
  code: {input: code.jsonl, weight: 3, strip_id: 2}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (
        "books/b.jsonl",
        "books/a.jsonl",
        "books/deep/c.txt",
        "books/.hidden/d.jsonl",
        "books/notes.md",
        "more/x.jsonl",
        "code.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    return tmp_path


def load(folder: Path, text: str) -> sources.DocumentMix:
    (folder / "mix.yaml").write_text(text)
    return sources.load(folder / "mix.yaml")


def test_everything_a_file_may_say(folder):
    found = load(folder, WHOLE)
    assert (found.tokens, found.seed, found.max_repeats, found.shuffle, found.resampled) == (
        500_000_000,
        7,
        3,
        False,
        True,
    )
    books, code = found.sources
    assert [str(path.relative_to(folder)) for path in books.files] == [
        "books/a.jsonl",
        "books/b.jsonl",
        "books/deep/c.txt",
        "more/x.jsonl",
    ]
    assert (books.name, books.text_key, books.id_key, books.weight, books.strip_id) == (
        "books",
        "body",
        "name",
        Fraction(7, 10),
        None,
    )
    assert books.lengths == LengthBuckets(edges=(8192,), values=(0.2, 0.8), shares=True)
    assert (
        code.lengths == LengthBuckets(edges=(4096, 8192), values=(0.25, 1, 3), shares=False)
        and code.strip_id == 2
    )
    plain = load(folder, "sources: {a: {input: code.jsonl}}")
    assert (plain.tokens, plain.seed, plain.max_repeats, plain.shuffle, plain.resampled) == (
        None,
        0,
        4,
        True,
        False,
    )


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("tokens: 0.5B", "token: 1B", "token in the file is unknown; known are max_repeats"),
        (
            "tokens: 0.5B",
            "tokens: 500M",
            "tokens must be a whole number of tokens, like 500_000_000 or 0.5B, not 500M",
        ),
        ("tokens: 0.5B", "tokens: 0", "tokens must be"),
        ("seed: 7", "seed: x", "seed must be a whole number of at least 0"),
        ("max_repeats: 3", "max_repeats: 0", "max_repeats must be a whole number of at least 1"),
        ("shuffle: false", "shuffle: 3", "shuffle must be true"),
        ("weight: 3, ", "", "sources.code has no weight, but others have"),
        ("weight: 3", "weight: 0", "sources.code.weight must be a number above 0"),
        ("weight: 3", "weight: .nan", "weight must be"),
        ("code.jsonl", "none.jsonl", "none.jsonl: cannot be read: No such file"),
        ("more/*.jsonl", "more/*.parquet", "sources.books.input .*more/.*parquet: no file matches"),
        ("books,", "books, books/a.jsonl,", "is named twice"),
        ("4K-8K: 1", "5K-8K: 1", "rates must cover every length once"),
        ('">=8K": 3}', "}", "rates must cover every length once"),
        ("<4K: 0.25", "<4k: -1", "rates, <4k: must be a number of at least 0"),
        ("4K-8K", "about 4K", "rates, about 4K: is not a bucket"),
        ('0.25, 4K-8K: 1, ">=8K": 3', '0, 4K-8K: 0, ">=8K": 0', "rates must not all be 0"),
        ("shares: {", "rates: {all: 1}, shares: {", "give one of them"),
        ("text_key: body", "text_key: 3", "text_key must be a name"),
        ("input: code.jsonl, ", "", "sources.code.input must be a file, directory or glob"),
        ("sources:", "sources: {}\nx:", "x in the file is unknown"),
        ("seed: 7", "seed: [", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(folder, old, new, message):
    assert old in WHOLE
    with pytest.raises(UserError, match=message) as error:
        load(folder, WHOLE.replace(old, new, 1))
    assert "\n" not in str(error.value) and (
        "mix.yaml" in str(error.value) or "none.jsonl" in str(error.value)
    )


def test_no_sources_and_no_file(folder):
    for text in ("sources: {}", "3", "tokens: 1B", "sources: {a: 3}"):
        with pytest.raises(UserError, match="mix.yaml: "):
            load(folder, text)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        sources.load(folder / "none.yaml")


def test_directories_globs_and_packed_rows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert sources.expand([Path("books/**/*.txt"), Path("more")]) == (
        Path("books/deep/c.txt"),
        Path("more/x.jsonl"),
    )
    (folder / "bare").mkdir()
    with pytest.raises(UserError, match="--input bare: contains no .txt, .jsonl"):
        sources.expand([Path("bare")])
    made.write_rows(folder / "rows", [[1, 2, 3]], seq_length=2, kind="pretrain")
    with pytest.raises(UserError, match="rows.idx: contains packed rows, not documents"):
        sources.expand([Path("rows.bin")])


def test_keys_that_stand_twice_and_links(folder, monkeypatch):
    for text in (
        "{sources: {a: {input: code.jsonl}, a: {input: books}}}",
        "{sources: {1: {input: code.jsonl}, '1': {input: books}}}",
    ):
        with pytest.raises(UserError, match=r"duplicate key a|two sources of the same name"):
            load(folder, text)
    (folder / "linked").mkdir()
    (folder / "linked" / "to").symlink_to(folder / "books")
    (folder / "linked" / "round").symlink_to(folder / "linked")
    monkeypatch.chdir(folder)
    assert len(sources.expand([Path("linked")])) == 3
    (folder / "linked" / "gone.jsonl").symlink_to(folder / "none.jsonl")
    with pytest.raises(UserError, match=r"gone.jsonl: cannot be read: No such file"):
        sources.expand([Path("linked")])
    assert load(folder, "{sources: {a: {input: code.jsonl, weight: 1e-3}}}").sources[0].weight == Fraction(
        "0.001"
    )
