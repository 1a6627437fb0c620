"""A model and its RoPE as Megatron-LM's arguments, and what these cannot express."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.checkpoint.megatron_lm import arguments, rope
from megatron_ultralong.checkpoint.rope_sources.read import read_source
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import (
    NTK,
    ChangedBase,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Unscaled,
    YaRN,
)

LLAMA = Model(
    hidden_size=4096, ffn_size=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab_size=128256
)
QWEN3 = Model(
    hidden_size=1024,
    ffn_size=3072,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    norm_eps=1e-6,
    tied_embeddings=True,
    family="qwen3",
    qk_norm=True,
)
DIMENSIONS = YaRN(
    theta=1e6, factor=4.0, original_length=32768, ramp="dimension", alpha=1.0, beta=32.0, temperature=True
)
IGNORED = "NVIDIA/Megatron-LM#6305"


@pytest.mark.parametrize(
    ("stated", "note"),
    [
        (Unscaled(theta=10000.0, original_length=4096), None),
        (ChangedBase(theta=8e7), None),
        (Llama3(factor=8.0), None),
        (Llama3(factor=128.0), IGNORED),
        (YaRN(theta=500000.0, factor=256.0), IGNORED),
        (Linear(theta=10000.0, factor=8.0, original_length=4096), "interpolation-factor"),
        (DIMENSIONS, "core 0.19"),
        (replace(DIMENSIONS, temperature=False), "core 0.19"),
        (replace(DIMENSIONS, truncate=False, alpha=2.0, beta=16.0, factor=3.7), "core 0.19"),
        (replace(DIMENSIONS, attention_factor=1.3), "core 0.19"),
        (replace(DIMENSIONS, attention_factor=0.7), "core 0.19"),
    ],
    ids=lambda value: value.type if isinstance(value, Rope) else None,
)
def test_rope_there_and_back(stated: Rope, note: str | None, tmp_path: Path) -> None:
    values, notes = rope.arguments(stated, 128, 131072)
    assert len(notes) == (note is not None) and (note is None or note in notes[0])
    file = tmp_path / "arguments.txt"
    file.write_text(" ".join(arguments.command_line({**values, **arguments.of_model(LLAMA, 131072, 1)})))
    frequencies, factor = read_source(file)[0].rope.inverse_frequencies(128)
    expected, expected_factor = stated.inverse_frequencies(128)
    assert torch.equal(frequencies, expected) and factor == pytest.approx(expected_factor, rel=1e-14)


@pytest.mark.parametrize(
    "stated",
    [
        Unscaled(theta=10000.5),
        Llama3(original_length=4096, factor=8.0),
        Llama3(alpha=2.0, factor=8.0),
        YaRN(factor=8.0, temperature=True),
        Linear(theta=10000.0, factor=2.5),
        replace(DIMENSIONS, factor=1.0, attention_factor=1.2),
        NTK(theta=10000.0, factor=4.0),
        DynamicNTK(theta=10000.0, factor=4.0),
        LongRoPE(factor=4.0, factors=(4.0,) * 64),
    ],
    ids=lambda value: value.type,
)
def test_rope_that_cannot_be_expressed(stated: Rope) -> None:
    with pytest.raises(
        UserError, match="cannot express this model's RoPE .*; Megatron-LM's arguments can state:"
    ):
        rope.arguments(stated, 128, 131072)


def command_line(model: Model, stated: Rope, tp: int = 1) -> list[str]:
    values = rope.arguments(stated, model.head_dim, 40960)[0]
    return shlex.split(" ".join(arguments.command_line({**values, **arguments.of_model(model, 40960, tp)})))


def test_command_lines() -> None:
    common = "--use-checkpoint-args --ckpt-format torch_dist --tokenizer-type HuggingFaceTokenizer --group-query-attention"
    after = "--max-position-embeddings 40960 --normalization RMSNorm"
    end = "--attention-dropout 0.0 --hidden-dropout 0.0 --make-vocab-size-divisible-by 128"
    assert command_line(LLAMA, Llama3(factor=128.0)) == shlex.split(
        f"{common} --swiglu --untie-embeddings-and-output-weights --use-rope-scaling --disable-bias-linear "
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8 "
        f"--kv-channels 128 {after} --norm-epsilon 1e-05 {end} --position-embedding-type rope --rotary-base 500000 "
        "--rope-scaling-factor 128.0"
    )
    assert command_line(QWEN3, replace(DIMENSIONS, truncate=False)) == shlex.split(
        f"{common} --qk-layernorm --swiglu --disable-bias-linear --no-yarn-correction-range-round-to-int "
        "--num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 --num-attention-heads 16 --num-query-groups 8 "
        f"--kv-channels 128 {after} --norm-epsilon 1e-06 {end} --position-embedding-type yarn --rotary-base 1000000 "
        "--rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 32768"
    )


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({}, (False, False)),
        ({"qkv_bias": True, "family": "qwen2"}, (False, True)),
        ({"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}, (True, True)),
        ({"qkv_bias": True, "attention_output_bias": True}, "queries, keys and values, attention's output"),
        ({"mlp_bias": True}, "of the MLP"),
    ],
)
def test_biases(options: dict[str, Any], stated: Any) -> None:
    model = replace(LLAMA, **options)
    if isinstance(stated, str):
        with pytest.raises(UserError, match=f"cannot express this model's biases .*{stated}"):
            arguments.of_model(model, 4096, 1)
        return
    values = arguments.of_model(model, 4096, 1)
    assert (values["add_bias_linear"], values["add_qkv_bias"]) == stated
    line = command_line(model, Unscaled(theta=10000.0))
    assert ("--disable-bias-linear" in line, "--add-qkv-bias" in line) == (not stated[0], stated[1])


def test_vocabulary() -> None:
    assert [arguments.padded_rows(LLAMA, tp) for tp in (1, 2, 4, 8)] == [128256, 128256, 128512, 129024]
    for tp in (0, 3):
        with pytest.raises(UserError, match=f"--target-tp {tp} must be at least 1 and divide"):
            arguments.padded_rows(LLAMA, tp)


TAKEN = """
num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention
kv_channels max_position_embeddings position_embedding_type add_position_embedding use_rotary_position_embeddings
rotary_base rotary_percent rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
untie_embeddings_and_output_weights apply_layernorm_1p normalization apply_query_key_layer_scaling attention_dropout
hidden_dropout padded_vocab_size ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
expert_model_parallel_size
"""
"""What Megatron-LM of core 0.16 to 0.19 takes from a checkpoint of a dense GPT."""


def test_stored() -> None:
    values = {**rope.arguments(Llama3(factor=8.0), 128, 131072)[0], **arguments.of_model(LLAMA, 131072, 8)}
    stored = vars(arguments.stored(values, 8))
    assert [name for name in TAKEN.split() if stored.get(name) is None] == []
    assert (stored["padded_vocab_size"], stored["tensor_model_parallel_size"], stored["kv_channels"]) == (
        129024,
        8,
        128,
    )
    # Megatron-LM would take them from here rather than from its command line.
    assert not {"tokenizer_type", "tokenizer_model"} & stored.keys()
