"""Every token accounted for: what is in the rows is what the manifest and the table of documents say, for
random mixes."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ultralong.data.pretrain import pack, sources, token_cache, tokenise_worker, write_rows
from megatron_ultralong.data.pretrain.pack import Packing, Separator
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.errors import UserError
from tests import text as made


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return made.save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def corpus(prefix: Path, documents: list[list[int]], dtype=numpy.int32) -> Path:
    """A ragged Megatron corpus by Megatron's own builder; some documents have several sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        cut = (
            [len(document) // 3, len(document) - len(document) // 3] if len(document) % 2 else [len(document)]
        )
        builder.add_document(torch.tensor(document), cut)
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.idx")


def packed(
    mix: Path | sources.DocumentMix,
    tokenizer_dir,
    output: Path,
    seq_length: int = 63,
    workers: int = 1,
    **settings,
) -> dict:
    return pack.pack(
        sources.load(mix) if isinstance(mix, Path) else mix,
        tokenizer_dir,
        Packing(seq_length=seq_length, **settings),
        str(output),
        workers=workers,
        show_progress=False,
    )


def pieces(prefix: Path, separator: list[int], fit: str) -> list[tuple[int, ...]]:
    """What stands between separators: over all rows (cross), or within each row (best). Padding is left out
    by the mask."""
    rows = IndexedDataset(str(prefix))
    mask = IndexedDataset(f"{prefix}.mask") if Path(f"{prefix}.mask.idx").exists() else None
    kept = [rows[i] if mask is None else rows[i][mask[i] == 1] for i in range(len(rows))]
    found = []
    for stream in [numpy.concatenate(kept)] if fit == "cross" else kept:
        text = " ".join(map(str, stream.tolist()))
        found += [
            tuple(map(int, part.split())) for part in f" {text} ".split(f" {' '.join(map(str, separator))} ")
        ]
    return found


