"""tools/prepare_data.py: from the command line to rows that the trainer opens; one line per mistake."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from megatron_ultralong.data import packed_rows
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import progress
from tests import text as made

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return made.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def command(monkeypatch, *words) -> None:
    """Run the tool's main in this process, so that its UserError is seen."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *args: None)  # the tests keep their own answer to a signal
    runpy.run_path(str(TOOL))["main"]()


def test_from_documents_to_what_the_trainer_opens(tmp_path, tokenizer_dir, monkeypatch, capsys):
    first, second = (
        made.write_jsonl(tmp_path / f"{i}.jsonl", [made.text(i, 500), made.text(9, 700)], key="body")
        for i in range(2)
    )
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    command(
        monkeypatch,
        "pretrain",
        "--input",
        first,
        second,
        "--tokenizer",
        tokenizer_dir,
        "--seq-length",
        "1K",
        "--output",
        tmp_path / "runs" / "text",
        "--text-key",
        "body",
    )
    manifest = json.loads((tmp_path / "runs" / "text.json").read_text())
    assert (
        manifest["seq_length"] == 1024
        and manifest["separator"]["text"] == "<s>"
        and manifest["documents"] == 4
    )
    printed = capsys.readouterr()
    assert re.search(rf"text: {manifest['rows']} rows of 1024 \+ 1 tokens from 4 documents", printed.out)
    assert re.search(rf"packing: {manifest['rows']} of {manifest['rows']} rows \(100%\)", printed.err)
    rows = packed_rows.open_blend(
        [str(tmp_path / "runs" / "text")], 1024, manifest["tokenizer"]["vocab_size"]
    )
    assert len(rows) == manifest["rows"] > 3

    for words, want in (
        (["--separator", ""], {"text": "", "ids": []}),
        (["--separator-id", "3", "4"], {"text": None, "ids": [3, 4]}),
        (["--separator-token", "eos"], {"text": None, "ids": [1]}),
    ):
        command(
            monkeypatch,
            "pretrain",
            "--input",
            first,
            "--input",
            second,
            "--tokenizer",
            tokenizer_dir,
            "--seq-length",
            "100",
            "--output",
            tmp_path / "more",
            "--text-key",
            "body",
            "--last-row",
            "drop",
            *words,
        )
        manifest = json.loads((tmp_path / "more.json").read_text())
        assert manifest["separator"] == want and manifest["padding"] == 0 < manifest["dropped"]
    with pytest.raises(UserError, match="requires 1025; repack it"):
        packed_rows.open_blend([str(tmp_path / "more")], 1024, 400)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seq-length", "1G"], "--seq-length=1G: expected a whole number, like 4096 or 128K"),
        (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
        (["--workers", "-1"], "--workers -1: must be at least 1"),
        (["--input", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["--text-key", "body"], "line 1: no key 'body' among id, text"),
        (["--tokenizer", "none"], "tokenizer none: no such directory"),
        (["--separator-id", "999999"], "--separator-id 999999: the tokenizer has ids"),
        (["--output", "/dev/null/x"], "--output /dev/null/x cannot be written"),
        (["--seq-length", "1M", "--last-row", "drop"], "less than one row of"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, tokenizer_dir, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    path = made.write_jsonl(tmp_path / "a.jsonl", ["some words"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        command(
            monkeypatch,
            "pretrain",
            "--input",
            path,
            "--tokenizer",
            tokenizer_dir,
            "--seq-length",
            "8",
            "--output",
            tmp_path / "out",
            *words,
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_separators_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(
            monkeypatch,
            "pretrain",
            "--input",
            "a",
            "--tokenizer",
            "b",
            "--seq-length",
            "8",
            "--output",
            "c",
            "--separator",
            "x",
            "--separator-token",
            "eos",
        )
    assert "not allowed with" in capsys.readouterr().err
