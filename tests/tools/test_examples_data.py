"""Example scripts that prepare data sets: the laptop script runs from end to end; the source lists of the
other one are read and agree with each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ultralong.data import conversations
from megatron_ultralong.data.pretrain import sources
from megatron_ultralong.data.sft import select_examples
from megatron_ultralong.errors import UserError
from tests import processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Output folder of the laptop script at a small scale, and what it printed."""
    out = tmp_path_factory.mktemp("laptop")
    settings = {
        "OUT": str(out),
        "MIB": "0.3",
        "SEQ_LENGTH": "8K",
        "TOKENS": "150_000",
        "EXAMPLES": "30",
        "BASE_URL": "",
        "MODEL": "",
        "TOKENIZER": "",
    }
    with processes.on_path(tmp_path_factory.mktemp("python")) as path:
        run = subprocess.run(
            ["bash", EXAMPLES / "laptop_data.sh"],
            env={**os.environ, **settings, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    return out, run.stdout


def test_laptop_removes_planted_questions(made):
    out, printed = made
    reports = {name: json.loads((out / name / "report.json").read_text()) for name in ("text", "chat")}
    found = {
        name: sorted(
            {json.loads(line)["example"] for line in (out / name / "matches.jsonl").read_text().splitlines()}
        )
        for name in reports
    }
    assert found == {"text": ["lamps 0", "lamps 2"], "chat": ["lamps 4", "lamps 6"]}
    assert [reports["text"]["totals"][count] for count in ("cut", "dropped", "broken")] == [2, 0, 1]
    assert [reports["chat"]["totals"][count] for count in ("cut", "dropped", "broken")] == [0, 2, 2]
    for path in [*(out / "text").iterdir(), *(out / "chat").iterdir()]:
        if path.is_dir() or path.name in ("report.json", "matches.jsonl"):
            continue
        raw = (
            pyarrow.parquet.read_table(path).column("text").to_pylist()
            if path.suffix == ".parquet"
            else [path.read_bytes().decode(errors="replace")]
        )
        assert not any("lamps still burn" in text.lower() for text in raw), path
    assert "text              8      2        2          2" in printed


def test_laptop_rows(made):
    out, printed = made
    manifest = {name: json.loads((out / f"{name}.json").read_text()) for name in ("rows", "rows_best", "sft")}
    for name in ("rows", "rows_best"):
        rows = IndexedDataset(str(out / name))
        assert len(rows) == manifest[name]["rows"] >= 18 and all(
            len(rows[i]) == 8193 for i in range(len(rows))
        )
        assert (
            manifest[name]["tokens"] == pytest.approx(150_000, rel=0.05)
            and manifest[name]["skipped"]["empty"] == 1
        )
        assert manifest[name]["skipped"]["duplicate"] >= 1
        assert (out / f"{name}.lengths.png").read_bytes().startswith(b"\x89PNG")
        documents = pyarrow.parquet.read_table(out / f"{name}.documents.parquet").to_pylist()
        for source in manifest[name][
            "sources"
        ]:  # texts differ with Python's version: targets are met within one document
            largest = max(row["tokens"] for row in documents if row["source"] == source["name"])
            assert abs(source["packed"]["tokens"] - source["weight"] * 150_000) <= largest, source
    assert (out / "rows_best.docs.idx").is_file() and not (out / "rows.docs.idx").exists()
    masks = IndexedDataset(f"{out / 'sft'}.mask")
    assert (
        manifest["sft"]["rows"] == manifest["sft"]["documents"] == len(masks) == 30
        and manifest["sft"]["fit"] == "single"
    )
    assert sum(int(numpy.sum(masks[i])) for i in range(len(masks))) == manifest["sft"]["trained_tokens"] > 0
    assert [row["chosen"] for row in manifest["sft"]["domains"].values()] == [6, 6, 18]  # general, math, code
    assert "* = trained on" in printed and re.search(r"^  all .* 100.0% ", printed, re.MULTILINE)


# ---- lists of sources --------------------------------------------------------------------------


def of_script(function: str) -> list[list[str]]:
    """Return the arguments of every call of a function in ultralong_data.sh."""
    lines = (EXAMPLES / "ultralong_data.sh").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith(f"{function} ")]


def test_document_sources_equal_those_of_the_script(tmp_path):
    shutil.copy(EXAMPLES / "ultralong_text.yaml", tmp_path / "text.yaml")
    with pytest.raises(UserError, match="text/clean/web"):
        sources.load(tmp_path / "text.yaml")
    for name, _, files in of_script("text"):
        folder = tmp_path / "text" / "clean" / name
        (folder / ".decontaminate").mkdir(parents=True)
        shard = re.sub(r"\[(\d)-\d\]", r"\1", files.strip('"')).replace(".json.gz", ".jsonl.gz")
        for file in (
            shard,
            "matches.jsonl",
            "broken.jsonl",
            "report.json",
        ):  # files next to the output are not documents
            (folder / file).write_text("")
    found = sources.load(tmp_path / "text.yaml")
    assert sorted(source.name for source in found.sources) == sorted(name for name, *_ in of_script("text"))
    assert all([path.suffix for path in source.files] == [".gz"] for source in found.sources)
    assert found.tokens == 10**9 and all(
        source.lengths is not None and source.lengths.values == (0.25, 1, 3) for source in found.sources
    )
    assert all(source.lengths.edges == (4096, 8192) for source in found.sources)


def test_conversation_sources_equal_those_of_the_script(tmp_path):
    shutil.copy(EXAMPLES / "ultralong_chat.yaml", tmp_path / "chat.yaml")
    for name, *_ in of_script("chat"):
        folder = tmp_path / "chat" / "clean" / name
        (folder / ".decontaminate").mkdir(parents=True)
        for file in (
            "train.jsonl",
            "matches.jsonl",
            "broken.jsonl",
            "report.json",
            ".decontaminate/train.json.json",
        ):
            (folder / file).write_text("")
    found = select_examples.load_sources(tmp_path / "chat.yaml")
    assert {source.name: source.domain for source in found} == {
        name: domain for name, domain, *_ in of_script("chat")
    } and len(found) == 12
    assert all([path.name for path in source.files] == ["train.jsonl"] for source in found)


def test_documentation_has_every_source():
    text = (ROOT / "docs" / "data-sources.md").read_text()
    for hub in [words[-2] for words in of_script("text") + of_script("chat")]:
        assert hub in text


def test_conversations_of_other_data_are_not_hidden(tmp_path):
    """A file with such a name is ignored only if decontamination wrote it."""
    (tmp_path / "matches.jsonl").write_text("")
    assert [path.name for path in conversations.files([str(tmp_path)])] == ["matches.jsonl"]
