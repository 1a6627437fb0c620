"""Parts of the demo: documents of exact size, and the included base model, which finds pass keys up to its
512 tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahSettings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "demo" / "base"
sys.path.insert(0, str(ROOT / "examples" / "demo"))
import corpus  # noqa: E402


def test_documents_have_their_exact_size(tmp_path: Path) -> None:
    for length, whole in ((64, 1.0), (513, 0.5), (4096, 1.0)):
        corpus.write_documents(
            BASE, tmp_path / "a.jsonl", length=length, rows=6, seed=3, whole=whole
        )  # asserts the sizes
        corpus.write_documents(BASE, tmp_path / "b.jsonl", length=length, rows=6, seed=3, whole=whole)
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 6


def test_answers_equal_the_stated_keys() -> None:
    from transformers import AutoTokenizer

    writer = corpus.Writer(AutoTokenizer.from_pretrained(BASE), seed=5)
    for _ in range(20):
        text = writer.keys(600, 8)
        keys: dict[str, str] = {}
        for sentence in text.split(". "):
            before, found, value = sentence.partition(" is ")
            if found and "The pass key of" in before and value.strip(". ").isdigit():
                name = before.rsplit("The pass key of ", 1)[1]
                assert keys.setdefault(name, value.strip(". ")) == value.strip(". ")
        assert keys


def test_documents_too_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(corpus.UserError, match="--length"):
        corpus.write_documents(BASE, tmp_path / "a.jsonl", length=63, rows=1, seed=0)


def test_the_base_model_finds_keys_up_to_its_context() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 4 * 2**20
    found = hf_config.read_config(BASE)
    assert (
        found.rope.type == "none"
        and json.loads((BASE / "config.json").read_text())["max_position_embeddings"] == 512
    )
    grid = NiahSettings(
        lengths=(512, 2048, 4096), depths=(0.0, 25.0, 50.0, 75.0, 100.0), trials=8
    )  # the demo's own
    result = niah.run(TransformersModel(BASE, device="cpu"), grid)
    percent = {one.length: one.score for one in result.scores}
    assert percent[512] >= 90 and percent[2048] <= 20 and percent[4096] <= 10, percent
