"""RoPE against transformers: bit-equal frequencies, the same attention factor, and config.json read alike by
both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_ultralong.config import Rope
from megatron_ultralong.model.rotary_embedding import apply_rope, cos_sin
from megatron_ultralong.rope.hf_config import from_hf, to_hf
from megatron_ultralong.rope.methods import inverse_frequencies, same_maths

ORIGINAL = "original_max_position_embeddings"
HEAD_DIMS = (6, 16, 64, 96, 128)
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 8,
    "max_position_embeddings": 131072,
}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}

# (rope_theta, the other keys)
SETTINGS: list[tuple[float, dict[str, Any]]] = [
    *((theta, {"rope_type": "default"}) for theta in (500000.0, 100000, 10000.0, 3580165449.0, 1.28e8)),
    (500000.0, {"rope_type": "llama3", **LLAMA31}),
    (500000, {"rope_type": "llama3", **LLAMA31, "factor": 32}),
    *((500000.0, {"rope_type": "llama3", **LLAMA31, "factor": s}) for s in (1.0, 128.0, 256.0, 512.0)),
    (10000.0, {"rope_type": "llama3", **LLAMA31, "factor": 8.0, ORIGINAL: 512}),
    (
        100000.0,
        {
            "rope_type": "llama3",
            "factor": 7.3,
            "low_freq_factor": 0.7,
            "high_freq_factor": 11.5,
            ORIGINAL: 8191,
        },
    ),
    *(
        (500000.0, {"rope_type": "yarn", "factor": s, ORIGINAL: 8192, "beta_fast": 4.0, "beta_slow": 1.0})
        for s in (1.0, 128.0, 256.0, 512.0)
    ),
    (
        500000.0,
        {"rope_type": "yarn", "factor": 16.0},
    ),  # betas 32 and 1, original length = max_position_embeddings
    (10000, {"rope_type": "yarn", "factor": 4, ORIGINAL: 2048, "finetuned": True}),
    (10000.0, {"rope_type": "yarn", "factor": None, ORIGINAL: 8192}),  # factor = 131072 / 8192
    (500000.0, {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192, "truncate": False}),
    (500000.0, {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192, "attention_factor": 1.0}),
    (
        500000.0,
        {
            "rope_type": "yarn",
            "factor": 128.0,
            ORIGINAL: 8192,
            "attention_factor": 1.25,
            "beta_fast": 64,
            "beta_slow": 0.5,
            "truncate": False,
        },
    ),
    (10000.0, {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 1.0, "mscale_all_dim": 1.0}),
    (10000.0, {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 0.707, "mscale_all_dim": 1.3}),
    (10000.0, {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 0.707}),
    # Both ends of the ramp at one index, or beyond the last or first one.
    (10000.0, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 100, "beta_fast": 40.0, "beta_slow": 20.0}),
    (20.0, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 100000, "beta_fast": 2.0, "beta_slow": 1.0}),
]

# What can be exported, with max_position_embeddings.
EXPORTS = [
    (Rope(theta=10000.0), 512),
    (Rope(type="llama3", factor=8.0), 131072),
    *((Rope(type="yarn", factor=s), int(s * 8192)) for s in (128.0, 256.0, 512.0)),
    (Rope(type="yarn", factor=128.0), 1073152),  # longer than factor x original, as released models have it
    (Rope(type="yarn", factor=8.0, theta=10000.0, original_length=512, alpha=0.5, beta=9.5), 4096),
    (Rope(type="yarn", factor=1.0, temperature=True), 8192),  # a temperature of 1
    *(
        (Rope(type="yarn", ramp="dimension", factor=s, temperature=temperature), int(s * 8192))
        for s in (128.0, 512.0)
        for temperature in (True, False)
    ),
    (
        Rope(
            type="yarn",
            ramp="dimension",
            factor=16.0,
            temperature=True,
            attention_factor=1.1,
            beta=32.0,
            truncate=False,
        ),
        131072,
    ),
]


def hf_rope(
    theta: float, block: dict[str, Any], head_dim: int, style: str, others: dict[str, Any] | None = None
) -> tuple[dict[str, Any], LlamaRotaryEmbedding]:
    """(config.json's keys, transformers' module), the settings said in one of four styles."""
    block = dict(block)
    if style == "rope_parameters":
        config: dict[str, Any] = {"rope_parameters": {**block, "rope_theta": theta}}
    elif style == "theta within rope_scaling":
        config = {"rope_scaling": {**block, "rope_theta": theta}}
    else:
        if style == "type":
            block["type"] = block.pop("rope_type")
        config = {"rope_scaling": None if block == {"rope_type": "default"} else block, "rope_theta": theta}
    config = {**BASE, "hidden_size": 2 * head_dim, "head_dim": head_dim, **config, **(others or {})}
    return config, LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config)))


def read_by_transformers(folder: Path, keys: dict[str, Any], head_dim: int) -> LlamaRotaryEmbedding:
    """transformers' module from a config.json on disk that holds `keys`."""
    (folder / "config.json").write_text(
        json.dumps({**BASE, "hidden_size": 2 * head_dim, "head_dim": head_dim, **keys})
    )
    return LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type", "theta within rope_scaling"])
