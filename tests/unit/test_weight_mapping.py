"""Mapping: layouts written as literal lists, every tensor covered, merge the exact inverse of split."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping

SMALL = Model(hidden_size=10, ffn_size=6, layers=2, heads=9, kv_heads=3, head_dim=2, vocab_size=7)
TIED = dataclasses.replace(SMALL, tied_embeddings=True)
EVEN = Model(hidden_size=10, ffn_size=12, layers=1, heads=8, kv_heads=4, head_dim=4, vocab_size=13)
LAYER = "decoder.layers.1."


def random_tensors(model: Model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in weight_mapping.hf_shapes(model).items()}


def rows(first: int, count: int, width: int = 3) -> torch.Tensor:
    """[count, width] whose every element names its row."""
    return torch.arange(first, first + count).float()[:, None].expand(-1, width).clone()


def test_qkv_rows_of_each_rank_as_a_literal_list():
    # 4 query heads, 2 KV heads, head_dim 2: q rows 0-7, k rows 100-103, v rows 200-203.
    model = Model(hidden_size=3, ffn_size=4, layers=1, heads=4, kv_heads=2, head_dim=2, vocab_size=4)
    prefix = "model.layers.0.self_attn."
    tensors = {
        f"{prefix}{x}_proj.weight": rows(first, n)
        for x, first, n in (("q", 0, 8), ("k", 100, 4), ("v", 200, 4))
    }
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    first = [0, 1, 2, 3, 100, 101, 200, 201]
    second = [4, 5, 6, 7, 102, 103, 202, 203]
    assert weight_mapping.split(name, tensors, model, 0, 1)[:, 0].tolist() == first + second
    assert weight_mapping.split(name, tensors, model, 0, 2)[:, 0].tolist() == first
    assert weight_mapping.split(name, tensors, model, 1, 2)[:, 2].tolist() == second


def test_mlp_and_columns_of_each_rank_as_literal_lists():
    model = Model(hidden_size=3, ffn_size=6, layers=1, heads=2, kv_heads=2, head_dim=4, vocab_size=4)
    prefix = "model.layers.0."
    tensors = {
        f"{prefix}mlp.gate_proj.weight": rows(0, 6),
        f"{prefix}mlp.up_proj.weight": rows(10, 6),
        f"{prefix}mlp.down_proj.weight": rows(0, 6).T.contiguous(),
        f"{prefix}self_attn.o_proj.weight": rows(0, 8).T.contiguous(),
    }
    parts = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj")
    fc1, fc2, proj = (f"decoder.layers.0.{part}.weight" for part in parts)
    assert weight_mapping.split(fc1, tensors, model, 0, 2)[:, 1].tolist() == [0, 1, 2, 10, 11, 12]
    assert weight_mapping.split(fc1, tensors, model, 1, 2)[:, 1].tolist() == [3, 4, 5, 13, 14, 15]
    assert weight_mapping.split(fc2, tensors, model, 1, 2)[2].tolist() == [3, 4, 5]
    assert weight_mapping.split(proj, tensors, model, 1, 2)[0].tolist() == [4, 5, 6, 7]


def test_vocabulary_is_padded_with_zero_rows_on_the_last_ranks():
    tensors = {"model.embed_tokens.weight": rows(1, 5), "lm_head.weight": rows(11, 5)}
    model = Model(hidden_size=3, ffn_size=4, layers=1, heads=4, kv_heads=4, head_dim=2, vocab_size=5)
    shards = [
        weight_mapping.split(weight_mapping.EMBEDDING, tensors, model, rank, 4)[:, 0].tolist()
        for rank in range(4)
    ]
    assert shards == [[1, 2], [3, 4], [5, 0], [0, 0]]
    heads = [
        weight_mapping.split(weight_mapping.OUTPUT, tensors, model, rank, 2)[:, 0].tolist()
        for rank in range(2)
    ]
    assert heads == [[11, 12, 13], [14, 15, 0]]
    assert weight_mapping.pieces(weight_mapping.EMBEDDING, model, 3, 4) == []
    assert [weight_mapping.padded_vocab_size(97, tp) for tp in (1, 2, 4, 8)] == [97, 98, 100, 104]


def test_tied_output_layer_comes_from_the_embedding():
    assert weight_mapping.OUTPUT not in weight_mapping.megatron_names(
        TIED
    ) and weight_mapping.HF_OUTPUT not in weight_mapping.hf_shapes(TIED)
    assert weight_mapping.hf_names(weight_mapping.OUTPUT, TIED) == ["model.embed_tokens.weight"]
    assert weight_mapping.hf_names(weight_mapping.OUTPUT, SMALL) == ["lm_head.weight"]


@pytest.mark.parametrize(("model", "tps"), [(SMALL, (1, 3)), (TIED, (1, 3)), (EVEN, (1, 2, 4))])
def test_merge_undoes_split_bit_by_bit_and_uses_every_tensor_once(model, tps):
    tensors = random_tensors(model)
    for tp in tps:
        found: dict[str, torch.Tensor] = {}
        for name in weight_mapping.megatron_names(model):
            shards = [weight_mapping.split(name, tensors, model, rank, tp) for rank in range(tp)]
            assert all(tuple(s.shape) == weight_mapping.shard_shape(name, model, tp) for s in shards)
            merged = weight_mapping.merge(name, shards, model)
            assert not merged.keys() & found.keys()
            found |= merged
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("model", "tp"), [(SMALL, 3), (EVEN, 1), (EVEN, 2), (EVEN, 4)])
def test_pieces_fill_each_shard_exactly_once(model, tp):
    for name in weight_mapping.megatron_names(model):
        for rank in range(tp):
            count = torch.zeros(weight_mapping.shard_shape(name, model, tp))
            for piece in weight_mapping.pieces(name, model, rank, tp):
                assert [s.stop - s.start for s in piece.source] == [s.stop - s.start for s in piece.target]
                count[piece.target] += 1
            p = weight_mapping.padded_vocab_size(model.vocab_size, tp) // tp
            real = (
                max(0, min(p, model.vocab_size - rank * p))
                if name in (weight_mapping.EMBEDDING, weight_mapping.OUTPUT)
                else len(count)
            )
            assert (count[:real] == 1).all() and (count[real:] == 0).all(), (name, rank)


def test_transformer_engine_norm_names():
    assert (
        weight_mapping.canonical(LAYER + "self_attention.linear_qkv.layer_norm_weight")
        == LAYER + "input_layernorm.weight"
    )
    fc1 = LAYER + "mlp.linear_fc1.layer_norm_weight"
    assert weight_mapping.hf_names(fc1, SMALL) == ["model.layers.1.post_attention_layernorm.weight"]
    assert weight_mapping.shard_shape(LAYER + "mlp.linear_fc1.layer_norm_weight", SMALL, 3) == (10,)
    for name in weight_mapping.megatron_names(SMALL):
        assert weight_mapping.canonical(name) == name


def test_head_dim_apart_from_hidden_over_heads():
    shapes = weight_mapping.hf_shapes(SMALL)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (18, 10)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (6, 10)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (10, 18)
    assert weight_mapping.shard_shape(LAYER + "self_attention.linear_qkv.weight", SMALL, 3) == (10, 10)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match="kv_heads=3 is not divisible by parallel.tp=2|heads=9 is not divisible"
    ):
        weight_mapping.pieces(LAYER + "self_attention.linear_qkv.weight", SMALL, 0, 2)
    for name in (
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "something",
    ):
        with pytest.raises(KeyError, match="not a parameter"):
            weight_mapping.pieces(name, SMALL, 0, 1)
    with pytest.raises(ValueError, match="shard of"):
        weight_mapping.merge(weight_mapping.EMBEDDING, [torch.zeros(6, 10)], SMALL)
