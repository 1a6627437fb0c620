"""Exports in llama.cpp, converted by its convert_hf_to_gguf.py: the logits of transformers, or those of the
difference that `client_notes` names."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ultralong.checkpoint.hf.config import export_config
from megatron_ultralong.checkpoint.rope_sources import gguf_file
from megatron_ultralong.config import Model
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.client_notes import client_notes
from megatron_ultralong.rope.methods import DynamicNTK, LongRoPE, Unscaled, YaRN
from megatron_ultralong.rope.yarn import Ramp
from tests.clients.environments import ROOT, folder, probe, require
from tests.clients.test_rope_clients import EXPORTS
from tests.clients.test_tokenizer_clients import TEMPLATE

SHAPE: dict[str, Any] = {
    "hidden_size": 128, "ffn_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 64, "vocab_size": 1024,
}  # fmt: skip
MODELS = {
    "llama": Model(**SHAPE, tied_embeddings=True),
    "qwen3": Model(**SHAPE, family="qwen3", qk_norm=True),
}
ORIGINAL, LENGTH = 128, 1024
"""Every frequency of theta 200 turns in LENGTH tokens."""
LAST = 64
TOLERANCE = 0.03
"""Of logits with a standard deviation of 2.3, in float32: llama.cpp computes angles by repeated
multiplication, which moves them by up to 0.013; another frequency or attention factor moves them by more than
4."""


def scaled(rope: Rope) -> Rope:
    """The method on a model of ORIGINAL tokens."""
    return dataclasses.replace(
        rope, theta=2000.0 if rope.type == "theta" else 200.0, original_length=ORIGINAL
    )


def computed(rope: Rope, family: str) -> Rope:
    """What llama.cpp computes."""
    over_dimensions = isinstance(rope, YaRN) and rope.ramp == "dimension"
    if over_dimensions:
        return dataclasses.replace(
            rope, alpha=1.0, beta=32.0, truncate=True, temperature=True, attention_factor=None
        )
    if isinstance(rope, DynamicNTK | LongRoPE) or (isinstance(rope, Ramp) and family == "qwen3"):
        return Unscaled(theta=rope.theta, original_length=rope.original_length)
    return rope


def options(rope: Rope, family: str) -> dict[str, float] | None:
    """The options of the notes, by name; empty where a note has none, None without a note."""
    lines = [line for line in client_notes(rope, family) if line.startswith("llama.cpp (")]
    if not lines:
        return None
    found = re.findall(r"--override-kv (\S+)=float:(\S+)|--(yarn-beta-\w+) (\S+)", "\n".join(lines))
    return {key or name: float(value or number) for key, value, name, number in found}


def write(path: Path, model: Model, rope: Rope) -> None:
    """config.json and tokenizer of an export."""
    longest = min(rope.covered_length() or LENGTH, LENGTH) if rope.type != "none" else ORIGINAL
    config = export_config(model, rope, rope.exact_max_position() or longest, torch.float32)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    base = ROOT / "examples" / "demo" / "base"
    shutil.copy(base / "tokenizer.json", path)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def reference(path: Path, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> numpy.ndarray:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(tokens, logits_to_keep=LAST).logits[0].float().numpy()


def error(found: numpy.ndarray, expected: numpy.ndarray) -> float:
    return float(numpy.abs(found - expected).max())


@pytest.mark.parametrize("family", MODELS)
def test_logits(family, tmp_path):
    require("llama.cpp")
    shape, ropes = MODELS[family], {name: scaled(rope) for name, rope in EXPORTS.items()}
    torch.manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (1, LENGTH))
    write(tmp_path / "none", shape, ropes["none"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "none"))
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, mean=float("norm" in name), std=0.2)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    models, flags = {}, {name: options(rope, family) for name, rope in ropes.items()}
    for i, (name, rope) in enumerate(ropes.items()):
        model.save_pretrained(tmp_path / str(i))
        write(tmp_path / str(i), shape, rope)
        models[name] = {"folder": str(tmp_path / str(i)), "options": {}}
        if flags[name]:
            models[f"{name}, as the note says"] = models[name] | {"options": flags[name]}
    requests = {
        "source": str(folder("llama.cpp-source")),
        "models": models,
        "tokens": tokens[0].tolist(),
    }
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    results = {
        name: numpy.frombuffer(base64.b64decode(text), dtype="float32").reshape(LAST, -1)
        for name, text in probe("llama.cpp", "probe_llama_cpp.py", tmp_path / "requests.json").items()
    }

    reader = GGUFReader(Path(models["none"]["folder"], "model.gguf"))
    assert reader.get_field("tokenizer.chat_template").contents() == TEMPLATE
    for name, rope in ropes.items():
        trained = reference(Path(models[name]["folder"]), weights, tokens)
        write(tmp_path / "computed", shape, computed(rope, family))
        assert error(results[name], reference(tmp_path / "computed", weights, tokens)) < TOLERANCE, name
        if flags[name] is None:
            assert error(results[name], trained) < TOLERANCE, name
        else:
            assert error(results[name], trained) > 50 * TOLERANCE, name
        if flags[name] and rope.truncate:
            assert error(results[f"{name}, as the note says"], trained) < TOLERANCE, name
        # tools/inspect_rope.py says what llama.cpp computes.
        found = gguf_file.read(Path(models[name]["folder"], "model.gguf")).rope
        frequencies, factor = found.inverse_frequencies(shape.head_dim, LENGTH)
        expected = computed(rope, family).inverse_frequencies(shape.head_dim, LENGTH)
        torch.testing.assert_close(frequencies, expected[0], rtol=1e-6, atol=0)
        assert factor == pytest.approx(expected[1], rel=1e-6)
