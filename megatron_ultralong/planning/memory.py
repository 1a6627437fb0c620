"""Memory and time of a run before it is launched, part by part, from formulas; and the layouts and memory
modes there are to choose from.

Memory is plain sums of what the run's tensors must hold; the allocator's fragmentation and NCCL's buffers
come on top, for which a tenth of the GPU stays free. Time is FLOPs and bytes over data-sheet peaks times
assumed shares of them (hardware.py): an estimate to compare layouts by, not a measurement. docs/plan.md
explains every formula.

Letters: S tokens a sequence, s = S/CP, b micro-batch, H hidden size, F MLP width, V vocabulary padded to TP,
h query heads, g KV heads, d head dimension, e bytes of a bf16 or float32 element.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from megatron_ultralong.config import (
    LOSS_BLOCK,
    OFFLOADED_LAYERS_ON_GPU,
    Memory,
    Model,
    Run,
    check_model_layout,
    divides_heads,
)
from megatron_ultralong.errors import UserError
from megatron_ultralong.model.weight_mapping import padded_vocab_size
from megatron_ultralong.planning import layer_memory
from megatron_ultralong.planning.flops import flops_per_token
from megatron_ultralong.planning.hardware import GPUS_PER_NODE, Machine

BACKWARD = 2.5
"""Attention FLOPs of the backward over the forward's: five products of scores, keys and values against two."""

MODES = (
    Memory(recompute="none", offload="off"),
    Memory(recompute="full", offload="off"),
    Memory(recompute="all_but_attention", offload="off"),
    Memory(recompute="all_but_attention", offload="layer_inputs"),
    Memory(recompute="all_but_attention", offload="all"),
)
"""What can be kept for the backward, and where; of one checkpoint, each keeps less on the GPU than the one
before."""


# ---- memory ------------------------------------------------------------------------------------


def memory(run: Run, model: Model, world_size: int) -> dict[str, int]:
    """Bytes by part on a GPU of the fullest pipeline stage, of `run` with `model`'s shape on `world_size`
    ranks.

    `memory.offload` is settled, here and below. Raises UserError where model, batch or ranks cannot be split
    as `run.parallel` says.
    """
    dp, micro_batches = _split(run, model, world_size)
    stages = [_stage(run, model, dp, micro_batches, stage) for stage in sorted({0, run.parallel.pp - 1})]
    return max(stages, key=total)


def host_memory(run: Run, model: Model, world_size: int) -> dict[str, int]:
    """Bytes of pinned host memory by part that one GPU of the fullest pipeline stage, the first, fills.
    Raises as `memory`."""
    dp, micro_batches = _split(run, model, world_size)
    layers = _layers_alive(run, model, micro_batches, 0)
    return {name: layers * size for name, size in _kept(run, model).items() if name in _offloaded(run.memory)}


def total(parts: dict[str, int]) -> int:
    """Bytes of all parts together."""
    return sum(parts.values())


def fits(parts: dict[str, int], gpu_bytes: int, share: float = 0.9) -> bool:
    """Whether `parts` fit a GPU of `gpu_bytes`, a tenth of it left for fragmentation and communication
    buffers."""
    return total(parts) <= share * gpu_bytes


def stage_parameters(model: Model, tp: int, pp: int, stage: int) -> int:
    """Parameters on one rank of pipeline stage `stage` (0 is the first)."""
    h, f, v = model.hidden_size, model.ffn_size, padded_vocab_size(model.vocab_size, tp)
    attention = h * model.head_dim * (model.heads + 2 * model.kv_heads) + model.heads * model.head_dim * h
    count = model.layers // pp * ((attention + 3 * h * f) // tp + 2 * h)
    first, last = stage == 0, stage == pp - 1
    # A tied embedding lies on the first and the last stage: once where those are one.
    embeddings = first + last - (1 if first and last and model.tied_embeddings else 0)
    return count + embeddings * v * h // tp + (h if last else 0)


def _split(run: Run, model: Model, world_size: int) -> tuple[int, int]:
    """(data parallel size, micro-batches of each), or UserError."""
    check_model_layout(model, run.parallel)
    dp = run.parallel.data_parallel(world_size)
    return dp, run.micro_batches(dp)


