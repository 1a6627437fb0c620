"""Model families: config.json of each, read, refused and written, against transformers' own classes."""

from __future__ import annotations

import dataclasses
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.families import FAMILIES, OPTIONS
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.planning import flops, memory
from megatron_ultralong.rope.methods import YaRN
from megatron_ultralong.shapes import SHAPES

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
}
NO_OPTIONS = dict.fromkeys(OPTIONS, False)
# Keys of config.json beside the sizes, and the options that they mean.
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"model_type": "llama"}, {}),
    "llama, attention bias": (
        {"model_type": "llama", "attention_bias": True},
        {"qkv_bias": True, "attention_output_bias": True},
    ),
    "llama, MLP bias": ({"model_type": "llama", "mlp_bias": True, "head_dim": 10}, {"mlp_bias": True, "head_dim": 10}),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, {}),
    "mistral, a window as long as the model": ({"model_type": "mistral", "sliding_window": 512, "head_dim": 10}, {"head_dim": 10}),
    # As published: a window is stated, but not used. A Qwen2 has biases whatever is stated.
    "qwen2": (
        {
            "model_type": "qwen2",
            "sliding_window": 131072,
            "use_sliding_window": False,
            "max_window_layers": 2,
            "attention_bias": False,
        },
        {"qkv_bias": True},
    ),
    "qwen2, a window in layers it does not have": (
        {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4, "tie_word_embeddings": True},
        {"qkv_bias": True, "tied_embeddings": True},
    ),
    "qwen3": (
        {"model_type": "qwen3", "head_dim": 10, "sliding_window": None, "use_sliding_window": False},
        {"qk_norm": True, "head_dim": 10},
    ),
    "qwen3, missing head_dim": ({"model_type": "qwen3", "tie_word_embeddings": True}, {"qk_norm": True, "head_dim": 128, "tied_embeddings": True}),
    "qwen3, attention bias": (
        {"model_type": "qwen3", "attention_bias": True, "head_dim": 10},
        {"qk_norm": True, "qkv_bias": True, "attention_output_bias": True, "head_dim": 10},
    ),
}  # fmt: skip


def read(folder: Path, **values: Any) -> hf_config.HFConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return hf_config.read_config(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_read_and_written_as_transformers_means_it(tmp_path: Path, name: str) -> None:
    values, expected = CONFIGS[name]
    found = read(tmp_path, **SIZES, **values)
    assert found.model == Model(
        hidden_size=48,
        ffn_size=80,
        layers=4,
        heads=6,
        kv_heads=2,
        vocab_size=97,
        norm_eps=1e-6,
        family=values["model_type"],
        **{"head_dim": 8, **NO_OPTIONS, **expected},
    )
    rope = YaRN(theta=1e6, factor=8.0, original_length=512)
    written = hf_config.export_config(found.model, rope, 4096, torch.float32, found.raw)
    again = read(tmp_path, **written)
    assert again.model == found.model and again.max_position == 4096
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert getattr(theirs, "sliding_window", None) is None
    assert set(getattr(theirs, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert type(model).__name__ == written["architectures"][0]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == weight_mapping.hf_shapes(found.model)


def test_missing_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    missing = ("num_key_value_heads", "max_position_embeddings")
    sizes = {key: value for key, value in SIZES.items() if key not in missing} | {
        "num_attention_heads": 32,
        "hidden_size": 256,
    }
    for name in FAMILIES:
        found = read(
            tmp_path, model_type=name, **sizes, **({"sliding_window": None} if name == "mistral" else {})
        )
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert found.model.kv_heads == theirs.num_key_value_heads, name
        assert found.max_position == theirs.max_position_embeddings, name
        assert (
            found.model.norm_eps == theirs.rms_norm_eps and found.model.init_std == theirs.initializer_range
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "mistral", "sliding_window": 128},
            "sliding_window=128 .* set sliding_window to null",
        ),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window=4096"),  # the default
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 256,
                "max_window_layers": 3,
            },
            "sliding_window=256 .* set use_sliding_window to false",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 256,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "sliding_window=256",
        ),
        (
            {"model_type": "mistral", "sliding_window": "all"},
            "sliding_window='all' must be a positive number",
        ),
        *(
            (
                {"model_type": kind},
                f"model_type={kind} is not supported .supported: llama .LlamaForCausalLM., mistral",
            )
            for kind in (
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "gemma3_text",
                "qwen2_5_vl",
                "mllama",
                "phi3",
                None,
            )
        ),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]},
            "only Qwen2ForCausalLM is supported",
        ),
        ({"model_type": "qwen3", "hidden_act": "gelu"}, "hidden_act=gelu"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, **(SIZES | values))
    assert "config.json: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"family": "gpt2"},
            "model.family=gpt2 is not supported; choose one of llama, mistral, qwen2, qwen3",
        ),
        ({"family": "qwen2"}, "model.family=qwen2 requires model.qkv_bias=true"),
        ({"family": "qwen3"}, "model.family=qwen3 requires model.qk_norm=true"),
        ({"qk_norm": True}, "model.qk_norm=true: models of model.family=llama do not have it"),
        ({"family": "mistral", "mlp_bias": True}, "model.mlp_bias=true: models of model.family=mistral"),
        ({"family": "qwen2", "qkv_bias": True, "attention_output_bias": True}, "do not have it"),
        (
            {"qkv_bias": True},
            "model.qkv_bias and model.attention_output_bias must be equal .* attention_bias",
        ),
    ],
)
def test_options_that_no_model_of_the_family_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **options)