@pytest.mark.parametrize(
    "seed, fit, last_row",
    [(0, "cross", "pad"), (1, "cross", "drop"), (2, "best", "pad"), (3, "best", "pad"), (4, "cross", "pad")],
)
def test_every_token_is_in_the_rows_as_often_as_told(
    tmp_path, tokenizer_dir, seed, fit, last_row, monkeypatch
):
    monkeypatch.setattr(token_cache, "UNIT_SIZES", (3000, 3000))  # files are cut, and small ones share a unit
    rng = random.Random(seed)
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = {
        name: [made.text(rng.randrange(10**6), rng.choice((0, 1, 3, 20, 60))) for _ in range(60)]
        for name in ("a", "b", "c")
    }
    made.write_jsonl(tmp_path / "a.jsonl", texts["a"])
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [f"b{i}" for i in range(60)], "text": texts["b"]}),
        tmp_path / "b.parquet",
        row_group_size=7,
    )
    for i, text in enumerate(texts["c"]):
        path = tmp_path / "c" / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    raw = [[rng.randrange(2, 300) for _ in range(rng.choice((1, 5, 100)))] + [1] for _ in range(40)]
    corpus(tmp_path / "d", raw, rng.choice((numpy.int32, numpy.uint16)))
    (tmp_path / "mix.yaml").write_text(f"""
seed: {seed}
max_repeats: 5
rates: {{<20: 0.5, 20-100: 1, ">=100": 2.5}}
sources:
  lines: {{input: a.jsonl, id_key: id}}
  rows: {{input: b.parquet, id_key: id}}
  files: {{input: c}}
  ids: {{input: d.idx, strip_id: 1}}
""")
    separator = [1, 0, 1]
    manifest = packed(
        tmp_path / "mix.yaml",
        tokenizer_dir,
        tmp_path / "out",
        fit=fit,
        last_row=last_row,
        separator=Separator(ids=tuple(separator)),
    )
    table = pyarrow.parquet.read_table(tmp_path / "out.documents.parquet").to_pylist()

    # Each line of the table names a document, with the tokens that the tokenizer itself gives.
    content = {}
    for row in table:
        kind, number = Path(row["file"]).suffix, row["number"]
        content[row["file"], number] = (
            tokenizer.ids(texts["a"][number - 1])
            if kind == ".jsonl"
            else tokenizer.ids(texts["b"][number - 1])
            if kind == ".parquet"
            else tokenizer.ids(texts["c"][int(Path(row["file"]).stem)])
            if kind == ".txt"
            else raw[number - 1][:-1]
        )
        assert (
            row["id"]
            == {".jsonl": str(number - 1), ".parquet": f"b{number - 1}", ".txt": row["file"], ".idx": None}[
                kind
            ]
        )
        assert row["tokens"] == len(content[row["file"], number])
        assert row["what"] == ("empty" if not row["tokens"] else "packed" if row["used"] else "left out")
    assert len(content) == len(table) == 60 * 3 + 40

    # What stands in the rows is those documents, so often.
    want: Counter[tuple[int, ...]] = Counter()
    for row in table:
        ids, used = content[row["file"], row["number"]], row["used"]
        if fit == "best":  # longer documents are cut into full rows and a rest
            for at in range(0, len(ids), 64):
                want[tuple(ids[at : at + 64])] += used
        else:
            want[tuple(ids)] += used
    got = Counter(pieces(tmp_path / "out", separator, fit))
    if last_row == "drop":
        last = pieces(tmp_path / "out", separator, fit)[-1]  # the last one is cut
        got[last] -= 1
        missing = want - got
        assert not got - want and sum(map(len, missing.elements())) - len(last) <= manifest["dropped"] < 64
    else:
        assert got == +want

    # And the manifest's sums are theirs.
    for source in manifest["sources"]:
        own = [row for row in table if row["source"] == source["name"]]
        assert (
            source["documents"]
            == sum(row["tokens"] > 0 for row in own)
            == sum(row["documents"] for row in source["lengths"])
        )
        assert (
            source["packed"]["tokens"]
            == sum(row["tokens"] * row["used"] for row in own)
            == sum(row["packed_tokens"] for row in source["lengths"])
        )
        assert source["packed"]["documents"] == sum(row["used"] for row in own) and source["skipped"][
            "empty"
        ] == sum(not row["tokens"] for row in own)
        assert (
            sum(file["tokens"] for file in source["files"])
            == source["tokens"]
            == sum(row["tokens"] for row in own)
        )
    rows = manifest["rows"] * 64
    assert (
        rows - manifest["padding"]
        == manifest["tokens"]
        == (
            sum(s["packed"]["tokens"] for s in manifest["sources"])
            + manifest["separator_tokens"]
            - manifest["dropped"]
        )
    )