def _sizes(run: Run) -> tuple[int, int]:
    """(tokens of a micro-batch on a context parallel rank, b * s; bytes of an element)."""
    return (
        run.train.micro_batch * run.train.seq_length // run.parallel.cp,
        2 if run.train.precision == "bf16" else 4,
    )


def _stage(run: Run, model: Model, dp: int, micro_batches: int, stage: int) -> dict[str, int]:
    p, (tokens, e) = run.parallel, _sizes(run)
    parameters = stage_parameters(model, p.tp, p.pp, stage)
    parts = {
        "weights": parameters * e,
        "gradients (fp32)": parameters * 4,
        # AdamW's two moments, and in bf16 runs the fp32 master weights, spread over data and context parallel
        # ranks.
        "optimizer (fp32)": parameters * (12 if e == 2 else 8) // (dp * p.cp),
        "layer checkpoints": 0,
        "one layer at work": layer_memory.at_work(run, model),
        "RoPE tables": tokens
        // run.train.micro_batch
        * model.head_dim
        * 4,  # cos and sin, float32 [s, d/2] each
    }
    alive = _layers_alive(run, model, micro_batches, stage)
    for name, size in _kept(run, model).items():
        if name in _offloaded(
            run.memory
        ):  # with query chunks no more than chunks, which the layer at work holds
            parts["layer checkpoints"] += (
                0 if run.memory.query_chunks else size * min(alive, OFFLOADED_LAYERS_ON_GPU)
            )
        else:  # without checkpoints the layer at work holds its own
            parts["layer checkpoints"] += size * (alive - 1 if run.memory.recompute == "none" else alive)
    if stage == p.pp - 1:
        rows = padded_vocab_size(model.vocab_size, p.tp) // p.tp
        chunk = min(run.memory.loss_chunk or tokens, tokens)
        # Logits in e, whose place their gradient takes, two float32 forms of a block of them; the output
        # weight's gradient in float32 and its share of a chunk in e; the hidden states and their gradient.
        parts["loss"] = (
            chunk * rows * e
            + 8 * min(LOSS_BLOCK, chunk * rows)
            + rows * model.hidden_size * (4 + e)
            + 2 * (tokens // p.tp) * model.hidden_size * e
        )
        parts["layer and loss take turns"] = -min(parts["one layer at work"], parts["loss"])
    return parts


def _kept(run: Run, model: Model) -> dict[str, int]:
    """Bytes kept for the backward of one layer and micro-batch, by part."""
    tp, (tokens, e) = run.parallel.tp, _sizes(run)
    h, q, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    kept = {"layer inputs": h * e}
    if run.memory.recompute == "all_but_attention":
        kept["attention outputs"] = q * e + model.heads * 4  # and logsumexps, float32
    if run.memory.recompute == "none":
        # Out of both norms, and the second norm's input; q and k rotated, the projection they came out of,
        # which v is a view of, the output and its logsumexp; the MLP's gate and up, silu of the gate, a copy
        # of up, their product.
        kept["activations"] = (
            3 * h * e + (q + kv + q + 2 * kv + q) * e + model.heads * 4 + 5 * model.ffn_size * e
        )
    return {name: size * tokens // tp for name, size in kept.items()}


def _offloaded(memory: Memory) -> tuple[str, ...]:
    """Parts of what is kept that go to host memory."""
    assert memory.offload != "auto", "settle_offload comes first"
    return {"off": (), "layer_inputs": ("layer inputs",), "all": ("layer inputs", "attention outputs")}[
        memory.offload
    ]


def _layers_alive(run: Run, model: Model, micro_batches: int, stage: int) -> int:
    """Layers times micro-batches whose forward is done and whose backward is still to come, at most."""
    p = run.parallel
    return model.layers // (p.pp * p.vpp) * _micro_batches_in_flight(p.pp, p.vpp, micro_batches, stage)


def _micro_batches_in_flight(pp: int, vpp: int, micro_batches: int, stage: int) -> int:
    """Forward passes (of a model chunk) whose backward is still to come, at most, in 1F1B and interleaved
    1F1B."""
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp)


# ---- time --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one GPU of the slowest pipeline stage, the last, does for one micro-batch. FLOPs and bytes (sent,
    or one way)."""

    attention: float
    """FLOPs of attention going forward; the backward's are 2.5 times as many."""
    products: float
    """FLOPs of the layers' other matrix products going forward; the backward's are twice as many."""
    output: float
    """FLOPs of the output layer, forward and backward; 0 on other stages."""
    recompute_attention: float
    """FLOPs of attention done again in the backward."""
    recompute_products: float
    ring_forward: float
    """Bytes of keys and values sent round the context parallel ring, each time that attention goes forward."""
    ring_backward: float
    """Bytes of keys, values and their float32 gradients."""
    merge_forward: float
    """Bytes read and written in the GPU's memory to merge hops, each time that attention goes forward."""
    merge_backward: float
    hops_forward: int
    """Of the ring, each time that attention goes forward."""
    hops_backward: int
    tensor: float
    """Bytes of all-gathers and reduce-scatters over tensor parallel ranks."""
    pipeline: float
    """Bytes of hidden states to the next stage, from each model chunk, and of their gradient back."""
    host: float
    """Bytes to host memory; as many come back."""
    host_again: float = 0.0
    """Bytes that come back once more."""
    exchange_forward: float = 0.0
    """Bytes of all-to-all, each time that attention goes forward."""
    exchange_backward: float = 0.0


