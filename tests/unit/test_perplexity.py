"""Perplexity by position: buckets against counts by hand, a model against its whole logits, files of
documents, the command."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import likelihood
from megatron_ultralong.evaluate.scorers import loss_by_position
from megatron_ultralong.evaluate.tasks import perplexity
from tests.text import save_tokenizer, text, write_jsonl, write_rows
from tests.tiny import hf_model

ROOT = Path(__file__).parents[2]
MODEL = Model(hidden_size=32, ffn_size=64, layers=2, heads=4, kv_heads=2, head_dim=8, vocab_size=420)


def test_edges() -> None:
    assert loss_by_position.doubling(5000) == [0, 1024, 2048, 4096, 5000] and loss_by_position.doubling(
        4096
    ) == [0, 1024, 2048, 4096]
    assert loss_by_position.doubling(64) == [0, 64] and loss_by_position.doubling(4 << 20)[-2:] == [
        2 << 20,
        4 << 20,
    ]
    assert loss_by_position.equal(32) == list(range(0, 33, 2)) and loss_by_position.equal(5) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_buckets_are_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_by_position, "FIRST", 4)
    nll = torch.arange(40, dtype=torch.float32).view(2, 20) / 10
    nll[0, 3] = float("inf")
    counts = torch.ones(2, 20)
    counts[0, 3] = counts[1, 16:] = 0
    whole = loss_by_position.sums(nll, counts, torch.arange(20), 20)
    # The same by parts in any order, as ranks hold them, and with positions beyond the length.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    parts = sum(loss_by_position.sums(nll[:, part], counts[:, part], part, 20) for part in order.split(7))
    torch.testing.assert_close(parts, whole)
    found = loss_by_position.summary(whole, 20)
    assert [(row["from"], row["to"], row["tokens"]) for row in found["by_position"]] == [
        (0, 4, 7),
        (4, 8, 8),
        (8, 16, 16),
        (16, 20, 4),
    ]
    assert found["by_position"][0]["nll"] == pytest.approx((0 + 0.1 + 0.2 + 2.0 + 2.1 + 2.2 + 2.3) / 7)
    assert found["by_position"][3]["perplexity"] == pytest.approx(math.exp((1.6 + 1.7 + 1.8 + 1.9) / 4))
    assert (
        found["tokens"] == 35
        and sum(row["tokens"] for row in found["by_sixteenth"]) == 35
        and len(found["by_sixteenth"]) == 16
    )
    short = loss_by_position.summary(loss_by_position.sums(nll, counts, torch.arange(20), 6), 6)
    assert short["tokens"] == 11 and short["by_position"][-1]["tokens"] == 4
    assert (
        loss_by_position.summary(
            torch.zeros(2, len(loss_by_position.edges(20)) - 1, dtype=torch.float64), 20
        )["perplexity"]
        is None
    )


class Backend:
    """A small model in transformers."""

    def __init__(self) -> None:
        self.model = hf_model(MODEL)

    def token_nll(self, ids: list[int]) -> torch.Tensor:
        return likelihood.sequence_nll(self.model, ids)

    def describe(self) -> dict[str, Any]:
        return {"path": "tiny"}


def test_a_model_s_losses_are_those_of_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", 7)
    monkeypatch.setattr(loss_by_position, "FIRST", 8)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, MODEL.vocab_size, (3, 49), generator=generator)
    masks = (torch.rand(3, 49, generator=generator) > 0.3).int()
    backend = Backend()
    prefix = write_rows(tmp_path / "rows", rows.tolist(), masks.tolist())
    tokenizer = range(MODEL.vocab_size)
    result = perplexity.measure(
        backend,
        perplexity.read_rows([prefix], tokenizer),
        perplexity.PerplexitySettings(lengths=(48, 20), rows=2),
    )
    with torch.no_grad():
        logits = backend.model(rows[:2, :-1]).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:2, 1:], reduction="none")
    counts = masks[:2, 1:]
    for length in (20, 48):
        got = result.extra["by_length"][str(length)]
        assert [one.count for one in result.scores] == [2, 2] and got["tokens"] == int(
            counts[:, :length].sum()
        )
        for row in [*got["by_position"], *got["by_sixteenth"]]:
            inside = slice(row["from"], row["to"])
            tokens = int(counts[:, inside].sum())
            assert row["tokens"] == tokens
            assert row["nll"] == (
                pytest.approx(float((nll * counts)[:, inside].sum() / tokens), abs=1e-4) if tokens else None
            )
    with pytest.raises(UserError, match=r"--lengths 49: no row is that long \(the longest has 48 tokens\)"):
        perplexity.measure(
            backend, perplexity.read_rows([prefix], tokenizer), perplexity.PerplexitySettings(lengths=(49,))
        )


def test_documents_that_are_long_enough_each_count_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    texts = [text(1, 300), text(2, 5), text(3, 40), text(4, 300)]
    write_jsonl(tmp_path / "a.jsonl", texts[:2], key="body")
    (tmp_path / "b.txt").write_text(texts[2], encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", texts[3:], key="body")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]
    sizes = [len(row[0]) for row in perplexity.read_rows(files, tokenizer, "body")]
    assert sizes == [len(tokenizer.encode(text)) for text in texts] and sizes[1] < 30 < 60 < sizes[
        2
    ] < 400 < min(sizes[0], sizes[3])
    calls: list[int] = []
    backend = Backend()
    backend.model.register_forward_pre_hook(lambda *_: None)
    backend.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    result = perplexity.measure(
        backend,
        perplexity.read_rows(files, tokenizer, "body"),
        perplexity.PerplexitySettings(lengths=(30, 400), rows=2),
    )
    assert {one.length: one.count for one in result.scores} == {30: 2, 400: 2}
    assert calls == [400, 30, 400], (
        "each document once, at its longest; the third for the longer length alone"
    )


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model(MODEL).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", [text(1, 900), text(2, 900)])

    def run(*arguments: Path | str) -> None:
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evaluate.py",
                "perplexity",
                "--model",
                str(tmp_path / "model"),
                "--data",
                str(tmp_path / "a.jsonl"),
                "--device",
                "cpu",
                *map(str, arguments),
            ],
        )
        runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]()

    run("--lengths", "500,1K", "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (
        result["task"] == "perplexity"
        and [one["length"] for one in result["scores"]] == [500, 1024]
        and result["model"]["path"] == "model"
    )
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "position" in printed and f"{result['scores'][1]['score']:.3f}" in printed
    assert result["settings"] == {
        "lengths": [500, 1024],
        "rows": 32,
        "text_key": "text",
        "data": [{"name": "a.jsonl", "bytes": (tmp_path / "a.jsonl").stat().st_size}],
    }
    (tmp_path / "blocked" / "perplexity.png").mkdir(parents=True)
    with pytest.raises(UserError, match="perplexity.png cannot be written"):
        run("--lengths", "500", "--output", tmp_path / "blocked")
    kept = json.loads((tmp_path / "blocked" / "perplexity.json").read_text())
    assert kept["scores"][0]["score"] == pytest.approx(result["scores"][0]["score"]), "nothing is lost"
    run("--lengths", "1K", "--output", tmp_path / "more", "--beside", tmp_path / "out" / "perplexity.json")
    for bad, message in (
        ({"format": 1, "task": "standard", "scores": {"MMLU": 1.0}}, "is not a result of `perplexity`"),
        ([], "is not a benchmark result"),
        ({"format": 1, "task": "perplexity", "scores": {}}, "no scores"),
        (
            {"format": 1, "task": "perplexity", "scores": {"4096": {"perplexity": 2.0}}},
            "lack perplexity, by_position or by_sixteenth",
        ),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):  # before the model is looked for
            run(
                "--model",
                tmp_path / "none",
                "--lengths",
                "1K",
                "--output",
                tmp_path / "bad",
                "--beside",
                tmp_path / "bad.json",
            )
    with pytest.raises(UserError, match="no-such.jsonl"):
        run(
            "--model",
            tmp_path / "none",
            "--data",
            tmp_path / "no-such.jsonl",
            "--lengths",
            "1K",
            "--output",
            tmp_path / "bad",
        )
    assert not (tmp_path / "bad").exists()


def test_documents_while_training_need_a_tokenizer_and_length(tmp_path: Path) -> None:
    from megatron_ultralong.evaluate.tasks.perplexity_in_training import during_training

    save_tokenizer(tmp_path / "tokenizer")
    file = write_jsonl(tmp_path / "a.jsonl", [text(1, 300), text(2, 5), text(3, 300)])
    run = SimpleNamespace(train=SimpleNamespace(seq_length=100, eval_rows=5))
    prepare = during_training([str(file)], tmp_path)
    with pytest.raises(UserError, match="needs a tokenizer"):
        prepare(run, None, 420)
    with pytest.raises(UserError, match="but the model's vocabulary has 30"):
        prepare(run, tmp_path / "tokenizer", 30)
    assert callable(prepare(run, tmp_path / "tokenizer", 420))
    run.train.seq_length = 10**5
    with pytest.raises(UserError, match="no document is longer than train.seq_length=100000"):
        prepare(run, tmp_path / "tokenizer", 420)
    packed = write_rows(tmp_path / "rows", [[1] * 9])
    with pytest.raises(UserError, match="not both"):
        during_training([str(file), packed], tmp_path)(run, None, 420)
    assert numpy.shape(perplexity.PackedDataset(packed, 8)[0][0]) == (9,)