def test_broken_lines_are_counted_listed_and_the_rest_is_packed(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(token_cache, "UNIT_SIZES", (300, 300))
    lines = [json.dumps({"text": f"some words {i}"}) for i in range(40)]
    for at, line in ((0, "{"), (13, '{"txt": "x"}'), (39, '{"text": 3}')):
        lines[at] = line
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes("é".encode() * 50 + b"\xff")
    mix = sources.from_inputs([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    manifest = packed(mix, tokenizer_dir, tmp_path / "out")
    assert manifest["skipped"] == {"empty": 0, "broken": 4, "duplicate": 0} and manifest["documents"] == 37
    listed = [json.loads(line) for line in (tmp_path / "out.broken.jsonl").read_text().splitlines()]
    assert [(Path(one["file"]).name, one["line"]) for one in listed] == [
        ("a.jsonl", 1),
        ("a.jsonl", 14),
        ("a.jsonl", 40),
        ("b.txt", 1),
    ]
    assert (
        "not JSON" in listed[0]["reason"]
        and "'txt'" not in listed[2]["reason"]
        and "not UTF-8" in listed[3]["reason"]
    )
    assert manifest["first_broken"].startswith(f"{tmp_path / 'a.jsonl'}, line 1: not JSON")
    with pytest.raises(UserError, match=r"a.jsonl, line 1: not JSON"):
        packed(mix, tokenizer_dir, tmp_path / "out", broken="stop")
    (tmp_path / "a.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(
        UserError, match=r"a.jsonl, line 13: no key 'text' among txt"
    ):  # in the middle of the file: counted through
        packed(mix, tokenizer_dir, tmp_path / "out", broken="stop")
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(
        UserError, match=r"c.jsonl, line 1: no key 'text' among body; choose one with --text-key"
    ):
        packed(
            sources.from_inputs([tmp_path / "b.txt", tmp_path / "c.jsonl"]), tokenizer_dir, tmp_path / "out"
        )


def test_duplicates_and_empty_documents_as_told(tmp_path, tokenizer_dir):
    made.write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one", ""])
    made.write_jsonl(tmp_path / "b.jsonl", ["three", "two"])
    mix = sources.from_inputs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    kept = packed(mix, tokenizer_dir, tmp_path / "out")
    assert (kept["documents"], kept["duplicates"], kept["skipped"]["duplicate"]) == (5, 2, 0)
    dropped = packed(mix, tokenizer_dir, tmp_path / "out", duplicates="drop")
    assert (dropped["documents"], dropped["duplicates"], dropped["skipped"]["duplicate"]) == (3, 2, 2)
    what = [row["what"] for row in pyarrow.parquet.read_table(tmp_path / "out.documents.parquet").to_pylist()]
    assert what == ["packed", "packed", "duplicate", "empty", "packed", "duplicate"]
    with pytest.raises(
        UserError, match=r"a.jsonl, line 3: has the same tokens as .*a.jsonl, line 1; remove it"
    ):
        packed(mix, tokenizer_dir, tmp_path / "out", duplicates="stop")
    with pytest.raises(UserError, match=r"a.jsonl, line 4: has no text"):
        packed(mix, tokenizer_dir, tmp_path / "out", empty="stop")


def test_tokens_kept_for_another_length(tmp_path, tokenizer_dir, monkeypatch):
    path = made.write_jsonl(tmp_path / "a.jsonl", [made.text(i, 50) for i in range(30)])
    arguments = {"tokens_dir": tmp_path / "tokens", "show_progress": False, "workers": 1}
    pack.pack(
        sources.from_inputs([path]), tokenizer_dir, Packing(seq_length=63), str(tmp_path / "one"), **arguments
    )
    assert not list(tmp_path.glob(".*")) and IndexedDataset(
        str(tmp_path / "tokens" / "000000")
    ).document_indices.tolist() == list(range(31))
    fresh = pack.pack(
        sources.from_inputs([path]),
        tokenizer_dir,
        Packing(seq_length=127),
        str(tmp_path / "fresh"),
        workers=1,
        show_progress=False,
    )
    monkeypatch.setattr(tokenise_worker, "_tokenise_unit", None)  # not called again
    again = pack.pack(
        sources.from_inputs([path]),
        tokenizer_dir,
        Packing(seq_length=127),
        str(tmp_path / "two"),
        **arguments,
    )
    assert again == fresh and (tmp_path / "two.bin").read_bytes() == (tmp_path / "fresh.bin").read_bytes()
    with path.open("a") as file:
        file.write('{"id": 1, "text": "more"}\n')
    with pytest.raises(
        UserError, match=r"tokens contains tokens made from other inputs or settings \(files differ\)"
    ):
        pack.pack(
            sources.from_inputs([path]),
            tokenizer_dir,
            Packing(seq_length=127),
            str(tmp_path / "two"),
            **arguments,
        )


def test_tokens_of_another_format_are_not_mixed_with_new_ones(tmp_path, tokenizer_dir):
    source = made.write_jsonl(tmp_path / "a.jsonl", [made.text(i, 50) for i in range(9)])
    folder, notes = tmp_path / "tokens", []
    folder.mkdir()

    def cache(keep):
        return token_cache.make(
            folder,
            sources.from_inputs([source]).sources,
            load_tokenizer(tokenizer_dir),
            tokenise_worker.BadDocuments(),
            workers=1,
            keep=keep,
            progress=(lambda n: None, notes.append),
        )

    lengths = cache(True).lengths
    plan = json.loads((folder / "plan.json").read_text())
    old = {**plan, "format": 1}
    (folder / "plan.json").write_text(json.dumps(old))
    (folder / "000000.bin").write_bytes(b"")  # finished, but its tokens are not used again
    with pytest.raises(
        UserError,
        match=r"tokens contains tokens of unsupported format version 1 \(expected 3\); name another",
    ):
        cache(True)
    assert json.loads((folder / "plan.json").read_text()) == old and not notes
    assert cache(False).lengths.tolist() == lengths.tolist() and (folder / "000000.bin").stat().st_size
    assert notes == ["tokens of an earlier run are recomputed (unsupported format version 1)"]
    assert json.loads((folder / "plan.json").read_text()) == plan


def test_a_corpus_of_another_tokenizer_and_a_damaged_one(tmp_path, tokenizer_dir):
    path = corpus(tmp_path / "ids", [[5, 6, 7, 2], [100_000, 3, 2]])
    with pytest.raises(UserError, match=r"ids.idx contains token id 100000, but the tokenizer has \d+"):
        packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "out")
    corpus(tmp_path / "ids", [[5, 6, 7, 2], [9, 3, 2]])
    assert (
        packed(sources.from_inputs([tmp_path / "ids.bin"]), tokenizer_dir, tmp_path / "out")["sources"][0][
            "ends_with"
        ]
        == 2
    )
    (tmp_path / "ids.bin").write_bytes((tmp_path / "ids.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"ids.bin does not fit ids.idx \(24 bytes, expected 28\)"):
        packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "out")


@pytest.mark.parametrize("fit", ["cross", "best"])
def test_rows_go_on_where_they_are_on_the_disk(tmp_path, tokenizer_dir, fit, monkeypatch):
    """Cut off while rows are written: the next run keeps those that the disk was waited for, and the files
    are the same."""
    path = made.write_jsonl(tmp_path / "a.jsonl", [made.text(i, 40) for i in range(80)])
    whole = packed(
        sources.from_inputs([path]), tokenizer_dir, tmp_path / "whole", fit=fit, document_starts=True
    )
    want = {p.name.removeprefix("whole"): p.read_bytes() for p in tmp_path.glob("whole*")}
    monkeypatch.setattr(write_rows, "_BLOCK", 400)
    monkeypatch.setattr(write_rows, "_SYNC", 2000)
    monkeypatch.setattr(pack, "WORTH_KEEPING", 0)
    read, calls, most = token_cache.TokenReader.read_into, 0, 0

    def until(self, part, document, begin):
        nonlocal calls
        calls += 1
        if calls == most:
            raise MemoryError
        read(self, part, document, begin)

    monkeypatch.setattr(token_cache.TokenReader, "read_into", until)
    counts = []
    for most in (40, 50, 0):  # two runs that end, one that does not; each reads less than is missing in all
        calls = 0
        if most:
            with pytest.raises(MemoryError):
                packed(
                    sources.from_inputs([path]),
                    tokenizer_dir,
                    tmp_path / "cut",
                    fit=fit,
                    document_starts=True,
                )
            work = json.loads((tmp_path / ".cut.work" / "progress.json").read_text())
            counts.append(work["rows"])
            with (tmp_path / ".cut.work" / "rows" / ".bin").open("ab") as file:
                file.write(b"half a row")
        else:
            assert (
                packed(
                    sources.from_inputs([path]),
                    tokenizer_dir,
                    tmp_path / "cut",
                    fit=fit,
                    document_starts=True,
                )
                == whole
            )
    assert 0 < counts[0] < counts[1] < whole["rows"]
    assert {p.name.removeprefix("cut"): p.read_bytes() for p in tmp_path.glob("cut*")} == want and not list(
        tmp_path.glob(".cut*")
    )

    # Other settings do not resume from these rows.
    most, calls = 40, 0
    with pytest.raises(MemoryError):
        packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "cut", fit=fit)
    most = 0
    other = packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "cut", fit=fit, seq_length=31)
    assert other["seq_length"] == 31 and IndexedDataset(str(tmp_path / "cut")).sequence_lengths.max() == 32


def test_nothing_of_others_is_lost(tmp_path, tokenizer_dir):
    """Folders and files that this tool did not make are refused, not replaced; a second run at a time leaves
    the first alone."""
    (tmp_path / "in").mkdir()
    path = made.write_jsonl(tmp_path / "in" / "a.jsonl", ["some words", "more words"])
    arguments = (sources.from_inputs([path]), tokenizer_dir, Packing(seq_length=7))
    with pytest.raises(UserError, match=r"--tokens-dir .*in: contains other files; name a new folder"):
        pack.pack(
            *arguments, str(tmp_path / "out"), tokens_dir=tmp_path / "in", workers=1, show_progress=False
        )
    own = corpus(tmp_path / "own", [[5, 6, 7], [8]])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for mix, output, message in (
        (sources.from_inputs([own]), "own", "would replace the input .*own.idx"),
        (sources.from_inputs([path]), "own", "files of that name exist which no earlier run made"),
        (
            sources.from_inputs([tmp_path / "in"]),
            "in/b",
            "is in the input directory .*in; choose a place outside",
        ),
    ):
        with pytest.raises(UserError, match=message):
            packed(mix, tokenizer_dir, tmp_path / output)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match="files of that name exist"):
        packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "c")
    (tmp_path / "c.json").unlink()
    with token_cache.locked(tmp_path / ".out.work"):
        (tmp_path / ".out.work" / "kept").touch()
        with pytest.raises(UserError, match=r".out.work: another process prepares data in it"):
            packed(sources.from_inputs([path]), tokenizer_dir, tmp_path / "out")
        assert (tmp_path / ".out.work" / "kept").exists()
    assert {p: p.read_bytes() for p in before} == before


