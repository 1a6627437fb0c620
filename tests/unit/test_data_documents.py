"""Readers of raw documents: the same texts out of every kind of file, and one line for whatever is wrong with
one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ultralong.data import documents
from megatron_ultralong.errors import UserError

TEXTS = ["first", "zwei\r\nLinien\u2028", "", "北京 😀 \u0000", "x" * 300_000, "last\n"]


def read(path: Path, **settings) -> list[str]:
    return [document.text for document in documents.read(documents.FileRange(path), **settings)]


def lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(
        json.dumps({key: text, "n": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def make(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(path.suffix[1:], bytes)(data))
    return path


def parquet(path: Path, columns: dict, **settings) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL", "a.parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    path = (
        parquet(tmp_path / name, {"n": range(len(TEXTS)), "text": TEXTS}, row_group_size=4)
        if name == "a.parquet"
        else make(tmp_path, name, lines(TEXTS))
    )
    done: list[int] = []
    assert read(path, progress=done.append) == TEXTS
    assert sum(done) == path.stat().st_size == documents.check([path]) and min(done) >= 0


def test_the_progress_of_ranges_adds_up_to_the_file(tmp_path):
    """Also where one line reaches over several ranges, and where lines end at their borders."""
    for texts in (["x" * 5000], ["a", "y" * 3000, "b"], ["z" * 6] * 300):
        path = make(tmp_path, "a.jsonl", lines(texts))
        for size in (7, 16, 100, 1000):
            done: list[int] = []
            found = [
                document.text
                for part in documents.split(path, size)
                for document in documents.read(part, progress=done.append)
            ]
            assert found == texts and sum(done) == path.stat().st_size and min(done) >= 0


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document_as_it_is(tmp_path, name):
    for text in ("北京 é😀\r\nб\n", "", "\n"):
        path = make(tmp_path, name, b"\xef\xbb\xbf" + text.encode())
        done: list[int] = []
        assert list(read(path, progress=done.append)) == [text]
        assert sum(done) == path.stat().st_size


def test_blank_lines_another_key_a_byte_order_mark_and_no_line_end(tmp_path):
    path = make(
        tmp_path,
        "a.jsonl",
        b"\xef\xbb\xbf" + lines(["a"], "body") + b"\n \r\n" + lines(["b"], "body").rstrip(),
    )
    assert read(path, text_key="body") == ["a", "b"]
    assert (
        read(make(tmp_path, "empty.jsonl", b"")) == [] and read(make(tmp_path, "empty.jsonl.zst", b"")) == []
    )


def test_several_frames_and_frames_without_size(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    streamed = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(zstandard.compress(lines(TEXTS)) + streamed.compress(lines(["more"])) + streamed.flush())
    assert read(path) == [*TEXTS, "more"]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TEXTS)) + gzip.compress(lines(["more"])))
    assert read(path) == [*TEXTS, "more"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "a.jsonl, line 2: not JSON"),
        (b"nonsense", "a.jsonl, line 2: not JSON"),
        (b"[" * 100_000, "a.jsonl, line 2: not JSON"),
        (b'{"text": "\xff\xfe"}', "a.jsonl, line 2: not UTF-8"),
        (b'["text"]', "a.jsonl, line 2: expected a JSON object"),
        (
            b'{"txt": "a", "id": 1}',
            "a.jsonl, line 2: no key 'text' among txt, id; choose one with --text-key",
        ),
        (b'{"text": null}', "a.jsonl, line 2: 'text' contains nothing, not text"),
        (b'{"text": ["a"]}', "a.jsonl, line 2: 'text' contains list"),
        (rb'{"text": "\ud83d alone"}', "a.jsonl, line 2: 'text' contains a lone surrogate"),
    ],
)
@pytest.mark.parametrize("end", ["", ".zst"])
def test_a_bad_line_is_named(tmp_path, line, message, end):
    path = make(tmp_path, f"a.jsonl{end}", lines(["good"]) + line + b"\n" + lines(["good"]))
    with pytest.raises(UserError) as error:
        read(path)
    assert message.replace("a.jsonl", str(path)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_cut_short_is_refused(tmp_path, name):
    path = make(tmp_path, name, lines([str(i) for i in range(50_000)]))
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(UserError, match="ended before the end-of-stream marker"):
            read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_bad_files_are_refused_before_anything_is_read(tmp_path):
    good = make(tmp_path, "a.jsonl", lines(["a"]))
    for path, message in (
        (tmp_path / "none.jsonl", "cannot be read: No such file"),
        (tmp_path, "unknown kind of file"),
        (make(tmp_path, "a.json", b"{}"), "must end in one of .txt, .jsonl, .parquet, .idx, .txt.gz"),
        (make(tmp_path, "a.parquet.gz", b""), "unknown kind of file"),
    ):
        with pytest.raises(UserError, match=message):
            documents.check([good, path])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        documents.check([tmp_path / "folder.jsonl"])


def test_bad_text_and_parquet_files(tmp_path):
    for path, message in (
        (make(tmp_path, "a.txt", b"good \xff"), "a.txt: not UTF-8"),
        (make(tmp_path, "b.txt", "é".encode()[:1]), "b.txt: not UTF-8"),
        (make(tmp_path, "a.parquet", b"PAR1 nonsense"), "a.parquet: cannot be read as parquet"),
        (
            parquet(tmp_path / "b.parquet", {"body": ["a"]}),
            "b.parquet: no column 'text' among body; choose one with --text",
        ),
        (parquet(tmp_path / "c.parquet", {"text": ["a", None]}), "c.parquet, row 2: 'text' contains nothing"),
        (parquet(tmp_path / "d.parquet", {"text": [1, 2]}), "d.parquet, row 1: 'text' contains int"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    assert read(parquet(tmp_path / "e.parquet", {"text": pyarrow.array([], pyarrow.string())})) == []
