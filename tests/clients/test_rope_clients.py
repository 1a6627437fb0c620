"""What clients really compute from our exported config.json, each in its own environment (`make
test-clients`): the trained frequencies, or exactly the difference that `client_notes` names."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_ultralong.checkpoint.hf.config import export_config
from megatron_ultralong.config import Model
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.client_notes import client_notes
from megatron_ultralong.rope.methods import (
    NTK,
    ChangedBase,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Unscaled,
    YaRN,
)
from tests.clients.environments import installed, probe, require

HEAD_DIM, ORIGINAL, SHORT, EXTENDED = 64, 8192, 1000, 65536
LONG = tuple(1.0 + 39.0 * (i / 31) ** 2 for i in range(32))
FEW = tuple(1.0 + 2.0 * (i / 31) ** 2 for i in range(32))
DIMENSION = YaRN(ramp="dimension", factor=8.0, beta=32.0)
# Those whose rotary classes can be called.
ROTARY_CLIENTS = ("transformers-4.51", "transformers-4.56", "transformers", "vllm")
EXPORTS: dict[str, Rope] = {
    "none": Unscaled(),
    "theta": ChangedBase(theta=1.28e8),
    "linear": Linear(factor=8.0),
    "linear 7.3": Linear(factor=7.3),
    "ntk": NTK(factor=8.0),
    "ntk by length": NTK(factor=8.0, law="length"),
    "dynamic": DynamicNTK(factor=2.0),
    "llama3": Llama3(factor=8.0),
    "yarn over rotations": YaRN(factor=8.0, alpha=0.5, beta=9.5),
    "yarn": dataclasses.replace(DIMENSION, temperature=True),
    "yarn without temperature": DIMENSION,
    "yarn, beta 4": dataclasses.replace(DIMENSION, beta=4.0, temperature=True),
    "yarn, attention factor": dataclasses.replace(DIMENSION, temperature=True, attention_factor=1.1),
    "yarn, truncate=false": dataclasses.replace(DIMENSION, truncate=False),
    "yarn 7.3": dataclasses.replace(DIMENSION, factor=7.3, temperature=True),
    "longrope": LongRoPE(factor=8.0, factors=LONG),
    "longrope, two tables": LongRoPE(factor=8.0, factors=LONG, short_factors=FEW, attention_factor=1.2),
}


def extended(rope: Rope) -> int:
    return min(rope.covered_length() or EXTENDED, EXTENDED) if rope.type != "none" else ORIGINAL


def max_position(rope: Rope) -> int:
    """max_position_embeddings of the export."""
    return rope.exact_max_position() or extended(rope)


def requests(rope: Rope) -> list[tuple[int, int]]:
    """(length of the prompt, length of prompt and new tokens)."""
    return [(SHORT, SHORT), (extended(rope), extended(rope)), (SHORT, extended(rope))]


@functools.cache
def computed(client: str) -> dict[str, list]:
    """What the client computes for each of EXPORTS; skips where it is not installed."""
    require(client)
    model = Model(hidden_size=128, ffn_size=8, layers=1, heads=2, kv_heads=1, head_dim=HEAD_DIM, vocab_size=8)
    with tempfile.TemporaryDirectory() as folder:
        lengths = {}
        for i, rope in enumerate(EXPORTS.values()):
            path = Path(folder, str(i))
            path.mkdir()
            config = export_config(model, rope, max_position(rope), torch.float32)
            (path / "config.json").write_text(json.dumps(config))
            lengths[str(path)] = requests(rope)
        file = Path(folder, "requests.json")
        file.write_text(json.dumps(lengths))
        results = probe(client, f"probe_{client.split('-')[0]}.py", file)
    return dict(zip(EXPORTS, results.values()))


def frequencies(rope: Rope, length: int) -> torch.Tensor:
    return rope.inverse_frequencies(HEAD_DIM, length)[0]


def known_difference(client: str, rope: Rope, prompt: int, total: int) -> tuple[torch.Tensor, float] | None:
    """(frequencies, attention factor) of a client that computes something else; None = as trained."""
    multiplier = rope.multiplier()
    if client == "vllm":
        if isinstance(rope, DynamicNTK) and total > ORIGINAL:
            return frequencies(Unscaled(), total), multiplier
        if isinstance(rope, LongRoPE) and rope.short_factors and total <= ORIGINAL:
            return frequencies(rope, extended(rope)), multiplier
        return None
    if client == "transformers-4.51" and isinstance(rope, YaRN) and rope.ramp == "dimension":
        if not rope.truncate:
            return frequencies(dataclasses.replace(rope, truncate=True), total), multiplier
        ratio = rope.covered_length() / ORIGINAL
        if ratio != rope.factor:
            changed = dataclasses.replace(rope, factor=ratio)
            return frequencies(changed, total), changed.multiplier()
    if rope.depends_on_length() and prompt <= ORIGINAL < total:
        return frequencies(rope, prompt), multiplier
    return None


def served_length(rope: Rope) -> int:
    """The limit of a vLLM server that is started without --max-model-len."""
    if isinstance(rope, Linear | DynamicNTK):
        return int(max_position(rope) * rope.factor)
    return ORIGINAL if isinstance(rope, LongRoPE) else max_position(rope)


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("client", ROTARY_CLIENTS)
def test_client_computes_what_was_trained_or_the_named_difference(client, name):
    rope, results = EXPORTS[name], computed(client)[name]
    for (prompt, total), result in zip(requests(rope), results):
        trained = rope.inverse_frequencies(HEAD_DIM, total)
        expected = known_difference(client, rope, prompt, total) or trained
        found = torch.tensor([float.fromhex(x) for x in result["inv_freq"]])
        assert torch.equal(found, expected[0]), (prompt, total, (found / expected[0] - 1).abs().max())
        if client == "vllm":
            assert result["max_model_len"] == served_length(rope)
            assert result["rows"]
            for position, row in result["rows"].items():
                angles = int(position) * expected[0]
                if isinstance(rope, Linear):  # vLLM divides the position, not the frequency
                    angles = torch.tensor(float(position)) / rope.factor * frequencies(Unscaled(), total)
                table = torch.cat([angles.cos(), angles.sin()]) * expected[1]
                torch.testing.assert_close(torch.tensor(row), table, rtol=0, atol=1e-6)
        else:
            assert result["attention_scaling"] == expected[1]
        if expected is not trained:
            assert not torch.equal(expected[0], trained[0]) or expected[1] != trained[1]


@pytest.mark.parametrize("name", EXPORTS)
def test_every_difference_has_a_warning_and_every_warning_a_difference(name):
    rope = EXPORTS[name]
    different = set()
    clients_here = {client for client in ROTARY_CLIENTS if installed(client)}
    for client in clients_here:
        for (_, total), result in zip(requests(rope), computed(client)[name]):
            found = torch.tensor([float.fromhex(x) for x in result["inv_freq"]])
            trained = rope.inverse_frequencies(HEAD_DIM, total)
            if (
                not torch.equal(found, trained[0])
                or result.get("attention_scaling", trained[1]) != trained[1]
                or result.get("max_model_len", max_position(rope)) != max_position(rope)
            ):
                different.add(client)
    # A client of 4.51 is named by a line of its own, or by the one for all versions.
    clients = {
        "transformers below 4.55": {"transformers-4.51"},
        "transformers 4.51 to 4.55": {"transformers-4.51"},
        "transformers (4.51 to 5.23": {"transformers-4.51", "transformers-4.56", "transformers"},
        "vLLM (0.32.0": {"vllm"},
    }
    lines = [line for line in client_notes(rope) if not line.startswith("llama.cpp (")]  # test_llama_cpp.py
    named = [set().union(*(who for key, who in clients.items() if line.startswith(key))) for line in lines]
    assert all(named), lines
    assert set().union(*named) & clients_here == different, (lines, different)
