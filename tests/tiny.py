"""Small random models in Hugging Face form, as references and as checkpoints on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_ultralong.config import Model
from megatron_ultralong.families import FAMILIES

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


SMALL = Model(hidden_size=48, ffn_size=80, layers=4, heads=6, kv_heads=2, head_dim=10, vocab_size=97)
"""Odd sizes on purpose: vocabulary 97 needs a padded row at TP 2, 3 query heads a KV head."""

FAMILY_MODELS = {
    "llama with biases": replace(SMALL, qkv_bias=True, attention_output_bias=True, mlp_bias=True),
    "mistral": replace(SMALL, family="mistral"),
    "qwen2": replace(SMALL, family="qwen2", qkv_bias=True),
    "qwen3": replace(SMALL, family="qwen3", qk_norm=True, tied_embeddings=True),
    "qwen3 with biases": replace(
        SMALL, family="qwen3", qk_norm=True, qkv_bias=True, attention_output_bias=True
    ),
}
"""Every family and every option that a model can have, beside the plain Llama."""


def hf_model(
    model: Model,
    rope: dict[str, Any] | None = None,
    seed: int = 0,
    max_position: int = 512,
    **config: Any,
) -> PreTrainedModel:
    """A model of `model`'s family and shape in float32, weights large enough that errors show."""
    torch.manual_seed(seed)
    family = FAMILIES[model.family]
    stated = {key: getattr(model, options[0]) for key, options in family.stated.items()}
    if family.window == "all_layers":
        stated["sliding_window"] = None
    settings = AutoConfig.for_model(
        model.family,
        architectures=[family.architecture],
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied_embeddings,
        max_position_embeddings=max_position,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        **{"bos_token_id": 1, "eos_token_id": 2, **stated, **config},
    )
    built = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            # Norm weights differ from one and biases from zero: otherwise one that is applied twice or not at
            # all would go unnoticed.
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.1)
    return built
