"""Bytes on a GPU and in host memory that a run needs, by part, and the settling of memory.offload=auto.

All figures are sums of the tensors a run must hold. The allocator's fragmentation and NCCL's buffers are not
counted; a tenth of the GPU is left free for them. docs/plan.md explains every formula.

Letters: S tokens per sequence, s = S/CP, b micro-batch, H hidden size, F MLP width, V vocabulary padded to
TP, h query heads, g KV heads, d head dimension, e bytes of a bf16 or float32 element.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from megatron_ultralong import lora
from megatron_ultralong.config import (
    LOSS_BLOCK,
    OFFLOADED_LAYERS_ON_GPU,
    Memory,
    Model,
    Run,
    check_model_layout,
)
from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.model.weight_mapping import padded_vocab_size
from megatron_ultralong.planning import layer_memory

MEMORY_MODES = (
    Memory(recompute="none", offload="off"),
    Memory(recompute="full", offload="off"),
    Memory(recompute="all_but_attention", offload="off"),
    Memory(recompute="all_but_attention", offload="layer_inputs"),
    Memory(recompute="all_but_attention", offload="all"),
)
"""Combinations of recompute and offload. For one value of recompute, each keeps less on the GPU than the one
before."""


# ---- GPU memory --------------------------------------------------------------------------------


def gpu_memory(run: Run, model: Model, world_size: int, backend: Backend = "cudnn") -> dict[str, int]:
    """Return the bytes, by part, on a GPU of the fullest pipeline stage.

    Here and below, `memory.offload` must not be auto (see `settle_offload`), `model` is the model's shape,
    `backend` the attention kernel that the GPU uses by default (cuDNN from Hopper on), and UserError is
    raised if model, batch or ranks cannot be split as `run.parallel` says.
    """
    dp, micro_batches = data_parallel_split(run, model, world_size)
    stages = [
        stage_memory(run, model, dp, micro_batches, stage, backend)
        for stage in sorted({0, run.parallel.pp - 1})
    ]
    return max(stages, key=total)


def stage_memory(
    run: Run, model: Model, dp: int, micro_batches: int, stage: int, backend: Backend = "cudnn"
) -> dict[str, int]:
    """Return the bytes, by part, on a GPU of pipeline stage `stage` (0 is the first)."""
    p, (tokens, e) = run.parallel, micro_batch_sizes(run)
    trained = trained_parameters(run, model, stage)
    parameters = stage_parameters(model, p.tp, p.pp, stage)
    if run.lora.rank:
        parameters += model.layers // p.pp * lora.parameters(model, run.lora, p.tp)
    parts = {
        "weights": parameters * e,
        "gradients (fp32)": trained * 4,
        # AdamW's two moments and, in bf16 runs, the float32 master weights, distributed over data and context
        # parallel ranks.
        "optimizer (fp32)": trained * (12 if e == 2 else 8) // (dp * p.cp),
        "saved activations": 0,
        "working layer": layer_memory.peak_bytes(run, model, backend),
        # cos and sin, float32 [s, d/2] each
        "RoPE tables": tokens // run.train.micro_batch * model.head_dim * 4,
    }
    in_flight = _layers_in_flight(run, model, micro_batches, stage)
    offloaded = offloaded_tensors(run.memory)
    for name, size in saved_per_layer(run, model).items():
        if name not in offloaded:
            # With recompute=none the working layer's own activations are counted under "working layer".
            layers = in_flight - 1 if run.memory.recompute == "none" else in_flight
        elif run.memory.query_chunks:
            layers = 0  # only chunks are on the GPU, counted under "working layer"
        else:
            layers = min(in_flight, OFFLOADED_LAYERS_ON_GPU)
        parts["saved activations"] += size * layers
    if stage == p.pp - 1:
        vocab_rows = padded_vocab_size(model.vocab_size, p.tp) // p.tp
        chunk = min(run.memory.loss_chunk or tokens, tokens)
        # Logits in e, overwritten by their gradient, and a block of them in float32; if it is trained, the
        # output weight's gradient in float32 and its share of a chunk in e; the hidden states and their
        # gradient.
        frozen = run.lora.rank and not (run.lora.train_embeddings and model.tied_embeddings)
        parts["loss"] = (
            chunk * vocab_rows * e
            + 4 * min(LOSS_BLOCK, chunk * vocab_rows)
            + (0 if frozen else vocab_rows * model.hidden_size * (4 + e))
            + 2 * (tokens // p.tp) * model.hidden_size * e
        )
        # The two are never in memory at the same time: only the larger one counts.
        parts["shared by layer and loss"] = -min(parts["working layer"], parts["loss"])
    return parts


def stage_parameters(model: Model, tp: int, pp: int, stage: int) -> int:
    """Return the number of parameters on one rank of pipeline stage `stage` (0 is the first)."""
    h, f, v = model.hidden_size, model.ffn_size, padded_vocab_size(model.vocab_size, tp)
    q, qkv = model.heads * model.head_dim, (model.heads + 2 * model.kv_heads) * model.head_dim
    # Split over TP: products and the biases of their split outputs; on every rank: norms, other biases.
    split = h * qkv + q * h + 3 * h * f + (qkv if model.qkv_bias else 0) + (2 * f if model.mlp_bias else 0)
    copied = h * (2 + model.attention_output_bias + model.mlp_bias) + 2 * model.head_dim * model.qk_norm
    count = model.layers // pp * (split // tp + copied)
    first, last = stage == 0, stage == pp - 1
    # A tied embedding is on the first and on the last stage; once if they are the same stage.
    embeddings = first + last - (1 if first and last and model.tied_embeddings else 0)
    return count + embeddings * v * h // tp + (h if last else 0)


def trained_parameters(run: Run, model: Model, stage: int) -> int:
    """Return the number of parameters on one rank of pipeline stage `stage` (0 is the first) that are
    trained."""
    p, h = run.parallel, model.hidden_size
    if not run.lora.rank:
        return stage_parameters(model, p.tp, p.pp, stage)
    count = model.layers // p.pp * lora.parameters(model, run.lora, p.tp)
    if run.lora.train_norms:
        count += model.layers // p.pp * (2 * h + 2 * model.head_dim * model.qk_norm)
        count += h if stage == p.pp - 1 else 0
    if run.lora.train_embeddings and (stage == 0 or (model.tied_embeddings and stage == p.pp - 1)):
        count += padded_vocab_size(model.vocab_size, p.tp) * h // p.tp
    return count


def total(parts: dict[str, int]) -> int:
    """Return the bytes of all parts together."""
    return sum(parts.values())


def fits(parts: dict[str, int], gpu_bytes: int, share: float = 0.9) -> bool:
    """Return whether `parts` fit into a fraction `share` of a GPU of `gpu_bytes`."""
    return total(parts) <= share * gpu_bytes


# ---- activations saved for the backward --------------------------------------------------------


def host_memory(run: Run, model: Model, world_size: int) -> dict[str, int]:
    """Return the bytes of pinned host memory, by part, that one GPU of the first pipeline stage fills.

    The first stage has the most micro-batches in flight. Raises as `gpu_memory`.
    """
    _, micro_batches = data_parallel_split(run, model, world_size)
    layers, offloaded = _layers_in_flight(run, model, micro_batches, 0), offloaded_tensors(run.memory)
    return {name: layers * size for name, size in saved_per_layer(run, model).items() if name in offloaded}


def saved_per_layer(run: Run, model: Model) -> dict[str, int]:
    """Return the bytes saved for the backward of one layer and micro-batch, by part."""
    tp, (tokens, e) = run.parallel.tp, micro_batch_sizes(run)
    h, q, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    per_token = {"layer inputs": h * e}
    if run.memory.recompute == "all_but_attention":
        per_token["attention outputs"] = q * e + model.heads * 4  # and logsumexps, float32
    if run.memory.recompute == "none":
        # Outputs of both norms and the second norm's input; q and k rotated, the projection they came from (v
        # is a view of it), the output and its logsumexp; the MLP's gate and up, and their product.
        per_token["activations"] = (
            3 * h * e + (q + kv + q + 2 * kv + q) * e + model.heads * 4 + 3 * model.ffn_size * e
        )
        if run.lora.rank and "down_proj" not in run.lora.targets:
            per_token["activations"] -= (
                model.ffn_size * e
            )  # kept for the gradient of the second linear's weight
        if model.qk_norm:
            per_token["activations"] += 4 * (model.heads + model.kv_heads)  # 1 / rms of each head
    return {name: size * tokens // tp for name, size in per_token.items()}


def offloaded_tensors(memory: Memory) -> tuple[str, ...]:
    """Return the parts of `saved_per_layer` that are copied to host memory."""
    assert memory.offload != "auto", "settle_offload comes first"
    return {"off": (), "layer_inputs": ("layer inputs",), "all": ("layer inputs", "attention outputs")}[
        memory.offload
    ]


def _layers_in_flight(run: Run, model: Model, micro_batches: int, stage: int) -> int:
    """Largest number of (layer, micro-batch) pairs whose forward is done and whose backward is not."""
    p = run.parallel
    return model.layers // (p.pp * p.vpp) * _micro_batches_in_flight(p.pp, p.vpp, micro_batches, stage)


def _micro_batches_in_flight(pp: int, vpp: int, micro_batches: int, stage: int) -> int:
    """Largest number of forward passes of a model chunk that wait for their backward, in (interleaved)
    1F1B."""
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp)


# ---- memory modes and sizes --------------------------------------------------------------------


def memory_modes(run: Run, fixed: Collection[str] = ()) -> list[Run]:
    """Return `run` in each of `MEMORY_MODES` that agrees with the settings named in `fixed`.

    A fixed memory.offload=auto allows every value of memory.offload.
    """
    old = run.memory
    return [
        replace(run, memory=replace(old, recompute=mode.recompute, offload=mode.offload))
        for mode in MEMORY_MODES
        if (mode.recompute == "all_but_attention" or not old.query_chunks)
        and ("memory.recompute" not in fixed or mode.recompute == old.recompute)
        and ("memory.offload" not in fixed or old.offload in ("auto", mode.offload))
    ]


def settle_offload(
    run: Run, model: Model, world_size: int, gpu_bytes: int | None, backend: Backend = "cudnn"
) -> Run:
    """Return `run` with memory.offload=auto replaced by the first of off, layer_inputs, all that fits the
    GPU.

    gpu_bytes: memory of the GPU; None means a CPU, which gets off. If nothing fits the result is all, or off
    where memory.recompute leaves no choice. Raises as `gpu_memory`.
    """
    if run.memory.offload != "auto":
        return run
    choices = memory_modes(run, ["memory.recompute"])
    if gpu_bytes is None:
        return choices[0]
    return next(
        (c for c in choices if fits(gpu_memory(c, model, world_size, backend), gpu_bytes)), choices[-1]
    )


def data_parallel_split(run: Run, model: Model, world_size: int) -> tuple[int, int]:
    """Return (data parallel size, micro-batches per data parallel rank). Raises UserError if it does not
    divide."""
    check_model_layout(model, run.parallel)
    dp = run.parallel.data_parallel(world_size)
    return dp, run.micro_batches(dp)


def micro_batch_sizes(run: Run) -> tuple[int, int]:
    """Return (tokens of a micro-batch on one context parallel rank, b * s; bytes per element)."""
    return (
        run.train.micro_batch * run.train.seq_length // run.parallel.cp,
        2 if run.train.precision == "bf16" else 4,
    )
