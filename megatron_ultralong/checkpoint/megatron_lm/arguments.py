"""A model as Megatron-LM's arguments: those stored in a checkpoint, and as a command line.

With `--use-checkpoint-args` Megatron-LM takes only some of the stored ones (`load_args_from_checkpoint` of
its megatron/training/checkpointing.py): not the norm's epsilon, the norms of queries and keys, or the scaling
of RoPE. The command line therefore states all of them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_ultralong.checkpoint.rope_sources import megatron_arguments
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.model.weight_mapping import padded_vocab_size

_DIVISIBLE_BY = 128
"""Megatron-LM's default of --make-vocab-size-divisible-by."""


def padded_rows(model: Model, tp: int) -> int:
    """Rows of the vocabulary as Megatron-LM pads them for `tp` tensor parallel ranks. UserError where they
    cannot hold the model."""
    if tp < 1 or model.heads % tp or model.ffn_size % tp:
        raise UserError(
            f"--target-tp {tp} must be at least 1 and divide the model's {model.heads} heads and its ffn size "
            f"{model.ffn_size}"
        )
    return padded_vocab_size(model.vocab_size, _DIVISIBLE_BY * tp)


def of_model(model: Model, max_position: int, tp: int) -> dict[str, Any]:
    """The arguments of a model by their names in Python, without RoPE's. tp: tensor parallel ranks of
    Megatron-LM. UserError where they cannot express the model."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.heads,
        "group_query_attention": True,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "seq_length": max_position,
        "max_position_embeddings": max_position,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "layernorm_epsilon": model.norm_eps,  # its name in newer releases
        "apply_layernorm_1p": False,
        "qk_layernorm": model.qk_norm,
        "swiglu": True,
        "squared_relu": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "add_position_embedding": True,
        "vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": _DIVISIBLE_BY,
        "padded_vocab_size": padded_rows(model, tp),
        **_biases(model),
    }


def _biases(model: Model) -> dict[str, bool]:
    """Megatron-LM has one argument for all linears, and one for queries, keys and values."""
    biases = (model.qkv_bias, model.attention_output_bias, model.mlp_bias)
    if biases not in ((False, False, False), (True, False, False), (True, True, True)):
        names = ("queries, keys and values", "attention's output", "the MLP")
        present = ", ".join(name for name, bias in zip(names, biases, strict=True) if bias)
        raise UserError(
            f"Megatron-LM cannot express this model's biases (of {present}); it has none, those of queries, keys and "
            "values alone, or those of all linear layers"
        )
    return {"add_bias_linear": all(biases), "add_qkv_bias": model.qkv_bias}


def stored(values: Mapping[str, Any], tp: int) -> Namespace:
    """The arguments as a checkpoint without optimizer contains them. The tokenizer's are left out:
    Megatron-LM would prefer them to those on its command line."""
    return Namespace(
        **values,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        data_parallel_size=1,
        world_size=tp,
        no_save_optim=True,
        no_save_rng=True,
        async_save=False,
        iteration=0,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


_FLAGS = {
    "group_query_attention": "--group-query-attention",
    "qk_layernorm": "--qk-layernorm",
    "swiglu": "--swiglu",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "add_qkv_bias": "--add-qkv-bias",
    "use_rope_scaling": "--use-rope-scaling",
}
"""Arguments that are stated where they are true."""
_NEGATIVE_FLAGS = {
    "add_bias_linear": "--disable-bias-linear",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
}
"""Arguments that are stated where they are false."""
_VALUES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "normalization",
    "norm_epsilon",
    "attention_dropout",
    "hidden_dropout",
    "make_vocab_size_divisible_by",
    "position_embedding_type",
    "rotary_base",
)
"""Arguments that are always stated."""


def command_line(values: Mapping[str, Any]) -> list[str]:
    """The model's arguments for Megatron-LM's pretrain_gpt.py, an option with its value an entry; without
    paths."""
    lines = ["--use-checkpoint-args", "--ckpt-format torch_dist", "--tokenizer-type HuggingFaceTokenizer"]
    lines += [option for name, option in _FLAGS.items() if values[name]]
    lines += [option for name, option in _NEGATIVE_FLAGS.items() if not values[name]]
    changed = [
        name
        for name, default in megatron_arguments.NUMBERS.items()
        if values[name] != default and name not in ("seq_length", *_VALUES)
    ]
    return lines + [f"--{name.replace('_', '-')} {values[name]}" for name in (*_VALUES, *changed)]