def attended(run: Run, document_length: int | None = None) -> int:
    """Tokens of the stretch inside which attention stays: the row, or where documents are masked their mean
    length (default: the row)."""
    s = run.train.seq_length
    return min(document_length or s, s) if run.data.documents == "masked" else s


def work(run: Run, model: Model, *, last: bool = True, document_length: int | None = None) -> Work:
    """FLOPs and bytes of a micro-batch on a GPU of the last (else of another) pipeline stage; document_length
    as of `attended`."""
    p, (tokens, e) = run.parallel, _sizes(run)
    layers, s = model.layers // p.pp, attended(run, document_length)
    # Per token and layer, forward and backward, by the formula that MFU is counted by.
    one, two = (flops_per_token(replace(model, layers=n), 0) for n in (1, 2))
    products, output = two - one, 2 * one - two
    attention = (flops_per_token(model, s) - flops_per_token(model, 0)) / model.layers
    here = tokens / p.tp
    again = {"none": (0, 0), "full": (1, 1), "all_but_attention": (0, 1)}[run.memory.recompute]
    hidden = tokens * model.hidden_size * e
    # All-gather or reduce-scatter of the hidden states: 4 a layer forward, 6 backward (inputs are gathered
    # again), 4 in a recompute; 2 at the loss.
    collectives = layers * (10 + 4 * again[1]) + 2 * last
    kept = _kept(run, model)
    forward, backward = layer_memory.sent(run, model)
    more, host_again = 0.0, 0.0
    if run.memory.query_chunks:
        # Keys and values first, by the same projection as the queries: once more forward, twice more
        # recomputed; its backward, of queries and of keys and values apart, once more. The input comes back
        # for each of the three passes over it.
        more = layers * 2 * model.hidden_size * model.head_dim * (model.heads + 2 * model.kv_heads) * here
        collectives += 4 * layers
        host_again = 2.0 * layers * kept["layer inputs"] * (run.memory.offload != "off")
    return Work(
        attention=layers * attention / 3 * here,
        products=layers * products / 3 * here,
        output=last * output * here,
        recompute_attention=again[0] * layers * attention / 3 * here,
        recompute_products=again[1] * layers * products / 3 * here + 5 * more,
        ring_forward=layers * forward.ring,
        ring_backward=layers * backward.ring,
        merge_forward=layers * forward.merge,
        merge_backward=layers * backward.merge,
        hops_forward=layers * forward.hops,
        hops_backward=layers * backward.hops,
        exchange_forward=layers * forward.exchange,
        exchange_backward=layers * backward.exchange,
        host_again=host_again,
        tensor=collectives * hidden * (p.tp - 1) / p.tp,
        pipeline=2 * p.vpp * hidden / p.tp if p.pp > 1 else 0.0,
        host=float(layers * sum(kept[name] for name in _offloaded(run.memory))),
    )


