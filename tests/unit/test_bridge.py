"""The models that run_config.yaml of a Megatron-Bridge checkpoint states, and those that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.checkpoint.rope_sources.read import read_source
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.llama3 import Llama3
from megatron_ultralong.rope.plain import Unscaled
from megatron_ultralong.rope.yarn import YaRN
from tests import megatron_bridge

LLAMA = Model(hidden_size=48, ffn_size=80, layers=2, heads=6, kv_heads=2, head_dim=10, vocab_size=97)
QWEN2 = replace(LLAMA, family="qwen2", qkv_bias=True, tied_embeddings=True, norm_eps=1e-6)
QWEN3 = replace(LLAMA, family="qwen3", qk_norm=True)
BIASES = replace(LLAMA, qkv_bias=True, attention_output_bias=True, mlp_bias=True)
YARN = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 128,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
SCALED_LLAMA = {"scale_factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("model", [LLAMA, QWEN2, QWEN3, BIASES], ids=lambda model: model.family)
def test_models(model: Model, tmp_path: Path) -> None:
    stated = megatron_bridge.fields(model, 512)
    for form in (stated, megatron_bridge.with_builder(stated)):
        state = bridge.read_state(megatron_bridge.write(tmp_path / "iter_0000007", form))
        assert (state.model, state.iteration, state.base) == (model, 7, "example/model")
        assert state.rope == Unscaled(theta=10000.0, original_length=512)
        assert max_position(state, {}) == 512


ROPES = {
    "llama3": (
        {"rope_scaling": True, "rope_scaling_factor": 32.0, "seq_length": 131072},
        Llama3(theta=10000.0, factor=32.0, original_length=8192, alpha=1.0, beta=4.0),
        32 * 8192,
    ),
    "llama3 of release 0.2": (
        {
            "_target_": "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B",
            "old_context_len": 8192,
            "seq_length": 131072,
            **SCALED_LLAMA,
        },
        Llama3(theta=10000.0, factor=32.0, original_length=8192, alpha=1.0, beta=4.0),
        32 * 8192,
    ),
    "a short factor": (
        {"rope_scaling": True, "rope_scaling_factor": 8.0, "seq_length": 131072},
        Llama3(theta=10000.0, factor=8.0, original_length=8192, alpha=1.0, beta=4.0),
        131072,
    ),
    "linear": (
        {"seq_len_interpolation_factor": 4.0, "seq_length": 512},
        Linear(theta=10000.0, factor=4.0, original_length=128),
        512,
    ),
    "yarn": (
        {**YARN, "seq_length": 512},
        YaRN(
            theta=10000.0,
            factor=4.0,
            original_length=128,
            ramp="dimension",
            alpha=1.0,
            beta=32.0,
            truncate=False,
            temperature=True,
        ),
        512,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_ropes(name: str, tmp_path: Path) -> None:
    changed, rope, length = ROPES[name]
    stated = {**megatron_bridge.fields(LLAMA, 512), **changed}
    checkpoint = megatron_bridge.write(tmp_path / "iter_0000000", stated)
    state = bridge.read_state(checkpoint)
    assert state.rope == rope and max_position(state, {}) == length
    for path in (checkpoint, checkpoint / "run_config.yaml"):
        [source] = read_source(path)
        assert (source.rope, source.head_dim, source.max_position) == (rope, 10, length)


def test_yarn_with_rounding_and_scales(tmp_path: Path) -> None:
    more = {"yarn_correction_range_round_to_int": True, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.7}
    stated = megatron_bridge.fields(LLAMA, 512, **YARN, **more)
    rope = bridge.read_state(megatron_bridge.write(tmp_path, stated)).rope
    assert isinstance(rope, YaRN) and rope.truncate and not rope.temperature


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_moe_experts": 8}, r"model\.num_moe_experts is 8, which is not supported \(expected none\)"),
    ({"normalization": "LayerNorm"}, r"model\.normalization is LayerNorm, .* \(expected RMSNorm\)"),
    ({"normalization": None}, "model.normalization is None"),
    ({"gated_linear_unit": False}, r"gated_linear_unit is False, .* \(expected True\)"),
    ({"window_size": [4095, 0]}, r"model\.window_size is \[4095, 0\]"),
    ({"activation_func": "gelu"}, r"activation_func is gelu, .* \(expected silu\)"),
    ({"position_embedding_type": "learned_absolute"}, r"is learned_absolute, .* \(expected rope or yarn\)"),
    ({"position_embedding_type": None}, "position_embedding_type is None"),
    ({"rotary_percent": 0.5}, "rotary-percent 0.5 is not supported"),
    ({"rotary_interleaved": True}, "rotary_interleaved is True"),
    ({"layers": 3, "num_layers": "two"}, "model.num_layers is two; it must be a number"),
    ({"num_layers": float("inf")}, "model.num_layers is inf; it must be a number"),
    ({"seq_length": float("nan")}, "model.seq_length is nan; it must be a number"),
    ({"rotary_base": "9" * 400}, "must be a positive number"),
    ({"seq_len_interpolation_factor": [1]}, r"seq_len_interpolation_factor is \[1\]; it must be a number"),
    ({"num_layers": 0}, "model.num_layers is 0; it must be a positive whole number"),
    ({"qk_layernorm": "yes"}, "model.qk_layernorm is yes; it must be true or false"),
    ({"vocab_size": None}, "model.vocab_size is None; it must be a number"),
    ({"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"}, "is not supported"),
    ({"_target_": "megatron.bridge.models.llama.llama_provider.Llama4ModelProvider"}, "is not supported"),
    ({"_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider"}, "is not supported"),
    ({"_target_": "mine.Model"}, r"model mine\.Model is not supported \(supported: llama "),
]


@pytest.mark.parametrize("changed,message", REFUSED, ids=lambda value: str(value)[:50])
def test_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = megatron_bridge.write(tmp_path, {**megatron_bridge.fields(LLAMA, 512), **changed})
    with pytest.raises(UserError, match=message) as raised:
        bridge.read_state(checkpoint)
    assert str(raised.value).startswith(f"{checkpoint / 'run_config.yaml'}: ")


def test_files_of_another_kind(tmp_path: Path) -> None:
    stated = megatron_bridge.fields(LLAMA, 512)
    with pytest.raises(UserError, match="contains adapters only; merge them with Megatron-Bridge first"):
        bridge.read_state(megatron_bridge.write(tmp_path, stated, peft={"dim": 8}))
    for text, message in (
        ("- a", "states no model"),
        ("a: [", "not YAML"),
        ("model: 3", "states no model"),
        ("model: 2001-13-45", "not YAML"),
    ):
        (tmp_path / "run_config.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            bridge.read_state(tmp_path)