def test_corpus_changed_in_place_is_read_anew(tmp_path, tokenizer_dir):
    path = corpus(tmp_path / "ids", [[5, 6, 7, 2], [9, 3, 2]])
    arguments = {"tokens_dir": tmp_path / "tokens", "workers": 1, "show_progress": False}
    pack.pack(
        sources.from_inputs([path]), tokenizer_dir, Packing(seq_length=7), str(tmp_path / "out"), **arguments
    )
    numpy.full(7, 123_456, numpy.int32).tofile(tmp_path / "ids.bin")
    with pytest.raises(
        UserError, match=r"contains tokens made from other inputs or settings \(files differ\)"
    ):
        pack.pack(
            sources.from_inputs([path]),
            tokenizer_dir,
            Packing(seq_length=7),
            str(tmp_path / "out"),
            **arguments,
        )


def test_text_that_utf8_cannot_say(tmp_path, tokenizer_dir):
    (tmp_path / "a.jsonl").write_text(
        '{"id": "\\ud800", "text": "abc"}\n{"id": 1, "\\ud801": "abc"}\n{"id": 2, "text": "x"}\n'
    )
    manifest = packed(
        sources.from_inputs([tmp_path / "a.jsonl"], id_key="id"), tokenizer_dir, tmp_path / "out"
    )
    table = pyarrow.parquet.read_table(tmp_path / "out.documents.parquet").to_pylist()
    assert [row["id"] for row in table] == ["\\ud800", None, "2"] and manifest["skipped"]["broken"] == 1
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "b.parquet")
    manifest = packed(sources.from_inputs([tmp_path / "b.parquet"]), tokenizer_dir, tmp_path / "out")
    assert manifest["documents"] == 1 and "row 2: 'text' is not UTF-8" in manifest["first_broken"]


def test_nothing_worth_taking(tmp_path, tokenizer_dir):
    made.write_jsonl(tmp_path / "a.jsonl", [made.text(1, 50), made.text(2, 60)])
    (tmp_path / "mix.yaml").write_text("{tokens: 3, sources: {a: {input: a.jsonl}}}")
    with pytest.raises(UserError, match="less than half of one document"):
        packed(tmp_path / "mix.yaml", tokenizer_dir, tmp_path / "out")
