"""Packing: every token is in the rows exactly once, in order; Megatron reads the files; nothing half-written
looks whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_ultralong.data import megatron_index
from megatron_ultralong.data import row_writer as rows_module
from megatron_ultralong.data.pretrain import pack, sources
from megatron_ultralong.data.pretrain.pack import Packing, Separator
from megatron_ultralong.data.row_writer import RowWriter
from megatron_ultralong.data.tokenizer import encoding_hash
from megatron_ultralong.errors import UserError
from tests import text as made

TEXTS = ["", made.text(1, 3), made.text(2, 40), "", made.text(3, 1), made.text(4, 400), made.text(5, 17), ""]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return made.save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def inputs(tmp_path) -> list[Path]:
    whole = tmp_path / "whole.txt"
    whole.write_text(made.text(6, 300), encoding="utf-8", newline="")
    return [
        made.write_jsonl(tmp_path / "a.jsonl", TEXTS[:4]),
        whole,
        made.write_jsonl(tmp_path / "b.jsonl", TEXTS[4:]),
    ]


def packed(inputs, tokenizer_dir, seq_length, output, text_key="text", workers=1, **settings) -> dict:
    return pack.pack(
        sources.from_inputs(inputs, text_key),
        tokenizer_dir,
        Packing(seq_length=seq_length, **settings),
        str(output),
        workers=workers,
        show_progress=False,
    )


def joined(tokenizer_dir: Path, separator: list[int]) -> list[int]:
    """The documents' tokens by transformers itself, joined by the separator."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    found: list[int] = []
    for text in [*TEXTS[:4], made.text(6, 300), *TEXTS[4:]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids:
            found += (separator if found else []) + ids
    return found


@pytest.mark.parametrize("seq_length", [1, 7, 64, 333, 4000, 100_000])
@pytest.mark.parametrize("last_row", ["pad", "drop"])
def test_rows_without_padding_are_the_documents_joined(tmp_path, inputs, tokenizer_dir, seq_length, last_row):
    separator = AutoTokenizer.from_pretrained(tokenizer_dir)("<s>", add_special_tokens=False)["input_ids"]
    assert len(separator) > 1, "as with Llama-3.1, <s> is no special token here"
    want = joined(tokenizer_dir, separator)
    if last_row == "drop" and len(want) < seq_length + 1:
        with pytest.raises(
            UserError, match=f"has {len(want)} tokens, less than one row of {seq_length} \\+ 1"
        ):
            packed(inputs, tokenizer_dir, seq_length, tmp_path / "out", last_row=last_row)
        assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))
        return
    manifest = packed(inputs, tokenizer_dir, seq_length, tmp_path / "sub" / "out", last_row=last_row)

    rows = IndexedDataset(str(tmp_path / "sub" / "out"))
    got = numpy.concatenate([rows[i] for i in range(len(rows))]).tolist()
    length = seq_length + 1
    left = len(want) % length
    padding = (length - left) % length if last_row == "pad" else 0
    assert set(rows.sequence_lengths.tolist()) == {length} and rows.document_indices.tolist() == list(
        range(len(rows) + 1)
    )
    assert got[: len(got) - padding] == (want if last_row == "pad" else want[: len(want) - left])
    assert manifest["padding"] == padding and manifest["dropped"] == (left if last_row == "drop" else 0)
    assert (
        manifest["rows"] == len(rows)
        and manifest["tokens"] == len(got) - padding
        and manifest["documents"] == 6
    )
    assert manifest["separator_tokens"] == 5 * len(separator) and manifest["max_token_id"] >= max(got)

    masks = tmp_path / "sub" / "out.mask.idx"
    assert masks.exists() == bool(padding) == manifest["mask"]
    if padding:
        mask = IndexedDataset(str(tmp_path / "sub" / "out.mask"))
        assert mask.index.dtype == numpy.uint8 and len(mask) == len(rows)
        assert (
            numpy.concatenate([mask[i] for i in range(len(mask))]).tolist() == [1] * len(want) + [0] * padding
        )
        assert set(got[len(want) :]) == {AutoTokenizer.from_pretrained(tokenizer_dir).eos_token_id}
    names = {"out.bin", "out.idx", "out.json", "out.documents.parquet", "out.lengths.png"} | (
        {"out.mask.bin", "out.mask.idx"} if padding else set()
    )
    assert {path.name for path in (tmp_path / "sub").iterdir()} == names


