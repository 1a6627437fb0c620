"""The benchmark of preparing data: all write the same tokens; memory does not grow with the input."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import data_preparation
from tests import text as made


def test_all_write_the_same_tokens_and_what_is_absent_is_told(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer")
    inputs = tuple(
        made.write_jsonl(tmp_path / f"{k}.jsonl", [made.text(10 * k + i, 50 * i) for i in range(1, 9)])
        for k in range(2)
    )
    said: list[str] = []
    found = data_preparation.run(
        data_preparation.DataSettings(inputs=inputs, tokenizer=tokenizer, workers=2, repeats=1),
        torch.device("cpu"),
        "command",
        said.append,
    )
    ours, megatron, datatrove = found.rows
    assert (
        said == ["ours, 1 of 1", "megatron, 1 of 1", "datatrove, 1 of 1"]
        and ours["ours"]
        and not megatron["ours"]
    )
    want = sum(
        len(made.tokenizer("llama3").encode(json.loads(line)["text"]).ids)
        for path in inputs
        for line in path.open()
    )
    assert (
        ours["tokens"] == megatron["tokens"] == want
        and ours["tokens_per_second"] == want / ours["seconds"] > 0
    )
    assert datatrove.get("tokens", want) == want or datatrove["note"] == "not installed: datatrove"


def test_memory_does_not_grow_with_the_input(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer", "words")
    peaks = []
    for megabytes in (4, 32):
        inputs = data_preparation.write_sample_input(tmp_path / "made", 2, megabytes)
        assert sum(path.stat().st_size for path in inputs) == pytest.approx(megabytes * 1e6, rel=0.1)
        peaks.append(
            data_preparation.measure_in_process(
                "ours",
                data_preparation.DataSettings(inputs=inputs, tokenizer=tokenizer, workers=1, repeats=1),
            )["peak_bytes"]
        )
    assert peaks[1] - peaks[0] < 24e6, "less than the input that came in addition"


def test_mistakes(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer")
    path = made.write_jsonl(tmp_path / "a.jsonl", ["x"])
    for settings, message in (
        ({"inputs": ()}, "--input: expected existing .jsonl"),
        ({"tokenizer": tmp_path}, "no tokenizer.json"),
        ({"methods": ("x",)}, "--methods x: choose from ours, megatron, datatrove"),
    ):
        with pytest.raises(UserError, match=message):
            data_preparation.DataSettings(
                **({"inputs": (path,), "tokenizer": tokenizer, "workers": 1, "repeats": 1} | settings)
            )
