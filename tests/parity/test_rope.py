"""RoPE against transformers: bit-equal frequencies, the same attention factor, and config.json read alike by
both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_ultralong.model.rotary_embedding import apply_rope, cos_sin
from megatron_ultralong.rope.hf_config import from_hf, to_hf
from megatron_ultralong.rope.methods import (
    NTK,
    ChangedBase,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Unscaled,
    YaRN,
    same_maths,
)

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
    *(
        (theta, {"rope_type": "linear", "factor": s})
        for theta, s in ((500000.0, 128.0), (10000, 7.3), (1e5, 2))
    ),
    # Up to max_position_embeddings dynamic scaling has no effect: see test_dynamic_at_several_lengths.
    # Both ends of the ramp at one index, or beyond the last or first one.
    (10000.0, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 100, "beta_fast": 40.0, "beta_slow": 20.0}),
    (20.0, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 100000, "beta_fast": 2.0, "beta_slow": 1.0}),
]

# What can be exported, with max_position_embeddings.
EXPORTS = [
    (Unscaled(theta=10000.0), 512),
    (Llama3(factor=8.0), 131072),
    *((YaRN(factor=s), int(s * 8192)) for s in (128.0, 256.0, 512.0)),
    (YaRN(factor=128.0), 1073152),  # longer than factor x original, as released models have it
    (YaRN(factor=8.0, theta=10000.0, original_length=512, alpha=0.5, beta=9.5), 4096),
    (YaRN(factor=1.0, temperature=True), 8192),  # a temperature of 1
    *(
        (YaRN(ramp="dimension", factor=s, temperature=temperature), int(s * 8192))
        for s in (128.0, 512.0)
        for temperature in (True, False)
    ),
    (
        YaRN(
            ramp="dimension",
            factor=16.0,
            temperature=True,
            attention_factor=1.1,
            beta=32.0,
            truncate=False,
        ),
        131072,
    ),
    (ChangedBase(theta=1.28e8), 524288),
    (Linear(factor=7.3, theta=10000.0, original_length=2048), 14950),
    (NTK(factor=128.0), 1048576),
    (NTK(factor=8.0, theta=10000.0, original_length=512, law="length"), 4096),
    (DynamicNTK(factor=2.0), 8192),
]


def divisors(head_dim: int, largest: float) -> tuple[float, ...]:
    """Rising factors for LongRoPE, of no other method's form."""
    return tuple(1.0 + (largest - 1.0) * (i / (head_dim // 2 - 1)) ** 2 for i in range(head_dim // 2))


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
        frequencies, attention_factor = from_hf(config).inverse_frequencies(head_dim)
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
    assert torch.equal(from_hf(config).inverse_frequencies(64)[0], theirs.inv_freq)
    assert not torch.equal(theirs.inv_freq, hf_rope(10000.0, yarn, 64, "rope_scaling")[1].inv_freq)


@pytest.mark.parametrize(("rope", "max_position"), EXPORTS)
def test_exports_are_read_alike(tmp_path, rope, max_position):
    for head_dim in (64, 128):
        keys = to_hf(rope, max_position, head_dim)
        theirs = read_by_transformers(tmp_path, keys, head_dim)
        frequencies, attention_factor = rope.inverse_frequencies(head_dim)
        assert torch.equal(frequencies, theirs.inv_freq) and attention_factor == theirs.attention_scaling
        assert theirs.config.max_position_embeddings == max_position
        # Ours back from ours, and from what transformers makes of it when it saves the config again.
        theirs.config.save_pretrained(tmp_path)
        for written in (keys, json.loads((tmp_path / "config.json").read_text())):
            assert same_maths(rope, from_hf(json.loads(json.dumps(written))), head_dim)


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_dynamic_at_several_lengths(factor):
    """As transformers' module computes it in the forward pass of a sequence that grows, and shrinks again."""
    for head_dim, theta, original in ((128, 500000.0, 8192), (64, 100000.0, 8192), (6, 10000.0, 512)):
        block = {"rope_type": "dynamic", "factor": factor}
        config, theirs = hf_rope(
            theta, block, head_dim, "rope_scaling", {"max_position_embeddings": original}
        )
        rope = from_hf(config)
        assert rope == DynamicNTK(theta=theta, factor=factor, original_length=original)
        x = torch.zeros(1)
        grown = (original + 1, 2 * original, 4 * original - 3, 37 * original + 5, 128 * original)
        for length in (1, original, *grown, 7):
            theirs(x, torch.tensor([[length - 1]]))
            assert torch.equal(rope.inverse_frequencies(head_dim, length)[0], theirs.inv_freq), length
    assert not torch.equal(rope.inverse_frequencies(6, 513)[0], rope.inverse_frequencies(6, 1024)[0])


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("multiplier", [None, 1.0, 1.25])
def test_longrope(tmp_path, style, multiplier):
    for head_dim in (64, 96):
        long, short = divisors(head_dim, 40.0), divisors(head_dim, 3.0)
        block = {
            "rope_type": "longrope",
            "factor": 16.0,
            ORIGINAL: 8192,
            "long_factor": list(long),
            "short_factor": list(short),
            "attention_factor": multiplier,
        }
        config, theirs = hf_rope(10000.0, block, head_dim, style)
        rope = from_hf(config)
        assert (
            rope.attention_factor == multiplier and rope.short_factors == short and rope.depends_on_length()
        )
        x = torch.zeros(1)
        for length in (1, 8192, 8193, 131072):
            theirs(x, torch.tensor([[length - 1]]))
            frequencies, attention_factor = rope.inverse_frequencies(head_dim, length)
            assert torch.equal(frequencies, theirs.inv_freq) and attention_factor == theirs.attention_scaling
        # One table for every length, and back again from both files.
        one = LongRoPE(theta=10000.0, factor=16.0, factors=long, attention_factor=multiplier)
        for ours in (rope, one):
            again = read_by_transformers(tmp_path, to_hf(ours, 131072, head_dim), head_dim)
            for length in (8192, 8193):
                again(x, torch.tensor([[length - 1]]))
                frequencies, attention_factor = ours.inverse_frequencies(head_dim, length)
                assert torch.equal(frequencies, again.inv_freq)
                assert attention_factor == again.attention_scaling
            again.config.save_pretrained(tmp_path)
            written = json.loads((tmp_path / "config.json").read_text())
            assert same_maths(ours, from_hf(written), head_dim)
        assert not one.depends_on_length() and not same_maths(one, rope, head_dim)


def test_ntk_is_the_published_formula():
    """theta s^(D/(D-2)), and Gradient's rule by the target length, in 40 digits."""
    figures = {128.0: 6.912e7, 256.0: 1.398e8, 512.0: 2.826e8}
    for factor, expected in figures.items():
        rope = NTK(factor=factor)
        assert rope.scaled_theta(128) == pytest.approx(expected, rel=1e-3)
        frequencies, attention_factor = rope.inverse_frequencies(128)
        assert attention_factor == 1.0
        plain = Unscaled().inverse_frequencies(128)[0]
        assert frequencies[0] == plain[0]
        torch.testing.assert_close(plain[-1] / frequencies[-1], torch.tensor(factor), rtol=1e-5, atol=0)
        with mpmath.workdps(40):
            theta = mpmath.mpf(500000) * mpmath.mpf(factor) ** (mpmath.mpf(128) / 126)
            reference = [float(theta ** (-mpmath.mpf(2 * i) / 128)) for i in range(64)]
        torch.testing.assert_close(
            frequencies.double(), torch.tensor(reference, dtype=torch.float64), rtol=2e-6, atol=0
        )
    gradient = {1048576: 3580165449.0, 4194304: 4.5218e10}
    for target, expected in gradient.items():
        found = NTK(factor=target / 8192, law="length").scaled_theta(128)
        assert found == pytest.approx(expected, rel=1e-6 if target == 1048576 else 1e-3)


def test_cos_sin_and_rotation_equal_transformers():
    """At positions small enough for transformers' float32 angles; q and k of [b, h, s, d] and [b, g, s,
    d]."""
    torch.manual_seed(0)
    block = {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192}
    config, theirs = hf_rope(500000.0, block, 64, "rope_parameters")
    positions = torch.tensor([0, 1, 2, 3, 29, 30, 31])
    q, k = torch.randn(2, 3, 7, 64), torch.randn(2, 1, 7, 64)
    cos, sin = cos_sin(positions, *from_hf(config).inverse_frequencies(64))
    their_cos, their_sin = theirs(q, positions[None])
    torch.testing.assert_close(torch.cat([cos, cos], dim=-1)[None], their_cos, rtol=0, atol=5e-6)
    torch.testing.assert_close(torch.cat([sin, sin], dim=-1)[None], their_sin, rtol=0, atol=5e-6)
    ours = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    for mine, reference in zip(ours, apply_rotary_pos_emb(q, k, their_cos, their_sin)):
        torch.testing.assert_close(mine, reference, rtol=0, atol=3e-5)