def test_the_manifest_says_where_each_token_came_from(tmp_path, inputs, tokenizer_dir):
    made_now = packed(inputs, tokenizer_dir, 50, tmp_path / "out")
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert (
        manifest == made_now
        and manifest["format"] == 1
        and manifest["kind"] == "pretrain"
        and manifest["seq_length"] == 50
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert manifest["tokenizer"] == {
        "name": "small",
        "vocab_size": len(tokenizer),
        "sha256": hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest(),
        "encoding_sha256": encoding_hash((tokenizer_dir / "tokenizer.json").read_bytes()),
    }
    written = {suffix: (tmp_path / f"out{suffix}").read_bytes() for suffix in manifest["checksums"]}
    assert set(written) == {".bin", ".idx", ".mask.bin", ".mask.idx"}
    assert manifest["checksums"] == {
        suffix: {"bytes": len(data), "block": 4 << 20, "sha256": [hashlib.sha256(data).hexdigest()[:16]]}
        for suffix, data in written.items()
    }
    assert manifest["separator"] == {"text": "<s>", "ids": tokenizer.encode("<s>", add_special_tokens=False)}
    (source,) = manifest["sources"]
    for file, path, texts in zip(
        source["files"], inputs, (TEXTS[:4], [made.text(6, 300)], TEXTS[4:]), strict=True
    ):
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert file == {
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
            "documents": sum(map(bool, ids)),
            "tokens": sum(map(len, ids)),
            "empty": ids.count([]),
            "broken": 0,
            "special_tokens": 0,
        }
    assert manifest["skipped"] == {"empty": 3, "broken": 0, "duplicate": 0} and manifest["duplicates"] == 0
    assert manifest["tokens"] == sum(s["tokens"] for s in manifest["sources"]) + manifest["separator_tokens"]
    assert manifest["rows"] * 51 == manifest["tokens"] + manifest["padding"]


@pytest.mark.parametrize(
    "separator, text, ids",
    [
        (Separator(text=""), "", []),
        (Separator(text="<|end|>"), "<|end|>", [1]),
        (Separator(ids=(5, 0, 5)), None, [5, 0, 5]),
        (Separator(special="bos"), None, [0]),
        (Separator(special="eos"), None, [1]),
    ],
)
def test_separators(tmp_path, inputs, tokenizer_dir, separator, text, ids):
    manifest = packed(inputs, tokenizer_dir, 20, tmp_path / "out", separator=separator)
    assert manifest["separator"] == {"text": text, "ids": ids} and manifest["separator_tokens"] == 5 * len(
        ids
    )
    rows = IndexedDataset(str(tmp_path / "out"))
    want = joined(tokenizer_dir, ids)
    assert numpy.concatenate([rows[i] for i in range(len(rows))]).tolist()[: len(want)] == want


def test_separators_the_tokenizer_does_not_have(tmp_path, inputs, tokenizer_dir):
    words = made.save_tokenizer(tmp_path / "words", "words")
    for folder, separator, message in (
        (tokenizer_dir, Separator(ids=(3, 100_000)), "--separator-id 100000: the tokenizer has ids 0 to"),
        (tokenizer_dir, Separator(ids=(-1,)), "--separator-id -1"),
        (words, Separator(text="  "), "makes no token of it"),
    ):
        with pytest.raises(UserError, match=message):
            packed(inputs, folder, 20, tmp_path / "out", separator=separator)
    config = json.loads((words / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        config.pop(name)
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--separator-token eos: the tokenizer has none"):
        packed(inputs, words, 20, tmp_path / "out", separator=Separator(special="eos"))
    packed(inputs, words, 20, tmp_path / "out")  # nothing to pad with: id 0


@pytest.mark.parametrize("vocab_size, name", [(65_499, "uint16"), (65_500, "int32"), (128_256, "int32")])
def test_the_number_type_follows_the_vocabulary(tmp_path, vocab_size, name):
    rows = RowWriter(tmp_path, 4, megatron_index.token_dtype(vocab_size), masks=False, starts=False)
    rows.add(numpy.array([[1, 2, vocab_size - 1, vocab_size - 1]]))
    rows.finish()
    read = IndexedDataset(f"{tmp_path}/")
    assert numpy.dtype(read.index.dtype).name == name and read[0].tolist() == [
        1,
        2,
        vocab_size - 1,
        vocab_size - 1,
    ]
    assert rows.largest == vocab_size - 1


@pytest.mark.parametrize("line", ["not json", '{"other": 1}'])
def test_a_failed_run_leaves_the_earlier_files_and_nothing_else(
    tmp_path, inputs, tokenizer_dir, line, monkeypatch
):
    packed(inputs, tokenizer_dir, 20, tmp_path / "out" / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n' * 50 + line + "\n")
    with pytest.raises(UserError, match=r"bad.jsonl, line 51: "):
        packed([*inputs, bad], tokenizer_dir, 9, tmp_path / "out" / "a", broken="stop")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack.packing_report, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed(inputs, tokenizer_dir, 9, tmp_path / "out" / "a")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_crash_at_any_moment_leaves_no_manifest_beside_other_rows(
    tmp_path, inputs, tokenizer_dir, monkeypatch
):
    """The files are put in place one by one: cut off after each step, either all is the old run or there is
    no manifest."""
    packed(inputs, tokenizer_dir, 20, tmp_path / "out" / "a")
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    replace, allowed = rows_module.os.replace, 0

    class Crash(BaseException):
        pass

    def crashing(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash
        replace(source, target)

    monkeypatch.setattr(rows_module.os, "replace", crashing)
    for allowed in range(9):
        left = allowed
        try:
            packed(inputs, tokenizer_dir, 9, tmp_path / "out" / "a")
            break
        except Crash:
            now = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
            assert now == old or "a.json" not in now
    assert allowed == 8 and json.loads((tmp_path / "out" / "a.json").read_text())["seq_length"] == 9


def test_files_of_an_earlier_run_do_not_linger(tmp_path, inputs, tokenizer_dir):
    assert packed(inputs, tokenizer_dir, 20, tmp_path / "out")["mask"]
    for suffix in (".docs.bin", ".docs.idx"):
        (tmp_path / f"out{suffix}").touch()
    packed(inputs, tokenizer_dir, 20, tmp_path / "out", last_row="drop")
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.bin",
        "out.documents.parquet",
        "out.idx",
        "out.json",
        "out.lengths.png",
    ]


def test_nothing_to_pack_and_nowhere_to_write(tmp_path, inputs, tokenizer_dir):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    empty = [
        made.write_jsonl(tmp_path / "none.jsonl", []),
        made.write_jsonl(tmp_path / "empty.jsonl", ["", ""]),
    ]
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ((empty, tokenizer_dir, 9, tmp_path / "out" / "a"), "no text in .*none.jsonl and 1 more"),
        ((empty[:1], tokenizer_dir, 9, tmp_path / "out" / "a"), "no text in .*none.jsonl; nothing"),
        (
            ([latin], tokenizer_dir, 9, tmp_path / "out" / "a"),
            "nothing to pack; the first document that cannot be read: .*latin.txt: not UTF-8 text",
        ),
        ((inputs, tokenizer_dir, 0, tmp_path / "out" / "a"), "--seq-length 0: must be at least 1"),
        ((inputs, tmp_path / "no", 9, tmp_path / "out" / "a"), "no: no such directory"),
        (([tmp_path / "no.txt"], tokenizer_dir, 9, tmp_path / "out" / "a"), "no.txt: cannot be read"),
        ((inputs, tokenizer_dir, 9, tmp_path), "is a directory; give a prefix"),
        ((inputs, tokenizer_dir, 9, f"{tmp_path}/new/"), "is a directory; give a prefix"),
        ((inputs, tokenizer_dir, 9, file / "a"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message) as error:
            packed(*arguments)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_told(tmp_path, inputs, tokenizer_dir, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.packing_report, "write", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        packed(inputs, tokenizer_dir, 9, tmp_path / "out")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("seq_length", [1, 7, 64, 333, 100_000])
def test_document_starts(tmp_path, inputs, tokenizer_dir, seq_length):
    """A document starts behind the separator before it; one that crosses into a row starts at 0 there as
    well."""
    from megatron_ultralong.data.packed_rows import PackedDataset

    manifest = packed(inputs, tokenizer_dir, seq_length, tmp_path / "out", document_starts=True)
    assert manifest["document_starts"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    separator = tokenizer("<s>", add_special_tokens=False)["input_ids"]
    begins, at = [], 0
    for text in [*TEXTS[:4], made.text(6, 300), *TEXTS[4:]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids:
            at += len(separator) if begins else 0
            begins.append(at)
            at += len(ids)
    rows, length = PackedDataset(str(tmp_path / "out"), seq_length), seq_length + 1
    for row in range(len(rows)):
        inside = {begin - row * length for begin in begins if 0 <= begin - row * length < length}
        padding = {length - manifest["padding"]} if manifest["padding"] and row == len(rows) - 1 else set()
        assert rows.document_starts(row) == sorted({0} | inside | padding)
    packed(inputs, tokenizer_dir, seq_length, tmp_path / "out")
    assert not list(tmp_path.glob("out.docs*")), "left over from the run before"
    with pytest.raises(UserError, match="--document-starts"):
        PackedDataset(str(tmp_path / "out"), seq_length).document_starts(0)