def time(run: Run, model: Model, machine: Machine) -> dict[str, float]:
    """Seconds of an iteration by part, estimated. Raises as `memory`.

    The ring hides behind attention and host copies behind all computation, up to its length; nothing else
    overlaps, as in training. 1F1B takes one micro-batch through all stages and the others at the slowest
    stage's pace.
    """
    dp, micro_batches = _split(run, model, machine.gpus)
    slowest, other = (
        _stage_time(run, work(run, model, last=last, document_length=machine.document_length), machine)
        for last in (True, False)
    )
    p, e = run.parallel, _sizes(run)[1]
    parts = {name: micro_batches * seconds for name, seconds in slowest.items()}
    parts["pipeline bubble"] = (p.pp - 1) * sum(other.values()) / p.vpp
    # Float32 gradients are scattered and weights gathered over data and context parallel ranks, once an
    # iteration, after the backward.
    ranks = dp * p.cp
    parts["DP gradients, weights"] = gradient_bytes(run, model, dp, e) / machine.link(p.tp * ranks)
    return parts


def gradient_bytes(run: Run, model: Model, dp: int, e: int) -> float:
    """Bytes a GPU sends an iteration to sum float32 gradients and to gather weights over data and context
    parallel ranks."""
    p = run.parallel
    parameters = max(stage_parameters(model, p.tp, p.pp, stage) for stage in (0, p.pp - 1))
    return parameters * (4 + e) * (dp * p.cp - 1) / (dp * p.cp)


def _stage_time(run: Run, todo: Work, machine: Machine) -> dict[str, float]:
    """Seconds of one micro-batch on one pipeline stage, by part."""
    p, gpu, assumed = run.parallel, machine.gpu, machine.assumed
    peak = gpu.bf16 if run.train.precision == "bf16" else gpu.fp32
    forward, backward, products = (
        share * peak for share in (assumed.attention_forward, assumed.attention_backward, assumed.products)
    )
    ring = machine.link(p.tp * p.cp)
    attention_forward, attention_backward = todo.attention / forward, BACKWARD * todo.attention / backward
    recompute = todo.recompute_attention / forward + todo.recompute_products / products
    # A forward ring for each time that attention goes forward, and the backward's.
    times = 2 if todo.recompute_attention else 1
    rings = [(todo.ring_forward, attention_forward)] * times + [(todo.ring_backward, attention_backward)]
    merges = (times * todo.merge_forward + todo.merge_backward) / (gpu.hbm * assumed.links)
    hops = (times * todo.hops_forward + todo.hops_backward) * assumed.hop_microseconds * 1e-6
    out, back = (size / (gpu.pcie * assumed.links) for size in (todo.host, todo.host + todo.host_again))
    compute_forward = attention_forward + todo.products / products + todo.output / products
    compute_backward = attention_backward + 2 * todo.products / products + recompute
    return {
        "attention": attention_forward + attention_backward,
        "other matrix products": (3 * todo.products + todo.output) / products,
        "recompute": recompute,
        "CP ring, merges and hops": merges + hops,
        "CP ring, not hidden": sum(max(0.0, sent / ring - hidden_by) for sent, hidden_by in rings),
        **(
            {
                "CP all-to-all": (times * todo.exchange_forward + todo.exchange_backward)
                / machine.link(p.tp * p.ulysses)
            }
            if p.ulysses > 1
            else {}
        ),
        "TP collectives": todo.tensor / machine.link(p.tp),
        "pipeline transfers": todo.pipeline / machine.link(machine.gpus),
        "host copies, not hidden": max(0.0, out - compute_forward) + max(0.0, back - compute_backward),
    }


# ---- layouts and memory modes ------------------------------------------------------------------

LARGEST_TP = 8

