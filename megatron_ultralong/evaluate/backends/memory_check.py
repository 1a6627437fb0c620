"""Check before the work that a model and the keys and values of its prompts fit into memory; suggest a layout
that does.

Bytes per rank: weights; keys and values, 2 x layers/PP x kv_heads/TP x head_dim x element size x tokens/CP;
and the activations of one chunk of a prompt in a layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from megatron_ultralong.config import Model, Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.model.inference.kv_cache import kv_bytes
from megatron_ultralong.runtime.memory import free_bytes

SPARE = 0.05
"""Fraction of the free device memory that stays unused: fragmentation, communication buffers."""


def weight_bytes(model: Model, parallel: Parallel, itemsize: int) -> int:
    """Weights of the largest rank."""

    def numel(name: str) -> int:
        return math.prod(weight_mapping.shard_shape(name, model, parallel.tp))

    names = weight_mapping.megatron_names(model)
    layers = sum(numel(name) for name in names if name.startswith("decoder.layers.")) // parallel.pp
    others = sum(numel(name) for name in names if not name.startswith("decoder.layers."))
    embedding = numel("embedding.word_embeddings.weight")
    # The first and last stages hold the embedding and the output layer; with PP 1 and tied weights both are
    # one.
    return itemsize * (layers + (others if parallel.pp == 1 else embedding + model.hidden_size))


def chunk_bytes(model: Model, parallel: Parallel, chunk: int, itemsize: int) -> int:
    """Activations of `chunk` tokens in one layer: projections and MLP of this rank's share, and the queries
    and partial outputs of all ranks, which are exchanged and merged in float32."""
    c = -(-chunk // parallel.cp)
    mlp = 3 * model.ffn_size // parallel.tp
    heads = model.heads // parallel.tp
    own = (
        c
        * itemsize
        * (4 * model.hidden_size + max(mlp, 2 * (heads + 2 * model.kv_heads // parallel.tp) * model.head_dim))
    )
    attention = (
        chunk
        * heads
        * (2 * model.head_dim * itemsize + 4 * (model.head_dim + 1) * (4 if parallel.cp > 1 else 3))
    )
    return own + attention + 8 * model.vocab_size


def kept_bytes(model: Model, parallel: Parallel, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` of this rank."""
    return kv_bytes(
        model.layers // parallel.pp, model.kv_heads // parallel.tp, model.head_dim, tokens, itemsize
    )


def check_plan(
    model: Model,
    parallel: Parallel,
    device: torch.device,
    *,
    chunk: int,
    itemsize: int,
    tokens: int = 0,
    loaded: bool = False,
) -> None:
    """UserError unless the model and the keys and values of `tokens` tokens (all ranks and sequences) fit.
    loaded: the weights are already in memory."""
    free = int(free_bytes(device) * (1 - SPARE))
    have = free + (weight_bytes(model, parallel, itemsize) if loaded else 0)
    if needed(model, parallel, chunk, itemsize, tokens) > have:
        raise UserError(refusal(model, parallel, chunk=chunk, itemsize=itemsize, tokens=tokens, have=have))


def needed(model: Model, parallel: Parallel, chunk: int, itemsize: int, tokens: int) -> int:
    """Total bytes per rank."""
    return (
        weight_bytes(model, parallel, itemsize)
        + chunk_bytes(model, parallel, chunk, itemsize)
        + kept_bytes(model, parallel, -(-tokens // parallel.cp), itemsize)
    )


def refusal(model: Model, parallel: Parallel, *, chunk: int, itemsize: int, tokens: int, have: int) -> str:
    """One line: the memory needed and available, and the smallest --cp and --tp that would suffice, all else
    equal."""

    def fits(**change: Any) -> bool:
        return needed(model, replace(parallel, **change), chunk, itemsize, tokens) <= have

    cps = [parallel.cp * 2**i for i in range(1, 12)]
    tps = [
        tp
        for tp in range(parallel.tp + 1, model.kv_heads + 1)
        if model.kv_heads % tp == 0 and model.ffn_size % tp == 0 and tp % parallel.tp == 0
    ]
    layouts = [
        f"--{name} {size}"
        for name, sizes in (("cp", cps), ("tp", tps))
        for size in [next((s for s in sizes if fits(**{name: s})), None)]
        if size
    ]
    advice = (
        f"{' or '.join(layouts)} on correspondingly more ranks would fit"
        if layouts
        else "use a larger --tp or --pp, or fewer tokens at a time (--batch)"
    )
    need, weights, kept, has = (
        _gib(size)
        for size in (
            needed(model, parallel, chunk, itemsize, tokens),
            weight_bytes(model, parallel, itemsize),
            kept_bytes(model, parallel, -(-tokens // parallel.cp), itemsize),
            have,
        )
    )
    return (
        f"a rank needs {need} GiB ({weights} for weights, {kept} for keys and values of {tokens:,} tokens) but has "
        f"{has} GiB at --tp {parallel.tp} --pp {parallel.pp} --cp {parallel.cp}; {advice}"
    )


def _gib(size: float) -> str:
    """Three digits, and none of them an exponent."""
    return f"{size / 2**30:,.0f}" if size >= 100 * 2**30 else f"{size / 2**30:.3g}"


def check_room(reader: Any, more: int, own: list[int], tokens: int) -> None:
    """UserError, on all ranks, unless every rank has room for the keys and values of `more` tokens of the
    shared context and of `own` tokens of each sequence.

    tokens: of the shared context in total, for the message. Called by every rank.
    """
    ranks, itemsize = reader.ranks, reader.dtype.itemsize
    parallel = Parallel(tp=ranks.tp, pp=ranks.pp, cp=ranks.cp)
    need = kept_bytes(reader.model, parallel, max(0, more) + sum(own), itemsize) + chunk_bytes(
        reader.model, parallel, reader.chunk_tokens, itemsize
    )
    free = int(free_bytes(ranks.device) * (1 - SPARE))
    left = torch.tensor([free - need], dtype=torch.int64, device=ranks.device)
    torch.distributed.all_reduce(left, op=torch.distributed.ReduceOp.MIN)
    if int(left) < 0:
        total = tokens + sum(own) * ranks.cp
        have = int(left) + needed(reader.model, parallel, reader.chunk_tokens, itemsize, total)
        raise UserError(
            refusal(
                reader.model, parallel, chunk=reader.chunk_tokens, itemsize=itemsize, tokens=total, have=have
            )
        )
