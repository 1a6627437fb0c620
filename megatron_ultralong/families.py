"""Model families: for each `model_type` of a Hugging Face config.json, which options its models have and
where config.json states them.

All are decoders with RMSNorm, grouped-query attention with RoPE, and a SwiGLU MLP. They differ in biases and
in norms of queries and keys, which are fields of `Model` (config.py). Another family of this kind is another
row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ultralong.errors import UserError

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3"]

OPTIONS = ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm")
"""Fields of `Model` that a family has, lacks or leaves to config.json."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table, as in transformers' configuration and modeling files of this `model_type`."""

    architecture: str
    always: tuple[str, ...] = ()
    """Options that all its models have; config.json does not state them."""
    stated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key of config.json (true or false, missing = false) -> the options that it sets."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json lacks, where that differs from a Llama's."""
    window: Literal["none", "all_layers", "by_layer"] = "none"
    """Layers that `sliding_window` applies to: none, which ignore it; all; or by_layer: with
    use_sliding_window=true those that layer_types names, or else those from max_window_layers on."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        stated={"attention_bias": ("qkv_bias", "attention_output_bias"), "mlp_bias": ("mlp_bias",)},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window="all_layers",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        always=("qkv_bias",),
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        window="by_layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        always=("qk_norm",),
        stated={"attention_bias": ("qkv_bias", "attention_output_bias")},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        window="by_layer",
    ),
}


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())


def check_options(name: str, options: Mapping[str, bool]) -> None:
    """UserError unless models of the family `name` can have these `options` (all of `OPTIONS`)."""
    if name not in FAMILIES:
        raise UserError(f"model.family={name} is not supported; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    stated = [option for together in family.stated.values() for option in together]
    for option, value in options.items():
        if option in family.always and not value:
            raise UserError(f"model.family={name} requires model.{option}=true")
        if value and option not in (*family.always, *stated):
            raise UserError(f"model.{option}=true: models of model.family={name} do not have it")
    for key, together in family.stated.items():
        if len({options[option] for option in together}) > 1:
            raise UserError(
                f"model.{' and model.'.join(together)} must be equal for model.family={name}, whose config.json "
                f"has one key for them, {key}"
            )
