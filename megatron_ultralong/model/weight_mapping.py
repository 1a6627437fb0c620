"""The table of weights: each Megatron parameter, the Hugging Face tensors it is made of, and how tensor
parallelism splits it.

Names, shapes, shards and their split and merge all follow from the rows of `WEIGHTS`; a model has the rows
whose option it has. Pure: no Megatron, no files.

Both sides store heads in rotate-half order, so rows of q and k are moved but never permuted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ultralong.config import Model, Parallel, check_model_layout

# ---- the table ---------------------------------------------------------------------------------

Split = Literal["replicated", "vocabulary", "by_kv_head", "gate_up", "columns"]
"""How a parameter is split over tensor parallel ranks:

    replicated   every rank holds all of it
    vocabulary   rows, after padding to a multiple of TP; padding rows are zero
    by_kv_head   rows: for each KV head of the rank its query heads, its key, its value
    gate_up      rows: the rank's rows of the gate, then its rows of up
    columns      columns

The rows of a bias are its elements.
"""


@dataclass(frozen=True)
class Weight:
    """One row of the table. `{}` in a name stands for the layer number."""

    megatron: str
    hf: dict[str, str]
    """Hugging Face tensor -> its shape, in the letters of `_sizes`."""
    split: Split
    te: str = ""
    """Megatron's name with TransformerEngine, whose fused norm + linear modules own the norm's weight."""
    hf_if_tied: str = ""
    """The tensor used instead in a model with tied embeddings."""
    option: str = ""
    """Field of `Model` that is true for models with this parameter; empty = all models."""


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"

_M, _HF = "decoder.layers.{}.", "model.layers.{}."

WEIGHTS = (
    Weight(EMBEDDING, {HF_EMBEDDING: "V H"}, "vocabulary"),
    Weight(
        _M + "input_layernorm.weight",
        {_HF + "input_layernorm.weight": "H"},
        "replicated",
        te=_M + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Weight(
        _M + "self_attention.linear_qkv.weight",
        {
            _HF + "self_attn.q_proj.weight": "Q H",
            _HF + "self_attn.k_proj.weight": "K H",
            _HF + "self_attn.v_proj.weight": "K H",
        },
        "by_kv_head",
    ),
    Weight(
        _M + "self_attention.linear_qkv.bias",
        {
            _HF + "self_attn.q_proj.bias": "Q",
            _HF + "self_attn.k_proj.bias": "K",
            _HF + "self_attn.v_proj.bias": "K",
        },
        "by_kv_head",
        option="qkv_bias",
    ),
    Weight(
        _M + "self_attention.q_layernorm.weight",
        {_HF + "self_attn.q_norm.weight": "D"},
        "replicated",
        option="qk_norm",
    ),
    Weight(
        _M + "self_attention.k_layernorm.weight",
        {_HF + "self_attn.k_norm.weight": "D"},
        "replicated",
        option="qk_norm",
    ),
    Weight(_M + "self_attention.linear_proj.weight", {_HF + "self_attn.o_proj.weight": "H Q"}, "columns"),
    Weight(
        _M + "self_attention.linear_proj.bias",
        {_HF + "self_attn.o_proj.bias": "H"},
        "replicated",
        option="attention_output_bias",
    ),
    Weight(
        _M + "pre_mlp_layernorm.weight",
        {_HF + "post_attention_layernorm.weight": "H"},
        "replicated",
        te=_M + "mlp.linear_fc1.layer_norm_weight",
    ),
    Weight(
        _M + "mlp.linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": "F H", _HF + "mlp.up_proj.weight": "F H"},
        "gate_up",
    ),
    Weight(
        _M + "mlp.linear_fc1.bias",
        {_HF + "mlp.gate_proj.bias": "F", _HF + "mlp.up_proj.bias": "F"},
        "gate_up",
        option="mlp_bias",
    ),
    Weight(_M + "mlp.linear_fc2.weight", {_HF + "mlp.down_proj.weight": "H F"}, "columns"),
    Weight(_M + "mlp.linear_fc2.bias", {_HF + "mlp.down_proj.bias": "H"}, "replicated", option="mlp_bias"),
    Weight("decoder.final_layernorm.weight", {"model.norm.weight": "H"}, "replicated"),
    Weight(OUTPUT, {HF_OUTPUT: "V H"}, "vocabulary", hf_if_tied=HF_EMBEDDING),
)


def _sizes(model: Model) -> dict[str, int]:
    """The letters of the table's shapes."""
    return {
        "H": model.hidden_size,
        "F": model.ffn_size,
        "V": model.vocab_size,
        "Q": model.heads * model.head_dim,
        "K": model.kv_heads * model.head_dim,
        "D": model.head_dim,
    }