SMALL = Model(hidden_size=48, ffn_size=80, layers=2, heads=6, kv_heads=2, head_dim=10, vocab_size=97)
EVERY_OPTION = (
    dataclasses.replace(SMALL, qkv_bias=True, attention_output_bias=True, mlp_bias=True),
    dataclasses.replace(SMALL, family="qwen2", qkv_bias=True, tied_embeddings=True),
    dataclasses.replace(SMALL, family="qwen3", qk_norm=True, qkv_bias=True, attention_output_bias=True),
)


@pytest.mark.parametrize("model", EVERY_OPTION, ids=lambda model: model.family)
def test_weights_of_every_option(model: Model) -> None:
    """merge undoes split, pieces fill each shard once, and plans count what the table has."""
    tensors = {name: torch.randn(shape) for name, shape in weight_mapping.hf_shapes(model).items()}
    for tp in (1, 2):
        found: dict[str, torch.Tensor] = {}
        count = 0
        for name in weight_mapping.megatron_names(model):
            shards = [weight_mapping.split(name, tensors, model, rank, tp) for rank in range(tp)]
            count += shards[0].numel()
            found |= weight_mapping.merge(name, shards, model)
            for rank in range(tp):
                filled = torch.zeros(shards[0].shape)
                for piece in weight_mapping.pieces(name, model, rank, tp):
                    filled[piece.target] += 1
                assert filled.max() == 1 and (filled.min() == 1 or "embedding" in name or "output" in name)
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert memory.stage_parameters(model, tp, 1, 0) == count


def test_biases_of_each_rank_as_literal_lists() -> None:
    # 4 query heads, 2 KV heads, head_dim 2: q 0-7, k 100-103, v 200-203; ffn 4: gate 0-3, up 10-13.
    model = Model(
        hidden_size=3, ffn_size=4, layers=1, heads=4, kv_heads=2, head_dim=2, vocab_size=4,
        qkv_bias=True, attention_output_bias=True, mlp_bias=True,
    )  # fmt: skip
    sizes = {"self_attn.q": (0, 8), "self_attn.k": (100, 4), "self_attn.v": (200, 4), "self_attn.o": (0, 3)}
    sizes |= {"mlp.gate": (0, 4), "mlp.up": (10, 4), "mlp.down": (0, 3)}
    tensors = {
        f"model.layers.0.{part}_proj.bias": torch.arange(first, first + n).float()
        for part, (first, n) in sizes.items()
    }
    expected = {
        "self_attention.linear_qkv": [[0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]],
        "self_attention.linear_proj": [[0, 1, 2], [0, 1, 2]],
        "mlp.linear_fc1": [[0, 1, 10, 11], [2, 3, 12, 13]],
        "mlp.linear_fc2": [[0, 1, 2], [0, 1, 2]],
    }
    for part, ranks in expected.items():
        name = f"decoder.layers.0.{part}.bias"
        found = [weight_mapping.split(name, tensors, model, rank, 2).tolist() for rank in range(2)]
        assert found == ranks, name
        assert weight_mapping.is_replicated(name, model) == (ranks[0] == ranks[1])
    with pytest.raises(KeyError, match="not a parameter"):
        weight_mapping.pieces("decoder.layers.0.self_attention.q_layernorm.weight", model, 0, 1)


# Parameters, as the models' pages on the hub state them, a tied embedding once.
TOTALS = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str, tmp_path: Path) -> None:
    """Of the weight table, of the plan, and of transformers' model of the exported config."""
    model = SHAPES[name]
    assert sum(prod(shape) for shape in weight_mapping.hf_shapes(model).values()) == TOTALS[name]
    assert memory.stage_parameters(model, 1, 1, 0) == TOTALS[name]
    config = hf_config.export_config(model, YaRN(factor=8.0, original_length=8192), 65536, torch.bfloat16)
    assert read(tmp_path, **config).model == model
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == TOTALS[name]
    # Products of a token: every parameter that is neither a norm, a bias nor looked up.
    matrices = sum(
        p.numel() for n, p in theirs.named_parameters() if p.dim() == 2 and "embed_tokens" not in n
    )
    if model.tied_embeddings:
        matrices += model.hidden_size * model.vocab_size
    attention = 6 * model.layers * model.heads * model.head_dim
    assert flops.flops_per_token(model, 1000) == 6 * matrices + 1000 * attention