SEARCHED = (
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.dp",
    "memory.recompute",
    "memory.offload",
    "parallel.ulysses",
    "parallel.cp_comm_type",
    "memory.query_chunks",
)
"""Settings that a search varies, or settles where they are not given."""


def layouts(run: Run, model: Model, gpus: int, fixed: Collection[str] = ()) -> Iterator[Run]:
    """`run` under every layout of `gpus` GPUs that model, sequence and batch divide by; the settings in
    `fixed` as the run has them.

    TP up to 8, so that it stays in a node; DP is what TP, PP and CP leave. Interleaving (vpp) stays as the
    run has it where PP > 1.
    """
    old = run.parallel

    def sizes(name: str, largest: int) -> list[int]:
        return (
            [getattr(old, name)]
            if f"parallel.{name}" in fixed
            else [n for n in range(1, largest + 1) if gpus % n == 0]
        )

    for tp, pp in itertools.product(sizes("tp", LARGEST_TP), sizes("pp", min(gpus, model.layers))):
        for cp in sizes("cp", gpus // (tp * pp)):
            try:  # ulysses and cp_comm_type stay, where they can
                parallel = replace(
                    old,
                    tp=tp,
                    pp=pp,
                    cp=cp,
                    vpp=old.vpp if pp > 1 else 1,
                    dp=old.dp if "parallel.dp" in fixed else None,
                )
                candidate = replace(run, parallel=parallel)
                _split(candidate, model, gpus)
            except UserError:
                continue
            yield candidate


def ways(run: Run, model: Model, fixed: Collection[str] = ()) -> list[Run]:
    """`run`, and with as many ranks exchanging heads as divide CP, the heads of a rank, and with TP a node of
    eight; or `run` alone, where parallel.ulysses is in `fixed`, it has such groups or query chunks already,
    or gathers."""
    p = run.parallel
    if "parallel.ulysses" in fixed or p.ulysses > 1 or p.cp_comm_type != "p2p" or run.memory.query_chunks:
        return [run]
    sizes = [
        u
        for u in range(1, p.cp + 1)
        if p.cp % u == 0
        and (u == 1 or (GPUS_PER_NODE % (p.tp * u) == 0))
        and divides_heads(model.heads // p.tp, model.kv_heads // p.tp, u)
    ]
    return [replace(run, parallel=replace(p, ulysses=u)) for u in sizes]


def in_query_chunks(run: Run, fixed: Collection[str] = ()) -> Run | None:
    """`run` with memory.query_chunks, for where nothing else fits; None where the settings in `fixed` rule it
    out."""
    m, p = run.memory, run.parallel
    if (
        "memory.query_chunks" in fixed
        or m.query_chunks
        or p.ulysses > 1
        or p.cp_comm_type != "p2p"
        or ("memory.recompute" in fixed and m.recompute != "all_but_attention")
    ):
        return None
    return replace(run, memory=replace(m, recompute="all_but_attention", query_chunks=True))


def modes(run: Run, fixed: Collection[str] = ()) -> list[Run]:
    """`run` in each of `MODES`; the settings in `fixed` as the run has them, but memory.offload=auto is no
    choice of one."""
    old = run.memory
    return [
        replace(run, memory=replace(old, recompute=mode.recompute, offload=mode.offload))
        for mode in MODES
        if (mode.recompute == "all_but_attention" or not old.query_chunks)
        and ("memory.recompute" not in fixed or mode.recompute == old.recompute)
        and ("memory.offload" not in fixed or old.offload in ("auto", mode.offload))
    ]


def settle_offload(run: Run, model: Model, world_size: int, gpu_bytes: int | None) -> Run:
    """`run` with memory.offload=auto settled: the first of off, layer_inputs, all that fits a GPU of
    `gpu_bytes`; all where none does; off on a CPU (None), or where memory.recompute leaves no choice.
    Raises as `memory`."""
    if run.memory.offload != "auto":
        return run
    choices = modes(run, ["memory.recompute"])
    if gpu_bytes is None:
        return choices[0]
    return next(
        (choice for choice in choices if fits(memory(choice, model, world_size), gpu_bytes)), choices[-1]
    )