def _has(model: Model, weight: Weight) -> bool:
    return not weight.option or bool(getattr(model, weight.option))


# ---- names and shapes --------------------------------------------------------------------------


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all TP ranks: `vocab_size` rounded up to a multiple of `tp`."""
    return -(-vocab_size // tp) * tp


def canonical(name: str) -> str:
    """Replace TransformerEngine's name of a norm in `name` by Megatron's own."""
    for weight in WEIGHTS:
        if weight.te and (layer := _match(weight.te, name)) is not None:
            return weight.megatron.format(layer)
    return name


def megatron_names(model: Model) -> list[str]:
    """List every Megatron parameter of the complete model, in the model's order, each tensor once (tied: no
    output layer)."""
    return [name for name, _ in _all_weights(model)]


def hf_names(name: str, model: Model) -> list[str]:
    """List the HF tensors that Megatron parameter `name` is made of. KeyError for a name the model lacks."""
    return list(_hf_shapes_of(name, model))


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in an HF checkpoint of `model`, in the model's order (tied: no
    lm_head)."""
    return {hf: shape for name in megatron_names(model) for hf, shape in _hf_shapes_of(name, model).items()}


def shard_shape(name: str, model: Model, tp: int, vocab_rows: int | None = None) -> tuple[int, ...]:
    """Shape of Megatron parameter `name` on each of `tp` ranks. vocab_rows: rows of the embedding over all of
    them, where it is padded further than here."""
    split, shapes = _row(name, model)[0].split, list(_hf_shapes_of(name, model).values())
    if split == "replicated":
        return shapes[0]
    if split == "columns":
        return shapes[0][0], shapes[0][1] // tp
    rows = sum(shape[0] for shape in shapes)
    if split == "vocabulary":
        rows = vocab_rows or padded_vocab_size(rows, tp)
    return rows // tp, *shapes[0][1:]


def is_replicated(name: str, model: Model) -> bool:
    """Whether every tensor parallel rank holds all of Megatron parameter `name`."""
    return _row(name, model)[0].split == "replicated"


def _all_weights(model: Model) -> list[tuple[str, Weight]]:
    """(name, row) of every parameter, the per-layer rows repeated for each layer."""
    weights = [w for w in WEIGHTS if _has(model, w) and not (model.tied_embeddings and w.hf_if_tied)]
    per_layer = [weight for weight in weights if "{}" in weight.megatron]
    first = weights.index(per_layer[0])
    layers = [(w.megatron.format(layer), w) for layer in range(model.layers) for w in per_layer]
    before, after = weights[:first], weights[first + len(per_layer) :]
    return [(w.megatron, w) for w in before] + layers + [(w.megatron, w) for w in after]


def _row(name: str, model: Model) -> tuple[Weight, str]:
    """(row of the table, layer number or "") of a Megatron parameter."""
    name = canonical(name)
    for weight in WEIGHTS:
        layer = _match(weight.megatron, name)
        if layer is not None and int(layer or 0) < model.layers and _has(model, weight):
            return weight, layer
    raise KeyError(
        f"{name} is not a parameter of a {model.family} model with {model.layers} layers and its options"
    )


