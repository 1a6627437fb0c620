"""Estimated seconds of a training iteration, by part: FLOPs and bytes over assumed fractions of data-sheet
peaks.

The result is for comparing layouts; it is not a measurement. docs/plan.md explains every formula. Letters as
in planning/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_ultralong.config import Model, Run
from megatron_ultralong.planning.documents import DocumentLengths, RowWork
from megatron_ultralong.planning.flops import flops_per_token
from megatron_ultralong.planning.hardware import GPUS_PER_NODE, Machine
from megatron_ultralong.planning.layer_memory import LayerShape
from megatron_ultralong.planning.memory import (
    data_parallel_split,
    micro_batch_sizes,
    offloaded_tensors,
    saved_per_layer,
    trained_parameters,
)

BACKWARD = 2.5
"""Attention FLOPs of the backward over those of the forward: five matrix products against two."""


# ---- communication of attention ----------------------------------------------------------------


class AttentionTraffic(NamedTuple):
    """What attention communicates per rank, layer and micro-batch, in one forward or one backward."""

    exchange: float
    """Bytes of all-to-all."""
    ring: float
    """Bytes of keys and values (in the backward also their gradients) sent in the ring, or gathered and
    scattered."""
    hops: int
    """Messages of the ring or all-gather."""
    merge: float
    """Bytes read and written in GPU memory to merge partial results."""
    intra_node: float = 0.0
    """Bytes of keys, values and their gradients sent inside a node, beside those of `ring`."""


def ring_work(run: Run, documents: DocumentLengths) -> RowWork:
    """Return the work of rows of such documents on the ranks of the ring."""
    p = run.parallel
    return documents.work(run.train.seq_length, p.cp // p.ulysses, p.ring_ranks_per_node(GPUS_PER_NODE))


def ring_passes(run: Run, model: Model) -> int:
    """Return how often keys go round the ring in one pass through attention: once per chunk of queries."""
    x = LayerShape.of(run, model)
    return -(-x.tokens // x.chunk) if run.memory.query_chunks else 1


def attention_traffic(
    run: Run, model: Model, documents: DocumentLengths | None = None
) -> tuple[AttentionTraffic, AttentionTraffic]:
    """Return (forward, backward). documents: as for `attention_span`."""
    x, u = LayerShape.of(run, model), run.parallel.ulysses
    q, kv = x.tokens * x.q, x.tokens * 2 * x.kv_inside  # elements
    forward = backward = 0.0
    if u > 1:
        share, lse = (u - 1) / u * x.e, (u - 1) / u * 4 * x.tokens * x.heads
        forward, backward = share * (2 * q + kv) + lse, share * (4 * q + 2 * kv) + lse
    others = x.ring - 1
    if others and documents is not None and run.data.documents == "masked":
        work, passes = (
            ring_work(run, documents),
            ring_passes(run, model),
        )
        far, inside = work.most_sent_far, work.most_sent - work.most_sent_far
        far, inside, received, copied, returned = (
            passes * kv * x for x in (far, inside, work.received, work.copied, work.sent)
        )
        rounds = round(passes * work.rounds)
        # A message of keys is copied together, and computed with the queries that need them; its gradients go
        # back, and are added.
        return (
            AttentionTraffic(
                forward, far * x.e, rounds, work.merged * q * (x.e + 16) + 2 * copied * x.e, inside * x.e
            ),
            AttentionTraffic(
                backward,
                far * (x.e + 4),
                2 * rounds,
                (work.merged * q + received) * (x.e + 8)
                + 2 * copied * x.e
                + 8 * (copied - returned)
                + 12 * returned,
                inside * (x.e + 4),
            ),
        )
    if run.parallel.cp_comm_type == "all_gather":
        heads = x.kv_inside // model.head_dim // u
        # Queries meet all earlier keys at once; key gradients are those of the whole sequence.
        return (
            AttentionTraffic(
                forward, others * kv * x.e, heads if others else 0, (q * (x.e + 16)) if others else 0.0
            ),
            AttentionTraffic(
                backward,
                others * kv * (x.e + 4),
                2 * heads if others else 0,
                (q * (x.e + 8) + x.ring * kv * (x.e + 8)) if others else 0.0,
            ),
        )
    passes = ring_passes(run, model)
    # Each hop but the first computes all queries with half of the keys, or half of the queries with all keys:
    # three quarters of the rows on average. A partial output is cast to float32 and interpolated with the
    # running sum; a partial gradient is added to the running sum.
    rows, hops = 0.75 * others, passes * x.ring if others else 0
    return (
        AttentionTraffic(forward, passes * others * kv * x.e, hops, rows * q * (x.e + 16)),
        AttentionTraffic(
            backward,
            passes * (others * kv * x.e + (x.ring * kv * 4 if others else 0)),
            hops,
            rows * (q + passes * kv) * (x.e + 8),
        ),
    )


# ---- FLOPs and bytes of a micro-batch ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Workload:
    """FLOPs and bytes of one GPU of one pipeline stage for one micro-batch. Bytes are those sent, or one
    way."""

    attention: float
    """FLOPs of attention in the forward; the backward has 2.5 times as many."""
    products: float
    """FLOPs of the layers' other matrix products in the forward; the backward has twice as many."""
    output: float
    """FLOPs of the output layer, forward and backward; 0 on other stages than the last."""
    recompute_attention: float
    """FLOPs of attention that the backward recomputes."""
    recompute_products: float
    """FLOPs of other matrix products that the backward recomputes."""
    ring_forward: float
    """Bytes of keys and values sent in the context parallel ring, per forward of attention."""
    ring_backward: float
    """Bytes of keys, values and their float32 gradients sent in the backward."""
    merge_forward: float
    """Bytes read and written in GPU memory to merge hops, per forward of attention."""
    merge_backward: float
    hops_forward: int
    """Hops of the ring, per forward of attention."""
    hops_backward: int
    tensor: float
    """Bytes of all-gathers and reduce-scatters over tensor parallel ranks."""
    pipeline: float
    """Bytes of hidden states to the next stage, from each model chunk, and of their gradients back."""
    host: float
    """Bytes copied to host memory; the same number comes back."""
    host_again: float = 0.0
    """Bytes that come back more than once."""
    exchange_forward: float = 0.0
    """Bytes of all-to-all, per forward of attention."""
    exchange_backward: float = 0.0
    intra_node_forward: float = 0.0
    """Bytes of keys and values sent inside a node beside the ring's, per forward of attention."""
    intra_node_backward: float = 0.0


