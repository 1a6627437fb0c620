"""Measuring data preparation: all methods write the same tokens; memory does not grow with the input."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import data_preparation
from tests import processes
from tests import text as made


def test_all_methods_write_the_same_tokens(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer")
    inputs = tuple(
        made.write_jsonl(tmp_path / f"{k}.jsonl", [made.text(10 * k + i, 50 * i) for i in range(1, 9)])
        for k in range(2)
    )
    names: list[str] = []
    result = data_preparation.run(
        data_preparation.DataSettings(inputs=inputs, tokenizer=tokenizer, workers=2, repeats=1),
        torch.device("cpu"),
        "command",
        names.append,
    )
    ours, megatron, datatrove = result.rows
    assert (
        names == ["ours, 1 of 1", "megatron, 1 of 1", "datatrove, 1 of 1"]
        and ours["ours"]
        and not megatron["ours"]
    )
    expected = sum(
        len(made.tokenizer("llama3").encode(json.loads(line)["text"]).ids)
        for path in inputs
        for line in path.open()
    )
    assert (
        ours["tokens"] == megatron["tokens"] == expected
        and ours["tokens_per_second"] == expected / ours["seconds"] > 0
    )
    assert datatrove.get("tokens", expected) == expected or datatrove["note"] == "not installed: datatrove"


def test_memory_does_not_grow_with_the_input(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer", "words")
    peaks = []
    for megabytes in (4, 32):
        inputs = data_preparation.write_sample_input(tmp_path / "made", 2, megabytes)
        assert sum(path.stat().st_size for path in inputs) == pytest.approx(megabytes * 1e6, rel=0.1)
        settings = data_preparation.DataSettings(inputs=inputs, tokenizer=tokenizer, workers=1, repeats=1)
        with processes.spawn_by_interpreter():
            peaks.append(data_preparation.measure_in_process("ours", settings)["peak_bytes"])
    assert peaks[1] - peaks[0] < 24e6, "less than the additional input"


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