def _match(pattern: str, name: str) -> str | None:
    """The layer number in `name`, "" where `pattern` has none; None if it does not match."""
    match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), name)
    return None if match is None else "".join(match.groups())


def _hf_shapes_of(name: str, model: Model) -> dict[str, tuple[int, ...]]:
    """HF tensor -> shape, of those that Megatron parameter `name` is made of."""
    weight, layer = _row(name, model)
    sizes = _sizes(model)
    return {
        weight.hf_if_tied if model.tied_embeddings and weight.hf_if_tied else hf.format(layer): tuple(
            sizes[letter] for letter in shape.split()
        )
        for hf, shape in weight.hf.items()
    }


# ---- split and merge ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A block of one HF tensor and its place in a Megatron shard; both blocks have the same shape."""

    hf: str
    """Name of the HF tensor."""
    source: tuple[slice, ...]
    """Its place in the HF tensor, one slice per dimension."""
    target: tuple[slice, ...]
    """Its place in this rank's shard."""


def pieces(name: str, model: Model, tp_rank: int, tp: int, vocab_rows: int | None = None) -> list[Piece]:
    """List the blocks that Megatron parameter `name` on `tp_rank` of `tp` consists of.

    Together they fill the shard, except for padding rows of the vocabulary, which are zero; over all ranks
    they cover every HF tensor. vocab_rows: as in `shard_shape`. UserError where `model` does not divide by
    `tp`; KeyError for a name the model lacks.
    """
    check_model_layout(model, Parallel(tp=tp))
    split, shapes = _row(name, model)[0].split, _hf_shapes_of(name, model)
    if split == "replicated":
        return [Piece(hf, (slice(0, n),), (slice(0, n),)) for hf, (n,) in shapes.items()]
    # The shard is a sequence of groups, each with one block of every HF tensor.
    groups = model.kv_heads // tp if split == "by_kv_head" else 1
    dim = 1 if split == "columns" else 0
    blocks, place = [], 0
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        for hf, shape in shapes.items():
            length = shape[dim]
            if split == "vocabulary":
                length = vocab_rows or padded_vocab_size(length, tp)
            size = length // (tp * groups)
            start, stop = min(group * size, shape[dim]), min((group + 1) * size, shape[dim])
            if start < stop:  # otherwise the rank holds nothing but padding
                source = [slice(0, length) for length in shape]
                target = source.copy()
                source[dim], target[dim] = slice(start, stop), slice(place, place + stop - start)
                blocks.append(Piece(hf, tuple(source), tuple(target)))
            place += size
    return blocks


def split(name: str, tensors: Mapping[str, Tensor], model: Model, tp_rank: int, tp: int) -> Tensor:
    """Build Megatron parameter `name` on `tp_rank` of `tp` from complete HF tensors (`tensors[hf name]`), in
    their dtype and on their device."""
    like = tensors[hf_names(name, model)[0]]
    shard = torch.zeros(shard_shape(name, model, tp), dtype=like.dtype, device=like.device)
    for piece in pieces(name, model, tp_rank, tp):
        shard[piece.target] = tensors[piece.hf][piece.source]
    return shard


def merge(name: str, shards: Sequence[Tensor], model: Model) -> dict[str, Tensor]:
    """Rebuild HF name -> complete tensor from the shards of Megatron parameter `name` in TP rank order.

    The exact inverse of `split`, without the vocabulary's padding. ValueError for a shard of another shape.
    """
    tp = len(shards)
    expected = shard_shape(name, model, tp)
    for shard in shards:
        if tuple(shard.shape) != expected:
            raise ValueError(f"{name}: shard of {tuple(shard.shape)} over {tp} ranks, expected {expected}")
    complete = {
        hf: torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device)
        for hf, shape in _hf_shapes_of(name, model).items()
    }
    for tp_rank, shard in enumerate(shards):
        for piece in pieces(name, model, tp_rank, tp):
            complete[piece.hf][piece.source] = shard[piece.target]
    return complete