def attention_span(run: Run, documents: DocumentLengths | None = None) -> float:
    """Return the tokens inside which attention stays: the row, or with masked documents the length of equal
    ones with as much attention.

    documents: None means as long as the row.
    """
    s = run.train.seq_length
    masked = documents is not None and run.data.documents == "masked"
    return documents.span(s) if masked and documents is not None else s


def workload(
    run: Run, model: Model, *, last: bool = True, documents: DocumentLengths | None = None
) -> Workload:
    """Return the FLOPs and bytes of a micro-batch on a GPU of the last, or of another, pipeline stage; with
    context parallelism of masked documents, of the rank that has most attention.

    documents: as for `attention_span`.
    """
    p, (tokens, e) = run.parallel, micro_batch_sizes(run)
    layers, s = model.layers // p.pp, attention_span(run, documents)
    ring = p.cp // p.ulysses
    if documents is not None and run.data.documents == "masked" and ring > 1:
        s *= ring_work(run, documents).attention
    # Per token and layer, forward and backward, by the same formula as MFU.
    one, two = (flops_per_token(replace(model, layers=n), 0) for n in (1, 2))
    products, output = two - one, 2 * one - two
    attention = (flops_per_token(model, s) - flops_per_token(model, 0)) / model.layers
    here = tokens / p.tp
    again = {"none": (0, 0), "full": (1, 1), "all_but_attention": (0, 1)}[run.memory.recompute]
    hidden = tokens * model.hidden_size * e
    # All-gathers and reduce-scatters of the hidden states: 4 per layer in the forward, 6 in the backward
    # (inputs are gathered again), 4 in a recompute; 2 in the loss.
    collectives = layers * (10 + 4 * again[1]) + 2 * last
    saved = saved_per_layer(run, model)
    forward, backward = attention_traffic(run, model, documents)
    more, host_again = 0.0, 0.0
    if run.memory.query_chunks:
        # Keys and values are projected first, by the same weight as the queries: once more in the forward,
        # twice more in the recompute; its backward, for queries and for keys and values separately, once
        # more. The layer input is fetched for each of the three passes over it.
        more = layers * 2 * model.hidden_size * model.head_dim * (model.heads + 2 * model.kv_heads) * here
        collectives += 4 * layers
        host_again = 2.0 * layers * saved["layer inputs"] * (run.memory.offload != "off")
    return Workload(
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
        intra_node_forward=layers * forward.intra_node,
        intra_node_backward=layers * backward.intra_node,
        host_again=host_again,
        tensor=collectives * hidden * (p.tp - 1) / p.tp,
        pipeline=2 * p.vpp * hidden / p.tp if p.pp > 1 else 0.0,
        host=float(layers * sum(saved[name] for name in offloaded_tensors(run.memory))),
    )


def gradient_bytes(run: Run, model: Model, dp: int) -> float:
    """Return the bytes a GPU sends per iteration to reduce float32 gradients and to gather weights.

    Both go over data and context parallel ranks together.
    """
    p, e = run.parallel, micro_batch_sizes(run)[1]
    parameters = max(trained_parameters(run, model, stage) for stage in (0, p.pp - 1))
    return parameters * (4 + e) * (dp * p.cp - 1) / (dp * p.cp)


