"""Small random Llama models in Hugging Face form, as references and as checkpoints on disk."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ultralong.config import Model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def hf_model(
    model: Model,
    rope: dict[str, Any] | None = None,
    seed: int = 0,
    max_position: int = 512,
    **config: Any,
) -> LlamaForCausalLM:
    """A LlamaForCausalLM of `model`'s shape in float32, weights large enough that errors show."""
    torch.manual_seed(seed)
    built = (
        LlamaForCausalLM(
            LlamaConfig(
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
                attn_implementation="eager",
                rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
                **config,
            )
        )
        .float()
        .eval()
    )
    with torch.no_grad():
        for parameter in built.parameters():
            # Norm weights differ from one: otherwise a norm applied twice or not at all would go unnoticed.
            parameter.normal_(1.0, 0.2) if parameter.dim() == 1 else parameter.normal_(0.0, 0.1)
    return built
