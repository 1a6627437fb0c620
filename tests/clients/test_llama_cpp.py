"""Exports in llama.cpp, converted by its convert_hf_to_gguf.py: the logits of transformers, or those of the
difference that `client_warnings` names."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ultralong.checkpoint.hf.config import export_config
from megatron_ultralong.checkpoint.rope_sources import gguf_file
from megatron_ultralong.config import Model
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_config import client_warnings
from megatron_ultralong.rope.methods import DynamicNTK, LongRoPE, Unscaled, YaRN
from tests.clients.environments import ROOT, folder, probe, require
from tests.clients.test_rope_clients import EXPORTS

MODEL = Model(
    hidden_size=128,
    ffn_size=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=64,
    vocab_size=1024,
    tied_embeddings=True,
)
ORIGINAL, LENGTH = 128, 1024
"""Every frequency of theta 200 turns in LENGTH tokens."""
LAST = 64
TOLERANCE = 0.03
"""Of logits with a standard deviation of 2.3, in float32: llama.cpp multiplies angles up from dimension to
dimension, which moves them by up to 0.013; a wrong attention factor moves them by more than 4."""


def scaled(rope: Rope) -> Rope:
    """The method on a model of ORIGINAL tokens."""
    return dataclasses.replace(
        rope, theta=2000.0 if rope.type == "theta" else 200.0, original_length=ORIGINAL
    )


def computed(rope: Rope) -> Rope:
    """What llama.cpp computes."""
    if isinstance(rope, DynamicNTK | LongRoPE):
        return Unscaled(theta=rope.theta, original_length=rope.original_length)
    if isinstance(rope, YaRN) and rope.ramp == "dimension":
        return dataclasses.replace(rope, truncate=True, temperature=True, attention_factor=None)
    return rope


def reference(weights: dict, config: dict, tokens: torch.Tensor) -> numpy.ndarray:
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(tokens, logits_to_keep=LAST).logits[0].float().numpy()


def error(found: numpy.ndarray, expected: numpy.ndarray) -> float:
    return float(numpy.abs(found - expected).max())


def config_of(rope: Rope) -> dict:
    longest = min(rope.covered_length() or LENGTH, LENGTH) if rope.type != "none" else ORIGINAL
    return export_config(MODEL, rope, rope.exact_max_position() or longest, torch.float32)


def test_logits(tmp_path):
    require("llama.cpp")
    torch.manual_seed(0)
    tokens = torch.randint(0, MODEL.vocab_size, (1, LENGTH))
    model = LlamaForCausalLM(LlamaConfig(**config_of(scaled(EXPORTS["none"]))))
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, mean=float("norm" in name), std=0.2)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    models = {}
    for i, (name, rope) in enumerate(EXPORTS.items()):
        path = tmp_path / str(i)
        model.save_pretrained(path)
        (path / "config.json").write_text(json.dumps(config_of(scaled(rope))))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples/demo/base" / file, path)
        models[name] = {"folder": str(path), "override": {}}
    # The keys that a note says to override, of every method that has a note.
    flags: dict[str, dict[str, float]] = {}
    for name, rope in EXPORTS.items():
        for line in client_warnings(scaled(rope)):
            if line.startswith("llama.cpp ("):
                flags.setdefault(name, {})
                if found := re.search(r"--override-kv (\S+)=float:(\S+)$", line):
                    flags[name][found[1]] = float(found[2])
    for name, override in flags.items():
        if override:
            models[f"{name}, as the note says"] = {**models[name], "override": override}
    file = tmp_path / "requests.json"
    file.write_text(
        json.dumps(
            {"source": str(folder("llama.cpp") / "source"), "models": models, "tokens": tokens[0].tolist()}
        )
    )
    results = {
        name: numpy.frombuffer(base64.b64decode(text), dtype="float32").reshape(LAST, -1)
        for name, text in probe("llama.cpp", "probe_llama_cpp.py", file).items()
    }

    different = set()
    for name, rope in EXPORTS.items():
        rope = scaled(rope)
        trained = reference(weights, config_of(rope), tokens)
        assert error(results[name], reference(weights, config_of(computed(rope)), tokens)) < TOLERANCE, name
        if error(results[name], trained) > 50 * TOLERANCE:
            different.add(name)
        else:
            assert error(results[name], trained) < TOLERANCE, name
        read = (
            gguf_file.read(Path(models[name]["folder"], "model.gguf"))
            if not isinstance(rope, LongRoPE)
            else None
        )
        if read:
            found = read.rope.inverse_frequencies(MODEL.head_dim, LENGTH)
            told = computed(rope).inverse_frequencies(MODEL.head_dim, LENGTH)
            torch.testing.assert_close(found[0], told[0], rtol=1e-6, atol=0)
            assert found[1] == pytest.approx(told[1], rel=1e-6)
        if flags.get(name) and rope.truncate:
            assert error(results[f"{name}, as the note says"], trained) < TOLERANCE, name
    assert different == set(flags)