# ---- seconds -----------------------------------------------------------------------------------


def iteration_time(run: Run, model: Model, machine: Machine) -> dict[str, float]:
    """Return the estimated seconds of an iteration, by part. Raises as `memory.gpu_memory`.

    The ring overlaps with attention, and host copies with all computation; nothing else overlaps, as in
    training. 1F1B takes one micro-batch through all stages, and the others at the pace of the slowest stage,
    the last.
    """
    dp, micro_batches = data_parallel_split(run, model, machine.gpus)
    slowest, other = (
        _micro_batch_time(run, workload(run, model, last=last, documents=machine.documents), machine)
        for last in (True, False)
    )
    p = run.parallel
    parts = {name: micro_batches * seconds for name, seconds in slowest.items()}
    parts["pipeline bubble"] = (p.pp - 1) * sum(other.values()) / p.vpp
    # Float32 gradients are reduce-scattered and weights all-gathered over data and context parallel ranks,
    # once per iteration, after the backward.
    parts["DP gradients, weights"] = gradient_bytes(run, model, dp) / machine.link_bandwidth(p.tp * dp * p.cp)
    return parts


def share_of_ideal(run: Run, model: Model, machine: Machine, imbalance: float | None = None) -> float:
    """Return the seconds of attention whose work is the same on all ranks, with nothing to send, over those
    that are estimated.

    imbalance: work of the largest rank over the mean where the row is cut without regard to its documents
    (`machine.documents`), and its keys make the round of all ranks; None = they are placed.
    """
    documents = machine.documents
    assert documents is not None
    todo = workload(run, model, documents=documents)
    ring = run.parallel.cp // run.parallel.ulysses
    placed = ring_work(run, documents).attention if ring > 1 else 1.0
    ideal = replace(todo, attention=todo.attention / placed)
    if imbalance is not None:
        todo = replace(workload(run, model), attention=ideal.attention * imbalance)
    taken = _micro_batch_time(run, todo, machine)
    parts = ("attention", "CP ring, merges and hops", "CP ring, not overlapped", "CP all-to-all")
    seconds = sum(taken.get(name, 0.0) for name in parts)
    return _micro_batch_time(run, ideal, machine)["attention"] / seconds


def _micro_batch_time(run: Run, todo: Workload, machine: Machine) -> dict[str, float]:
    """Seconds of one micro-batch on one pipeline stage, by part."""
    p, gpu, assumed = run.parallel, machine.gpu, machine.assumed
    peak = gpu.bf16 if run.train.precision == "bf16" else gpu.fp32
    forward, backward, products = (
        share * peak for share in (assumed.attention_forward, assumed.attention_backward, assumed.products)
    )
    ring = machine.link_bandwidth(p.tp * p.cp)
    attention_forward, attention_backward = todo.attention / forward, BACKWARD * todo.attention / backward
    recompute = todo.recompute_attention / forward + todo.recompute_products / products
    # One ring pass for each forward of attention, and one for the backward.
    forwards = 2 if todo.recompute_attention else 1
    nvlink = machine.link_bandwidth(1)
    rings = [(todo.ring_forward / ring + todo.intra_node_forward / nvlink, attention_forward)] * forwards
    rings.append((todo.ring_backward / ring + todo.intra_node_backward / nvlink, attention_backward))
    merges = (forwards * todo.merge_forward + todo.merge_backward) / (gpu.hbm * assumed.links)
    hops = (forwards * todo.hops_forward + todo.hops_backward) * assumed.hop_microseconds * 1e-6
    out, back = (size / (gpu.pcie * assumed.links) for size in (todo.host, todo.host + todo.host_again))
    weight_gradients = 0 if run.lora.rank else 1
    compute_forward = attention_forward + todo.products / products + todo.output / products
    compute_backward = attention_backward + (1 + weight_gradients) * todo.products / products + recompute
    parts = {
        "attention": attention_forward + attention_backward,
        "other matrix products": (2 + weight_gradients) * (todo.products + todo.output / 3) / products,
        "recompute": recompute,
        "CP ring, merges and hops": merges + hops,
        "CP ring, not overlapped": sum(max(0.0, seconds - hidden_by) for seconds, hidden_by in rings),
    }
    if p.ulysses > 1:
        exchanged = forwards * todo.exchange_forward + todo.exchange_backward
        parts["CP all-to-all"] = exchanged / machine.link_bandwidth(p.tp * p.ulysses)
    return parts | {
        "TP collectives": todo.tensor / machine.link_bandwidth(p.tp),
        "pipeline transfers": todo.pipeline / machine.link_bandwidth(machine.gpus),
        "host copies, not overlapped": max(0.0, out - compute_forward) + max(0.0, back - compute_backward),
    }
