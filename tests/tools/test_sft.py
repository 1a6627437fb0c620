"""Conversations to rows that the trainer reads: which tokens count, which examples are taken, the same bytes
whatever the workers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import runpy
import signal
import sys
import time
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from megatron_ultralong.data import loader, packed_rows
from megatron_ultralong.data.sft import pack, select_examples
from megatron_ultralong.data.sft.settings import SftSettings
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.errors import UserError
from tests import chat as made
from tests import processes
from tests.packed import joined

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
S = 256


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return made.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run the tool's main in this process, so that its UserError is raised here."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *args: None)  # the tests keep their own signal handlers
    runpy.run_path(str(TOOL))["main"]()


def prepared(
    tmp_path: Path, tokenizer_dir: Path, records: list[Any], name: str = "out", **settings: Any
) -> dict[str, Any]:
    source = select_examples.ConversationSource(
        name="s", files=(made.write_jsonl(tmp_path / f"{name}.jsonl", records),), domain="general"
    )
    return pack.pack_conversations(
        [source],
        tokenizer_dir,
        str(tmp_path / name),
        SftSettings(**{"seq_length": S, **settings}),
        show_progress=False,
    )


def contents(prefix: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))
        if not path.name.endswith(".jsonl")
    }


def expected(tokenizer_dir: Path, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(ids, ids trained on), from transformers' tokens alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
    trained = [
        i
        for turn in record["messages"]
        if turn["role"] == "assistant"
        for i in [
            *tokenizer(turn["content"].strip(), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
    ]
    return ids, trained


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2])
def test_the_loss_counts_the_answers_and_nothing_else(tmp_path, tokenizer_dir, cp):
    records = [made.asked(seed, turns=1 + seed % 2, words=3 + seed // 2) for seed in range(20)]
    manifest = prepared(tmp_path, tokenizer_dir, records, cp=cp)
    assert manifest["documents"] == 20
    by_ids = {tuple(ids): trained for ids, trained in (expected(tokenizer_dir, record) for record in records)}
    rows = packed_rows.open_blend(
        [str(tmp_path / "out")], S, manifest["tokenizer"]["vocab_size"], document_starts=True
    )
    assert len(rows) == manifest["rows"] > 2

    counted, seen = 0, 0
    ranks = [
        list(
            islice(
                loader.batches(
                    rows,
                    loader.BatchShard(cp_rank=rank, cp=cp, inside_documents=True),
                    consumed=0,
                    seed=3,
                ),
                len(rows),
            )
        )
        for rank in range(cp)
    ]
    for number in range(len(rows)):
        shares = [rank[number] for rank in ranks]
        which, place = rows.locate(number, 3)
        starts = [*rows.datasets[which].document_starts(place), S + 1]
        begins = [start for start in starts if start < S]
        whole = {
            name: joined([share[name] for share in shares], begins, dim=1)[0]
            for name in ("tokens", "labels", "loss_mask")
        }
        counted += int(sum(share["loss_mask"].sum() for share in shares))
        row = torch.cat([whole["tokens"], whole["labels"][-1:]])
        marks = torch.cat([torch.zeros(1), whole["loss_mask"]])
        for share in shares:
            assert begins == ([0] if share["placement"] is None else list(share["placement"].starts))
        for begin, end in pairwise(starts):
            ids = row[begin:end].tolist()
            if set(ids) == {manifest["pad_id"]}:
                assert end == S + 1 and not marks[begin:end].any(), (
                    "padding is a document of its own, and masked"
                )
                continue
            assert [i for i, on in zip(ids, marks[begin:end].tolist()) if on] == by_ids[tuple(ids)]
            seen += 1
    assert seen == len(records)
    assert counted == sum(map(len, by_ids.values())) == manifest["trained_tokens"]
    assert manifest["tokens"] == sum(map(len, by_ids)) == manifest["rows"] * (S + 1) - manifest["padding"]


def test_padding_is_not_the_token_that_ends_a_turn(tmp_path, tokenizer_dir):
    ids = AutoTokenizer.from_pretrained(tokenizer_dir).get_vocab()
    assert prepared(tmp_path, tokenizer_dir, [made.asked(0)])["pad_id"] == ids["<|finetune_right_pad_id|>"]
    own = made.save_tokenizer(tmp_path / "own", pad_token="<|end_of_text|>")
    assert prepared(tmp_path, own, [made.asked(0)])["pad_id"] == ids["<|end_of_text|>"]
    same = made.save_tokenizer(tmp_path / "same", pad_token="<|eot_id|>")
    assert prepared(tmp_path, same, [made.asked(0)])["pad_id"] == ids["<|finetune_right_pad_id|>"]
    chatml = made.save_tokenizer(tmp_path / "chatml", made.CHATML, made.CHATML_TOKENS)
    manifest = prepared(tmp_path, chatml, [made.asked(0)])
    assert (
        manifest["pad_id"] == AutoTokenizer.from_pretrained(chatml).eos_token_id
        and manifest["template"]["spans"] == "prefix"
    )


def test_a_row_filled_to_the_last_token(tmp_path, tokenizer_dir):
    record, length = next(
        (record, length)
        for record in map(made.asked, range(20))
        if (length := len(expected(tokenizer_dir, record)[0])) % 2
    )
    manifest = prepared(tmp_path, tokenizer_dir, [record], seq_length=length - 1)
    rows = packed_rows.PackedDataset(str(tmp_path / "out"), length - 1)
    assert (manifest["rows"], manifest["padding"], rows.document_starts(0)) == (1, 0, [0]) and rows[0][
        0
    ].tolist() == expected(tokenizer_dir, record)[0]


def test_one_conversation_per_row(tmp_path, tokenizer_dir):
    records = [made.asked(i) for i in range(5)]
    manifest = prepared(tmp_path, tokenizer_dir, records, fit="single")
    rows = packed_rows.PackedDataset(str(tmp_path / "out"), S)
    want = sorted(expected(tokenizer_dir, record)[0] for record in records)
    assert (
        manifest["rows"] == 5
        and manifest["tokens"] == sum(map(len, want)) == 5 * (S + 1) - manifest["padding"]
    )
    assert sorted(rows[i][0][: rows.document_starts(i)[1]].tolist() for i in range(5)) == want and all(
        len(rows.document_starts(i)) == 2 for i in range(5)
    )


# ---- which examples ----------------------------------------------------------------------------


def test_every_record_is_counted(tmp_path, tokenizer_dir):
    long = made.asked(3, turns=3, words=30)
    same = made.asked(1)
    same["messages"][0]["content"] = same["messages"][0]["content"].upper().replace(" ", "\n ")
    trailing = made.asked(5)
    trailing["messages"].append({"role": "user", "content": "thanks"})
    spelled = made.asked(6)
    spelled["messages"][1]["content"] += "<|eot_id|>"
    records = [
        made.asked(1),
        "{",
        same,
        made.asked(2),
        long,
        trailing,
        spelled,
        {"messages": [{"role": "tool", "content": "x"}]},
    ]
    manifest = prepared(tmp_path, tokenizer_dir, records)
    counts = manifest["sources"][0]
    assert {
        key: counts[key]
        for key in (
            "read",
            "broken",
            "unsupported",
            "duplicates",
            "too_long",
            "usable",
            "turns_cut",
            "cut_to_length",
            "special_tokens",
        )
    } == {
        "read": 8,
        "broken": 1,
        "unsupported": 1,
        "duplicates": 1,
        "too_long": 1,
        "usable": 4,
        "turns_cut": 1,
        "cut_to_length": 0,
        "special_tokens": 1,
    }
    assert manifest["special_tokens"] == {"encoded_as": "text", "spelled_out": 1}
    assert (
        manifest["documents"] == counts["chosen"] == 4
        and counts["files"][0]["bytes"] == (tmp_path / "out.jsonl").stat().st_size
    )
    broken = [json.loads(line) for line in (tmp_path / "out.broken.jsonl").read_text().splitlines()]
    assert [(b["place"].rsplit(", ")[1], b["kind"]) for b in broken] == [
        ("line 2", "broken"),
        ("line 8", "unsupported"),
    ]
    control = prepared(tmp_path, tokenizer_dir, [spelled], name="control", special_tokens="control")
    text = prepared(tmp_path, tokenizer_dir, [spelled], name="text")
    assert control["special_tokens"] == {"encoded_as": "control", "spelled_out": 1}
    eot = load_tokenizer(tokenizer_dir).backend.token_to_id("<|eot_id|>")
    rows = [packed_rows.PackedDataset(str(tmp_path / name), S)[0] for name in ("text", "control")]
    assert [(row == eot).sum() for row, _ in rows] == [3, 4]  # at the end of system, user and assistant
    assert [((row == eot) * mask).sum() for row, mask in rows] == [1, 2]
    assert text["tokens"] - control["tokens"] == text["trained_tokens"] - control["trained_tokens"] > 1

    cut = prepared(tmp_path, tokenizer_dir, [long], name="cut", long="cut")
    ids, _ = expected(tokenizer_dir, {"messages": long["messages"][:4]})
    if len(ids) > S + 1:
        ids, _ = expected(tokenizer_dir, {"messages": long["messages"][:2]})
    rows = packed_rows.PackedDataset(str(tmp_path / "cut"), S)
    row, _ = rows[0]
    assert (
        cut["sources"][0]["cut_to_length"] == 1
        and row[: len(ids)].tolist() == ids
        and cut["tokens"] == len(ids)
    )
    assert not (tmp_path / "cut.broken.jsonl").exists()
    with pytest.raises(
        UserError, match="none of 1 records is a conversation of up to 257 tokens; 1 too long"
    ):
        prepared(tmp_path, tokenizer_dir, [long], name="none")


def test_shares_are_rounded_to_the_sum():
    thirds = dict.fromkeys(("general", "math", "code"), Fraction(1))
    assert sum(select_examples.domain_quotas({}, 100, thirds).values()) == 100
    assert select_examples.domain_quotas(
        {}, 8, select_examples.parse_mix("general=0.5,math=0.25,code=0.25")
    ) == {
        "general": 4,
        "math": 2,
        "code": 2,
    }
    assert select_examples.domain_quotas({"general": 30, "math": 10}, None, None) == {
        "general": 30,
        "math": 10,
    }
    assert select_examples.domain_quotas({"general": 30, "math": 10}, 20, None) == {"general": 15, "math": 5}
    assert select_examples.domain_quotas({"general": 30, "math": 10}, 100, None) == {
        "general": 30,
        "math": 10,
    }
    for text in ("general", "general=x", "poems=1", "math=-1", "math=0"):
        with pytest.raises(UserError, match="--mix"):
            select_examples.parse_mix(text)


def test_sources_give_equal_numbers_as_far_as_available():
    assert select_examples.split_evenly([100, 100, 100], 60) == [20, 20, 20]
    assert select_examples.split_evenly([100, 5, 100], 65) == [30, 5, 30]
    assert select_examples.split_evenly([4, 5, 6], 100) == [4, 5, 6]
    assert (
        select_examples.split_evenly([10, 10, 10], 7) == [2, 2, 3]
        and select_examples.split_evenly([0, 10], 3) == [0, 3]
        and select_examples.split_evenly([], 3) == []
    )


def sources_file(tmp_path: Path) -> Path:
    """Six sources of three domains; their examples are distinguished by the number in the question."""
    names = {
        "share": ("general", 40),
        "orca": ("general", 5),
        "gsm": ("math", 30),
        "meta": ("math", 30),
        "magic": ("code", 4),
        "wizard": ("code", 30),
    }
    entries: dict[str, Any] = {}
    for k, (name, (domain, count)) in enumerate(names.items()):
        made.write_jsonl(tmp_path / f"{name}.jsonl", [made.asked(100 * k + i, words=5) for i in range(count)])
        entries[name] = {"input": f"{name}.jsonl", "domain": domain}
    entries["share"]["input"] = ["share.jsonl"]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"sources": entries}, sort_keys=False))
    return tmp_path / "sources.yaml"


def test_from_the_command_line_by_domain_and_source(tmp_path, tokenizer_dir, monkeypatch, capsys):
    words = [
        "sft",
        "--sources",
        sources_file(tmp_path),
        "--tokenizer",
        tokenizer_dir,
        "--seq-length",
        S,
        "--examples",
        40,
        "--mix",
        "general=0.5,math=0.25,code=0.25",
        "--workers",
        1,
    ]
    command(monkeypatch, *words, "--output", tmp_path / "a")
    manifest = json.loads((tmp_path / "a.json").read_text())
    assert {one["name"]: one["chosen"] for one in manifest["sources"]} == {
        "share": 15,
        "orca": 5,
        "gsm": 5,
        "meta": 5,
        "magic": 4,
        "wizard": 6,
    }
    assert {
        name: (one["usable"], one["wanted"], one["chosen"]) for name, one in manifest["domains"].items()
    } == {"general": (45, 20, 20), "math": (60, 10, 10), "code": (34, 10, 10)}
    printed = capsys.readouterr()
    assert f"{manifest['rows']:,} rows of 256 + 1 tokens, 40 conversations" in printed.out
    for total in ("chosen", "tokens", "trained_tokens"):
        assert sum(one[total] for one in manifest["sources"]) == sum(
            one[total] for one in manifest["domains"].values()
        )

    command(monkeypatch, *words, "--output", tmp_path / "b")
    command(monkeypatch, *words, "--output", tmp_path / "c", "--seed", 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    command(monkeypatch, *words[:5], *words[5:7], "--output", tmp_path / "all", "--workers", 1)
    assert json.loads((tmp_path / "all.json").read_text())["documents"] == 139


def test_a_domain_with_too_few_examples_is_reported(tmp_path, tokenizer_dir, monkeypatch, capsys):
    command(
        monkeypatch,
        "sft",
        "--input",
        made.write_jsonl(
            tmp_path / "a.jsonl", [{**made.asked(i), "domain": ("math", "code")[i > 1]} for i in range(12)]
        ),
        "--tokenizer",
        tokenizer_dir,
        "--seq-length",
        S,
        "--examples",
        8,
        "--mix",
        "math=0.5,code=0.5",
        "--workers",
        1,
        "--output",
        tmp_path / "out",
    )
    assert "math: 2 of 4 requested; no more are available" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["domains"]["code"]["chosen"] == 4 and manifest["documents"] == 6


# ---- runs --------------------------------------------------------------------------------------


def test_the_same_bytes_for_any_workers_and_after_a_kill(tmp_path, tokenizer_dir):
    records = made.write_jsonl(tmp_path / "a.jsonl", [made.asked(i, words=10 + i % 30) for i in range(3000)])

    def call(name: str, workers: int) -> list[str]:
        return [
            sys.executable,
            str(TOOL),
            "sft",
            "--input",
            str(records),
            "--tokenizer",
            str(tokenizer_dir),
            "--seq-length",
            "512",
            "--examples",
            "2000",
            "--workers",
            str(workers),
            "--output",
            str(tmp_path / name),
        ]

    killed = processes.Popen(call("out", 2), stdout=processes.DEVNULL, stderr=processes.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob(".out.partial-*/lock"))
        and killed.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out.json").exists() and len(list(tmp_path.glob(".out.partial-*"))) == 1

    processes.run(call("out", 4), check=True, capture_output=True)
    assert not list(tmp_path.glob(".out.partial-*")), "what the killed run left is gone"
    processes.run(call("one", 1), check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "one.json").read_text())["documents"] == 2000


def test_a_live_run_keeps_its_folder(tmp_path):
    live, own = tmp_path / ".out.partial-live", tmp_path / ".out.partial-own"
    for folder in (live, own):
        folder.mkdir()
    with (
        pack._remove_abandoned(live, str(tmp_path / "out")),
        pack._remove_abandoned(own, str(tmp_path / "out")),
    ):
        assert live.exists() and own.exists()
    third = tmp_path / ".out.partial-third"
    third.mkdir()
    with pack._remove_abandoned(third, str(tmp_path / "out")):
        assert not live.exists() and not own.exists() and third.exists()


def test_a_file_system_without_locks_removes_no_folder(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    other, own = tmp_path / ".out.partial-other", tmp_path / ".out.partial-own"
    for folder in (other, own):
        folder.mkdir()
    (other / "lock").touch()
    with pack._remove_abandoned(own, str(tmp_path / "out")):
        assert other.exists() and own.exists()


def test_show_prints_tokens_and_marks_and_writes_nothing(tmp_path, tokenizer_dir, monkeypatch, capsys):
    record = made.asked(0, turns=2)
    path = made.write_jsonl(tmp_path / "a.jsonl", [record, "{", made.asked(1)])
    before = sorted(tmp_path.rglob("*"))
    command(monkeypatch, "sft", "--input", path, "--tokenizer", tokenizer_dir, "--show", 2)
    lines = capsys.readouterr().out.splitlines()
    ids, trained = expected(tokenizer_dir, record)
    shown = [line for line in lines if line[:1] in ("*", " ") and line[2:9].strip().isdigit()]
    assert [int(line[2:9]) for line in shown] == ids and [
        int(line[2:9]) for line in shown if line[0] == "*"
    ] == trained
    assert (
        lines[0] == "template llama3.1 (segments); * = trained on"
        and "line 2: cannot be used: not JSON" in lines[-1]
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seq-length", "255"], "--seq-length 255: must be divisible by 2 x CP = 2; use 254"),
        (["--seq-length", "128", "--max-tokens", "130"], "--max-tokens 130: a row has 128 + 1 tokens"),
        (["--cp", "3"], "--seq-length 256: must be divisible by 2 x CP = 6; use 252"),
        (["--max-tokens", "300"], "--max-tokens 300: a row has 256 + 1 tokens"),
        (["--mix", "math=1"], "--mix requires --examples, the total number of examples"),
        (["--mix", "math=1", "--examples", "3"], "--mix: the input has no example of domain math"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--examples", "0"], "--examples 0: must be at least 1"),
        (["--show", "0"], "--show 0: must be at least 1"),
        (["--form", "x"], "form x: must be auto"),
        (["--tokenizer", "none"], "tokenizer none: no such directory"),
        (["--output", "/dev/null/x"], "--output /dev/null/x cannot be written"),
        (["--input", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, tokenizer_dir, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    path = made.write_jsonl(tmp_path / "a.jsonl", [made.asked(0)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        command(
            monkeypatch,
            "sft",
            "--input",
            path,
            "--domain",
            "code",
            "--tokenizer",
            tokenizer_dir,
            "--seq-length",
            S,
            "--workers",
            1,
            "--output",
            tmp_path / "out",
            *words,
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "not YAML"),
        ("sources: {a: {input: x}, a: {input: y}}", "duplicate key a"),
        ("a: {input: x}", "must contain `sources:`"),
        ("sources: {}", "must contain `sources:`"),
        ("sources: {a: {input: a.jsonl, text: b}}", "a: must contain input, and optionally domain and form"),
        ("sources: {a: {domain: math}}", "a: input must be"),
        ("sources: {a: {input: a.jsonl, domain: poems}}", "a: unknown domain poems"),
        ("sources: {a: {input: b.jsonl}}", "b.jsonl: cannot be read"),
    ],
)
def test_a_mistake_in_the_file_of_sources(tmp_path, text, message):
    made.write_jsonl(tmp_path / "a.jsonl", [made.asked(0)])
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        select_examples.load_sources(tmp_path / "s.yaml")
    assert "\n" not in str(error.value)
