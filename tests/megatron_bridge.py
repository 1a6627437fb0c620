"""run_config.yaml as Megatron-Bridge 0.6 writes it, by a model provider or by a configuration with a builder:
the fields that say what a model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_ultralong.config import Model

PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
BUILDER = "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig"


def fields(model: Model, seq_length: int, **changed: Any) -> dict[str, Any]:
    """The section `model` of a provider."""
    return {
        "_target_": PROVIDER,
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "activation_func_clamp_value": None,
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.qkv_bias and not model.mlp_bias,
        "attention_backend": {
            "_args_": [5],
            "_call_": True,
            "_name_": "auto",
            "_target_": "megatron.core.transformer.enums.AttnBackend",
        },
        "ffn_hidden_size": model.ffn_size,
        "gated_linear_unit": True,
        "glu_linear_offset": 0.0,
        "hf_model_id": "example/model",
        "hidden_size": model.hidden_size,
        "init_method_std": model.init_std,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.norm_eps,
        "make_vocab_size_divisible_by": 128,
        "multi_latent_attention": False,
        "no_rope_freq": None,
        "normalization": "RMSNorm",
        "num_attention_heads": model.heads,
        "num_layers": model.layers,
        "num_moe_experts": None,
        "num_query_groups": model.kv_heads,
        "position_embedding_type": "rope",
        "qk_layernorm": model.qk_norm,
        "rope_scaling": False,
        "rope_scaling_factor": 1.0,
        "rotary_base": 10000.0,
        "rotary_interleaved": False,
        "rotary_percent": 1.0,
        "seq_len_interpolation_factor": None,
        "seq_length": seq_length,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "should_pad_vocab": True,
        "softmax_scale": None,
        "softmax_type": "vanilla",
        "vocab_size": model.vocab_size,
        "window_size": None,
        "yarn_beta_fast": None,
        "yarn_beta_slow": None,
        "yarn_correction_range_round_to_int": None,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_original_max_position_embeddings": None,
        "yarn_rotary_scaling_factor": None,
        **changed,
    }


def with_builder(stated: dict[str, Any]) -> dict[str, Any]:
    """The same in the form of a configuration with a builder, where fields of the transformer are nested."""
    outer = ("seq_length", "vocab_size", "make_vocab_size_divisible_by", "should_pad_vocab", "rotary_base")
    outer += ("rope_scaling", "rope_scaling_factor", "position_embedding_type", "rotary_percent")
    outer += ("seq_len_interpolation_factor", "share_embeddings_and_output_weights")
    rest = {name: value for name, value in stated.items() if name not in (*outer, "_target_", "hf_model_id")}
    target = "megatron.core.transformer.transformer_config.TransformerConfig"
    return {
        "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
        "_target_": BUILDER,
        "extra_checkpoint_metadata": {"hf_model_id": stated["hf_model_id"]},
        "transformer": {"_target_": target, **rest, "activation_func": "silu"},
        **{name: stated[name] for name in outer},
    }


def write(checkpoint: Path, model: Any, **others: Any) -> Path:
    """Write run_config.yaml with the section `model` into a checkpoint's folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    settings = {"checkpoint": {"ckpt_format": "torch_dist"}, "model": model, "peft": None, **others}
    (checkpoint / "run_config.yaml").write_text(yaml.safe_dump(settings))
    return checkpoint
