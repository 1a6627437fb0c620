"""The one table between Hugging Face's Llama tensors and Megatron's parameters, with split and merge for any
TP size.

Pure: no megatron, no files. A Megatron parameter's shard on one tensor parallel rank is a list of `Piece`s,
each a block of an HF tensor and the place where it lands; reading a shard and rebuilding the HF tensors are
the same list walked both ways.

Shapes: H hidden, F ffn, N query heads, K KV heads, D head_dim, V vocabulary, P vocabulary padded to a
multiple of TP; f = F/TP, n = N/TP, k = K/TP, p = P/TP.

    Megatron, on one rank                          Hugging Face
    embedding.word_embeddings.weight      [p, H]   model.embed_tokens.weight                 [V, H]    rows
    ...input_layernorm.weight             [H]      ...input_layernorm.weight                 [H]       whole on every rank
    ...self_attention.linear_qkv.weight   [(n + 2k)D, H]  ...self_attn.{q,k,v}_proj.weight  [ND | KD, H]  by KV head: its q, k, v
    ...self_attention.linear_proj.weight  [H, nD]  ...self_attn.o_proj.weight                [H, ND]   columns
    ...pre_mlp_layernorm.weight           [H]      ...post_attention_layernorm.weight        [H]       whole on every rank
    ...mlp.linear_fc1.weight              [2f, H]  ...mlp.{gate,up}_proj.weight              [F, H]    its gate, then its up rows
    ...mlp.linear_fc2.weight              [H, f]   ...mlp.down_proj.weight                   [H, F]    columns
    decoder.final_layernorm.weight        [H]      model.norm.weight                         [H]       whole on every rank
    output_layer.weight                   [p, H]   lm_head.weight (tied: embed_tokens)       [V, H]    rows

Both sides keep rotate-half order inside a head, so q and k rows are moved but never permuted. Rows V..P are
zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ultralong.config import Model, Parallel, check_model_layout

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_TRANSFORMER_ENGINE = {  # its fused norm + linear modules own the norm's weight
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Piece:
    """A block of one HF tensor and its place in a Megatron shard; both blocks have the same shape."""

    hf: str
    """Name of the HF tensor."""
    source: tuple[slice, ...]
    """Where it is in the HF tensor, one slice a dimension."""
    target: tuple[slice, ...]
    """Where it goes in this rank's shard."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all TP ranks: `vocab_size` rounded up to a multiple of `tp`."""
    return -(-vocab_size // tp) * tp


def canonical(name: str) -> str:
    """`name` with TransformerEngine's norm names replaced by Megatron's own."""
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _TRANSFORMER_ENGINE:
        return f"decoder.layers.{layer[1]}.{_TRANSFORMER_ENGINE[layer[2]]}"
    return name


def megatron_names(model: Model) -> list[str]:
    """Every Megatron parameter of the whole model, in the model's order, each tensor once (tied: no output
    layer)."""
    parts = (
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    layers = [f"decoder.layers.{i}.{part}.weight" for i in range(model.layers) for part in parts]
    return [EMBEDDING, *layers, "decoder.final_layernorm.weight"] + (
        [] if model.tied_embeddings else [OUTPUT]
    )


def hf_names(name: str, model: Model) -> list[str]:
    """The HF tensors that Megatron parameter `name` is made of. KeyError for a name that Llama does not have."""
    name = canonical(name)
    fixed = {
        EMBEDDING: HF_EMBEDDING,
        "decoder.final_layernorm.weight": "model.norm.weight",
        OUTPUT: HF_EMBEDDING if model.tied_embeddings else HF_OUTPUT,
    }
    if name in fixed:
        return [fixed[name]]
    layer = _LAYER.fullmatch(name)
    per_layer = {
        "input_layernorm.weight": ("input_layernorm",),
        "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj.weight": ("self_attn.o_proj",),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm",),
        "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2.weight": ("mlp.down_proj",),
    }
    if layer is None or layer[2] not in per_layer or int(layer[1]) >= model.layers:
        raise KeyError(f"{name} is not a parameter of a Llama model with {model.layers} layers")
    return [f"model.layers.{int(layer[1])}.{part}.weight" for part in per_layer[layer[2]]]


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor an HF checkpoint of `model` holds, in the model's order (tied: no
    lm_head)."""
    h, f, d = model.hidden_size, model.ffn_size, model.head_dim
    shapes = {
        "embed_tokens": (model.vocab_size, h),
        "lm_head": (model.vocab_size, h),
        "norm": (h,),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        "q_proj": (model.heads * d, h),
        "k_proj": (model.kv_heads * d, h),
        "v_proj": (model.kv_heads * d, h),
        "o_proj": (h, model.heads * d),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }
    return {hf: shapes[hf.split(".")[-2]] for name in megatron_names(model) for hf in hf_names(name, model)}


def shard_shape(name: str, model: Model, tp: int) -> tuple[int, ...]:
    """Shape of Megatron parameter `name` on each of `tp` ranks."""
    h, name = model.hidden_size, canonical(name)
    if name in (EMBEDDING, OUTPUT):
        return padded_vocab_size(model.vocab_size, tp) // tp, h
    if name.endswith("linear_qkv.weight"):
        return (model.heads + 2 * model.kv_heads) // tp * model.head_dim, h
    if name.endswith("linear_proj.weight"):
        return h, model.heads // tp * model.head_dim
    if name.endswith("linear_fc1.weight"):
        return 2 * (model.ffn_size // tp), h
    if name.endswith("linear_fc2.weight"):
        return h, model.ffn_size // tp
    hf_names(name, model)  # refuses an unknown name
    return (h,)


def pieces(name: str, model: Model, tp_rank: int, tp: int) -> list[Piece]:
    """What Megatron parameter `name` on `tp_rank` of `tp` consists of.

    Together the pieces fill the shard, but for padding rows of the vocabulary, which are zero; over all ranks
    they cover every HF tensor. UserError where `model` does not divide by `tp`; KeyError for a name that
    Llama does not have.
    """
    check_model_layout(model, Parallel(tp=tp))
    name = canonical(name)
    hf = hf_names(name, model)
    whole = slice(0, model.hidden_size)
    if name in (EMBEDDING, OUTPUT):
        p = padded_vocab_size(model.vocab_size, tp) // tp
        first, last = min(tp_rank * p, model.vocab_size), min((tp_rank + 1) * p, model.vocab_size)
        # A rank can hold nothing but padding: no piece then.
        return (
            [Piece(hf[0], (slice(first, last), whole), (slice(0, last - first), whole))]
            if last > first
            else []
        )
    if name.endswith("linear_qkv.weight"):
        return _qkv(hf, model, tp_rank, tp)
    if name.endswith("linear_fc1.weight"):
        f = model.ffn_size // tp
        mine = slice(tp_rank * f, (tp_rank + 1) * f)
        return [Piece(hf[i], (mine, whole), (slice(i * f, (i + 1) * f), whole)) for i in range(2)]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        columns = shard_shape(name, model, tp)[1]
        return [
            Piece(
                hf[0], (whole, slice(tp_rank * columns, (tp_rank + 1) * columns)), (whole, slice(0, columns))
            )
        ]
    return [Piece(hf[0], (whole,), (whole,))]


def _qkv(hf: list[str], model: Model, tp_rank: int, tp: int) -> list[Piece]:
    """Megatron's rows: for each KV head of this rank its query heads, its key, its value."""
    d, queries, whole = model.head_dim, model.heads // model.kv_heads, slice(0, model.hidden_size)
    k = model.kv_heads // tp
    found, row = [], 0
    for group in range(tp_rank * k, (tp_rank + 1) * k):
        for tensor, heads in zip(hf, (queries, 1, 1), strict=True):
            rows = heads * d
            found.append(
                Piece(
                    tensor, (slice(group * rows, (group + 1) * rows), whole), (slice(row, row + rows), whole)
                )
            )
            row += rows
    return found


def split(name: str, tensors: Mapping[str, Tensor], model: Model, tp_rank: int, tp: int) -> Tensor:
    """Megatron parameter `name` on `tp_rank` of `tp`, from whole HF tensors (`tensors[hf name]`); dtype and
    device of theirs."""
    like = tensors[hf_names(name, model)[0]]
    shard = torch.zeros(shard_shape(name, model, tp), dtype=like.dtype, device=like.device)
    for piece in pieces(name, model, tp_rank, tp):
        shard[piece.target] = tensors[piece.hf][piece.source]
    return shard


def merge(name: str, shards: Sequence[Tensor], model: Model) -> dict[str, Tensor]:
    """HF name -> whole tensor, from the shards of Megatron parameter `name` in TP rank order.

    The exact inverse of `split`, the vocabulary's padding dropped. ValueError for a shard of another shape.
    """
    tp, shapes = len(shards), hf_shapes(model)
    for shard in shards:
        if tuple(shard.shape) != shard_shape(name, model, tp):
            raise ValueError(
                f"{name}: shard of {tuple(shard.shape)} over {tp} ranks, expected {shard_shape(name, model, tp)}"
            )
    whole = {
        hf: torch.empty(shapes[hf], dtype=shards[0].dtype, device=shards[0].device)
        for hf in hf_names(name, model)
    }
    for tp_rank, shard in enumerate(shards):
        for piece in pieces(name, model, tp_rank, tp):
            whole[piece.hf][piece.source] = shard[piece.target]
    return whole