@pytest.mark.parametrize(("theta", "block"), SETTINGS)
def test_frequencies_are_bit_equal(theta, block, style):
    for head_dim in HEAD_DIMS:
        config, theirs = hf_rope(theta, block, head_dim, style)
        frequencies, attention_factor = inverse_frequencies(from_hf(config), head_dim)
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, theirs.inv_freq), head_dim
        assert attention_factor == theirs.attention_scaling


def test_the_settings_are_all_different():
    """Or a setting that is read but has no effect on either side would go unseen."""
    settings = [(theta, block) for theta, block in SETTINGS if block.get("factor") != 1.0]
    seen = [hf_rope(theta, block, 128, "rope_parameters")[1] for theta, block in settings]
    alike = {
        (i, j)
        for i, a in enumerate(seen)
        for j, b in enumerate(seen[:i])
        if torch.equal(a.inv_freq, b.inv_freq) and a.attention_scaling == b.attention_scaling
    }
    assert not alike, [(settings[i], settings[j]) for i, j in alike]


def test_original_length_outside_of_the_block():
    """Where transformers also looks for it."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config, theirs = hf_rope(10000.0, yarn, 64, "rope_scaling", {ORIGINAL: 4096})
    assert from_hf(config).original_length == 4096
    assert torch.equal(inverse_frequencies(from_hf(config), 64)[0], theirs.inv_freq)
    assert not torch.equal(theirs.inv_freq, hf_rope(10000.0, yarn, 64, "rope_scaling")[1].inv_freq)


@pytest.mark.parametrize(("rope", "max_position"), EXPORTS)
def test_exports_are_read_alike(tmp_path, rope, max_position):
    keys = to_hf(rope, max_position)
    for head_dim in (64, 128):
        theirs = read_by_transformers(tmp_path, keys, head_dim)
        frequencies, attention_factor = inverse_frequencies(rope, head_dim)
        assert torch.equal(frequencies, theirs.inv_freq) and attention_factor == theirs.attention_scaling
        assert theirs.config.max_position_embeddings == max_position
        # Ours back from ours, and from what transformers makes of it when it saves the config again.
        theirs.config.save_pretrained(tmp_path)
        for written in (keys, json.loads((tmp_path / "config.json").read_text())):
            assert same_maths(rope, from_hf(json.loads(json.dumps(written))), head_dim)


def test_cos_sin_and_rotation_equal_transformers():
    """At positions small enough for transformers' float32 angles; q and k of [b, h, s, d] and [b, g, s,
    d]."""
    torch.manual_seed(0)
    block = {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192}
    config, theirs = hf_rope(500000.0, block, 64, "rope_parameters")
    positions = torch.tensor([0, 1, 2, 3, 29, 30, 31])
    q, k = torch.randn(2, 3, 7, 64), torch.randn(2, 1, 7, 64)
    cos, sin = cos_sin(positions, *inverse_frequencies(from_hf(config), 64))
    their_cos, their_sin = theirs(q, positions[None])
    torch.testing.assert_close(torch.cat([cos, cos], dim=-1)[None], their_cos, rtol=0, atol=5e-6)
    torch.testing.assert_close(torch.cat([sin, sin], dim=-1)[None], their_sin, rtol=0, atol=5e-6)
    ours = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    for mine, reference in zip(ours, apply_rotary_pos_emb(q, k, their_cos, their_sin)):
        torch.testing.assert_close(mine, reference, rtol=0, atol=3e-5)
