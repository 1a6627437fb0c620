"""The model of a Megatron-Bridge checkpoint, as its run_config.yaml states it.

Its tensors have the names and shapes of Megatron-Core's GPTModel, like those of this program, and are read in
place. run_config.yaml has the fields of a model provider of megatron/bridge/models (`GPTModelProvider` and
its subclasses; those of a `BridgeGPTModelConfig` are nested), and the tokenizer is in `tokenizer/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint import training_state
from megatron_ultralong.checkpoint.rope_sources import megatron_arguments
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.families import FAMILIES, FamilyName, supported
from megatron_ultralong.io import yaml_file
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.llama3 import Llama3

FILE = "run_config.yaml"

_MODELS = {
    "gpt_provider": "",
    "gpt": "",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen": "Qwen",
}
"""Packages of megatron/bridge/models whose classes are decoders of this kind -> what their names contain."""
_OTHER_MATHS = ("Llama4", "MoE", "Next", "VL", "Omni", "Audio", "Qwen35", "ASR")
"""Parts of the names of classes in those packages that are not."""

_EXPECTED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False, None),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "no_rope_freq": (None,),
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "attention_output_gate": (False, None),
    "qk_l2_norm": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0, None),
    "rotary_interleaved": (False, None),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "is_hybrid_model": (False, None),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_block_specs": (False, None),
    "restore_modelopt_state": (False, None),
    "use_mup": (False, None),
    "use_transformer_engine_full_layer_spec": (False, None),  # whose tensors have other names
}
"""Fields that change what the model computes -> the values that this program can compute. Where a field is
missing, the release that wrote the file did not have it."""
_NEEDED = ("normalization", "gated_linear_unit")

_ROPE = {
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "yarn_correction_range_round_to_int": "yarn_correction_range_round_to_int",
}
"""Field -> the argument of Megatron-LM that has the same meaning."""


def is_stated(checkpoint: Path) -> bool:
    """Whether a checkpoint states its model: one of this program or of Megatron-Bridge."""
    return any((checkpoint / name).is_file() for name in ("run.json", FILE))


def read_state(checkpoint: Path) -> TrainingState:
    """`training_state.read`, also for a checkpoint of Megatron-Bridge. UserError, in one line, where its
    model is not supported."""
    file = checkpoint / FILE
    if (checkpoint / "run.json").is_file() or not file.is_file():
        return training_state.read(checkpoint)
    settings = yaml_file.read(file, "checkpoint")
    try:
        return _state(settings, checkpoint)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def assets(checkpoint: Path) -> Path:
    """The folder with a checkpoint's tokenizer and, if it is known, configuration of the base model; it may
    be missing."""
    if (checkpoint / "run.json").is_file() or not (checkpoint / FILE).is_file():
        return checkpoint / "hf"
    return checkpoint / "tokenizer"


def _state(settings: Any, checkpoint: Path) -> TrainingState:
    stated = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(stated, Mapping):
        raise UserError("states no model; it is not a run_config.yaml of Megatron-Bridge")
    if settings.get("peft"):
        raise UserError("the checkpoint contains adapters only; merge them with Megatron-Bridge first")
    inner = stated.get("transformer")
    values = {**stated, **inner} if isinstance(inner, Mapping) else dict(stated)
    name = _class_name(stated)
    for field, allowed in _EXPECTED.items():
        if (field in values or field in _NEEDED) and values.get(field) not in allowed:
            expected = " or ".join(str(value) for value in allowed if value is not None) or "none"
            raise UserError(
                f"model.{field} is {values.get(field)}, which is not supported (expected {expected})"
            )
    activation = values.get("activation_func")
    activation = activation.get("_target_") if isinstance(activation, Mapping) else activation
    if not str(activation).endswith("silu"):
        raise UserError(f"model.activation_func is {activation}, which is not supported (expected silu)")
    length = _whole(values, "seq_length")
    metadata = values.get("extra_checkpoint_metadata")
    base = metadata.get("hf_model_id") if isinstance(metadata, Mapping) else None
    iteration = checkpoint.name.removeprefix("iter_")
    return TrainingState(
        model=_model(values, name),
        rope=_rope(values, length),
        iteration=int(iteration) if iteration.isdigit() else 0,
        max_length=length,
        base=str(base or values.get("hf_model_id") or ""),
    )


def _class_name(stated: Mapping[str, Any]) -> str:
    """Name of the class of the model, which may compute more than its fields say. UserError unless it is
    known."""
    target = str(stated.get("_target_", ""))
    parts = target.split(".")
    package = parts[3] if parts[:3] == ["megatron", "bridge", "models"] and len(parts) > 4 else ""
    family = _MODELS.get(package)
    if family is None or family not in parts[-1] or any(other in parts[-1] for other in _OTHER_MATHS):
        raise UserError(f"model {target or 'of no class'} is not supported (supported: {supported()})")
    return parts[-1]


def _model(values: Mapping[str, Any], name: str) -> Model:
    heads, hidden = _whole(values, "num_attention_heads"), _whole(values, "hidden_size")
    all_biases = _flag(values, "add_bias_linear", True)
    options = {
        "qkv_bias": all_biases or _flag(values, "add_qkv_bias", False),
        "attention_output_bias": all_biases,
        "mlp_bias": all_biases,
        "qk_norm": _flag(values, "qk_layernorm", False),
    }
    family: FamilyName = "llama"
    if name.startswith("Mistral"):
        family = "mistral"
    elif options["qk_norm"]:
        family = "qwen3"
    elif options["qkv_bias"] and not all_biases:
        family = "qwen2"
    assert family in FAMILIES
    return Model(
        hidden_size=hidden,
        ffn_size=_whole(values, "ffn_hidden_size"),
        layers=_whole(values, "num_layers"),
        heads=heads,
        kv_heads=_whole(values, "num_query_groups", heads),
        head_dim=_whole(values, "kv_channels", hidden // heads),
        vocab_size=_whole(values, "vocab_size"),
        norm_eps=_number(values, "layernorm_epsilon"),
        tied_embeddings=_flag(values, "share_embeddings_and_output_weights", True),
        init_std=_number(values, "init_method_std", 0.02),
        family=family,
        **options,
    )


def _rope(values: Mapping[str, Any], length: int) -> Rope:
    arguments = {ours: values[name] for name, ours in _ROPE.items() if values.get(name) is not None}
    if arguments.get("position_embedding_type") not in ("rope", "yarn"):
        raise UserError(
            f"model.position_embedding_type is {values.get('position_embedding_type')}, which is not supported "
            "(expected rope or yarn)"
        )
    if values.get("old_context_len") is not None:
        # Llama31ModelProvider of releases up to 0.2: its own fields, applied to a RoPE without scaling.
        return Llama3(
            theta=_number(values, "rotary_base"),
            factor=_number(values, "scale_factor"),
            original_length=_whole(values, "old_context_len"),
            alpha=_number(values, "low_freq_factor"),
            beta=_number(values, "high_freq_factor"),
        )
    stated = (values.get("yarn_mscale"), values.get("yarn_mscale_all_dim"))
    if None not in stated:  # otherwise Megatron-Core's default, which is that of its arguments
        arguments["mscale"], arguments["mscale_all_dim"] = stated
    # Megatron-Core does not round where it is not stated; its arguments have another default.
    arguments["yarn_correction_range_round_to_int"] = _flag(
        values, "yarn_correction_range_round_to_int", False
    )
    if values.get("seq_len_interpolation_factor") is not None:
        interpolation = _number(values, "seq_len_interpolation_factor")
        if interpolation and length % interpolation == 0:
            length = int(length // interpolation)
    arguments["max_position_embeddings"] = length
    # The first: what is stated. Megatron-Bridge hands all of it to the model.
    return megatron_arguments.read(arguments, Path("model"))[0].rope


# ---- values ------------------------------------------------------------------------------------


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    number = _number(values, name, default)
    if number != int(number) or number < 1:
        raise UserError(f"model.{name} is {values.get(name)}; it must be a positive whole number")
    return int(number)


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"model.{name} is {str(value)[:40]}; it must be a number") from None
    return number


def _flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"model.{name} is {value}; it must be true or false")
    return value
