"""Planning: estimates against figures worked out by hand, layouts as literal lists, what fits and why not,
and refusals."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong import recipes
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Data, Memory, Model, Parallel, Run, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.lora import Lora
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.planning import layouts, memory, report, search, time, whole_run
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.flops import flops_per_token
from megatron_ultralong.planning.hardware import GPUS, Assumptions, Gpu, Machine
from megatron_ultralong.shapes import LLAMA_3_1_8B, SHAPES, SMOLLM2_135M

TOOL = Path(__file__).parents[2] / "tools" / "plan.py"
SMALL = Model(hidden_size=8, ffn_size=16, layers=4, heads=4, kv_heads=2, head_dim=2, vocab_size=10)
# TP 2 x CP 2: 32 tokens per rank, two micro-batches.
RUN = Run(
    name="x",
    parallel=Parallel(tp=2, cp=2),
    memory=Memory(recompute="full", offload="off"),
    train=Train(seq_length=64, global_batch=2, iterations=1, lr=1.0),
)
IDEAL = Assumptions(
    attention_forward=1.0,
    attention_backward=1.0,
    products=1.0,
    links=1.0,
    gpu_memory=1.0,
    host_memory=1.0,
    hop_microseconds=0.0,
)
SLOW = Gpu(
    name="slow", memory=10**5, bf16=1000.0, fp32=500.0, hbm=1000.0, nvlink=100.0, infiniband=10.0, pcie=50.0
)


def with_memory(run: Run, recompute: Any, offload: Any = "off", **more: Any) -> Run:
    """Return `run` with these memory settings."""
    return replace(run, memory=Memory(recompute=recompute, offload=offload, **more))


def make_report(**arguments: Any) -> report.PlanReport:
    """Return the report for these arguments of tools/plan.py."""
    return report.report(report.PlanRequest(**arguments))


# ---- memory ------------------------------------------------------------------------------------


def test_memory_by_hand():
    # A rank: 4 layers of (192 + 384) / 2 weights and two norms of 8, two embeddings of 5 x 8, the last norm.
    parameters = 4 * (288 + 16) + 2 * 40 + 8
    assert memory.gpu_memory(RUN, SMALL, 4) == {
        "weights": parameters * 2,
        "gradients (fp32)": parameters * 4,
        "optimizer (fp32)": parameters * 12 // 2,
        "saved activations": 4 * 256,  # 32 tokens x 8 x 2 bytes / TP
        # Per token: attention, the layer's output and its gradient, gathered over TP, the gradients of the
        # attention output and before it; in its backward the gradients of a block in bf16 and in float32, two
        # buffers of keys and values, a second one of their gradients, the kernel's gradient of the queries.
        "working layer": 32 * (52 + 16 + 32 + 16) + 32 * (16 + 32 + 16 + 16 + 16),
        "RoPE tables": 32 * 2 * 4,
        "loss": 32 * 5 * (2 + 4) + 5 * 8 * (2 + 4) + 2 * 16 * 8 * 2,
        "shared by layer and loss": -(32 * 5 * (2 + 4) + 5 * 8 * (2 + 4) + 2 * 16 * 8 * 2),
    }
    fp32 = replace(RUN, train=replace(RUN.train, precision="fp32"))
    assert memory.gpu_memory(fp32, SMALL, 4)["optimizer (fp32)"] == parameters * 8 // 2
    assert memory.gpu_memory(fp32, SMALL, 4)["saved activations"] == 4 * 512


@pytest.mark.parametrize(
    ("mode", "on_gpu", "on_host"),
    [
        (("none",), 3 * (256 + 3712), {}),  # all layers but the one at work
        (("full",), 4 * 256, {}),
        (
            ("all_but_attention",),
            4 * (256 + 512),
            {},
        ),  # the output 32 x 8 x 2 / TP, logsumexps 32 x 4 x 4 / TP
        (("all_but_attention", "layer_inputs"), 2 * 256 + 4 * 512, {"layer inputs": 4 * 256}),
        (
            ("all_but_attention", "all"),
            2 * (256 + 512),
            {"layer inputs": 4 * 256, "attention outputs": 4 * 512},
        ),
    ],
)
def test_saved_activations_by_hand(mode, on_gpu, on_host):
    assert memory.gpu_memory(with_memory(RUN, *mode), SMALL, 4)["saved activations"] == on_gpu
    assert memory.host_memory(with_memory(RUN, *mode), SMALL, 4) == on_host


def test_published_sizes_of_llama():
    """Per token and layer: 2 H bytes of input; 2 H + 2 h d + 4 h with the attention output and logsumexps;
    MLP 5 F e in chunks."""
    run = replace(recipes.get("ultralong_1m"), parallel=Parallel())
    tokens = 1024**2
    parts = {
        mode: memory.stage_memory(with_memory(run, mode), LLAMA_3_1_8B, 1, 8, 0)
        for mode in ("full", "all_but_attention")
    }
    assert parts["full"]["saved activations"] == 32 * tokens * 2 * 4096
    assert parts["all_but_attention"]["saved activations"] == 32 * tokens * (2 * 4096 + 2 * 32 * 128 + 4 * 32)
    # All at once, through autograd: 3 (q + k) and a norm's output 38 KiB, logsumexps, two norms' and 5 F 156,
    # the layer's output and its gradient 16.
    assert parts["full"]["working layer"] == tokens * ((38 + 156 + 16) * 1024 + 4 * 32)
    # The gradient, that of the attention output, q, k, v and their gradients, in kernels a float32 gradient
    # of q; a layer's weight gradients twice.
    weights = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    assert parts["all_but_attention"]["working layer"] == tokens * (8 + 8 + 12 + 12 + 16) * 1024 + weights * 6
    # FlashAttention-2: gradients of keys and values for every query head; a deterministic backward also sums
    # them in float32; documents are padded, or, one by one, a fifth of the gradients is held twice.
    flash = with_memory(run, "all_but_attention")
    deterministic = replace(flash, train=replace(flash.train, deterministic=True))
    for changed, more in (
        (flash, 16),
        (deterministic, 16 + 8),
        (replace(flash, data=Data(documents="masked")), 16 + 2),
        (replace(deterministic, data=Data(documents="masked")), 16 + 8 + 12 / 5),
    ):
        planned = memory.stage_memory(changed, LLAMA_3_1_8B, 1, 8, 0, "flash")["working layer"]
        assert planned == parts["all_but_attention"]["working layer"] + int(tokens * more * 1024)
        if changed is not flash:  # cuDNN is not used for these
            assert planned == memory.stage_memory(changed, LLAMA_3_1_8B, 1, 8, 0)["working layer"]
    # FlashAttention-3: the logsumexp and a sum per query and head, gradients of KV heads in float32;
    # documents are padded, and count blocks of 64 queries.
    for changed, more in (
        (flash, tokens * (8 * 1024 + 256)),
        (
            replace(flash, data=Data(documents="masked")),
            tokens * (8 * 1024 + 256) + tokens * (16 + 8 + 0.25) * 128 + tokens // 64 * 1024 * 32 * 4,
        ),
    ):
        asked = replace(changed, runtime=replace(changed.runtime, attention_backend="flash3"))
        for planned in (
            memory.stage_memory(changed, LLAMA_3_1_8B, 1, 8, 0, "flash3"),  # on a GPU where it is chosen
            memory.stage_memory(asked, LLAMA_3_1_8B, 1, 8, 0),
        ):
            assert planned["working layer"] == parts["all_but_attention"]["working layer"] + more
    # Where the MLP is most: 5 F and 6 H in bf16.
    whole = memory.stage_memory(with_memory(run, "all_but_attention", layer_chunk=0), LLAMA_3_1_8B, 1, 8, 0)
    assert whole["working layer"] == tokens * (8 + 8 + 5 * 28 + 6 * 8) * 1024 + weights * 2
    # In query chunks: keys, values and their float32 gradients, one gradient; of a chunk the MLP, its input
    # twice and attention's output.
    chunked = memory.stage_memory(
        with_memory(run, "all_but_attention", "all", query_chunks=True), LLAMA_3_1_8B, 1, 8, 0
    )
    assert (
        chunked["working layer"]
        == tokens * (4 + 8 + 8) * 1024 + 16384 * (5 * 28 + 6 * 8 + 3 * 8) * 1024 + weights * 6
    )
    assert chunked["saved activations"] == 0


def test_pipelines_save_micro_batches_in_flight():
    run = replace(RUN, parallel=Parallel(pp=2, cp=2), train=replace(RUN.train, global_batch=8))
    offloaded = with_memory(run, "all_but_attention", "all")
    # The first stage: two layers, two micro-batches in flight; all but two are in host memory.
    assert memory.host_memory(offloaded, SMALL, 4) == {
        "layer inputs": 2 * 2 * 512,
        "attention outputs": 2 * 2 * 1024,
    }
    assert memory.stage_memory(offloaded, SMALL, 1, 8, 0)["saved activations"] == 2 * (512 + 1024)
    assert memory.stage_memory(run, SMALL, 1, 8, 0)["saved activations"] == 4 * 512
    assert memory.stage_memory(run, SMALL, 1, 8, 1)["saved activations"] == 2 * 512


@pytest.mark.parametrize("model", [SMALL, LLAMA_3_1_8B, SMOLLM2_135M], ids=["small", "llama", "smollm2"])
def test_parameters_equal_the_weight_table(model):
    for tp in [
        tp
        for tp in (1, 2, 3, 8)
        if model.heads % tp == 0 and model.kv_heads % tp == 0 and model.ffn_size % tp == 0
    ]:

        def size(name, tp=tp):
            rows, *columns = weight_mapping.shard_shape(name, model, tp)
            return rows * (columns[0] if columns else 1)

        assert memory.stage_parameters(model, tp, 1, 0) == sum(
            size(name) for name in weight_mapping.megatron_names(model)
        )


def test_adapters_by_hand():
    """Of a layer of SMALL at TP 2 with rank 3: A and B of q_proj and down_proj."""
    lora = Lora(rank=3, targets=("q_proj", "down_proj"))
    run = replace(RUN, lora=lora)
    h, q, f = SMALL.hidden_size, SMALL.heads * SMALL.head_dim, SMALL.ffn_size
    assert RUN.parallel.tp == 2
    layer = 3 * h + q // 2 * 3 + 3 * f // 2 + h * 3
    assert memory.trained_parameters(run, SMALL, 0) == SMALL.layers * layer
    whole = memory.stage_memory(RUN, SMALL, 1, 1, 0)
    parts = memory.stage_memory(run, SMALL, 1, 1, 0)
    e = 4 if RUN.train.precision == "fp32" else 2
    assert parts["weights"] == whole["weights"] + SMALL.layers * layer * e
    assert parts["gradients (fp32)"] == SMALL.layers * layer * 4
    assert parts["saved activations"] == whole["saved activations"]
    norms = replace(run, lora=replace(lora, train_norms=True, train_embeddings=True))
    more = memory.trained_parameters(norms, SMALL, 0) - SMALL.layers * layer
    assert more == SMALL.layers * 2 * h + h + SMALL.vocab_size * h // 2
    assert flops_per_token(SMALL, 0, frozen=True) == flops_per_token(SMALL, 0) * 4 / 6


# ---- time --------------------------------------------------------------------------------------


def test_workload_by_hand():
    full = time.workload(RUN, SMALL)
    assert full == time.Workload(
        attention=4
        * 16
        * 1024,  # 16 = 32 tokens / TP; 2 x 4 heads x 2 dims x 64 tokens, the lower triangle of two products
        products=4 * 16 * 2 * 576,
        output=16 * 6 * 80,
        recompute_attention=4 * 16 * 1024,
        recompute_products=4 * 16 * 2 * 576,
        ring_forward=4 * 128 * 2,  # k and v of 32 tokens, 1 head, 2 dims: one hop
        ring_backward=4 * (128 * 2 + 2 * 128 * 4),
        merge_forward=4 * 0.75 * 128 * 18,
        merge_backward=4 * 0.75 * 256 * 10,
        hops_forward=8,
        hops_backward=8,
        tensor=(4 * 14 + 2) * 512 / 2,
        pipeline=0.0,
        host=0.0,
    )
    away = time.workload(with_memory(RUN, "all_but_attention", "all"), SMALL)
    assert (away.recompute_attention, away.recompute_products, away.host) == (
        0,
        full.recompute_products,
        4 * (256 + 512),
    )
    none = time.workload(with_memory(RUN, "none"), SMALL)
    assert (none.recompute_products, none.tensor) == (0, (4 * 10 + 2) * 512 / 2)
    alone = time.workload(replace(RUN, parallel=Parallel()), SMALL)
    assert (
        alone.ring_forward,
        alone.ring_backward,
        alone.merge_backward,
        alone.hops_forward,
        alone.tensor,
    ) == (0, 0, 0, 0, 0)
    assert time.workload(replace(RUN, parallel=Parallel(pp=2)), SMALL).pipeline == 2 * 64 * 8 * 2
    assert time.workload(replace(RUN, parallel=Parallel(pp=2, vpp=2)), SMALL).pipeline == 2 * 2 * 64 * 8 * 2


def test_workload_of_each_method_by_hand():
    """Per rank and layer, by the table of docs/context_parallel.md; attention and products are those of the
    ring."""
    wide = replace(SMALL, heads=8, kv_heads=4)
    base = replace(
        with_memory(RUN, "all_but_attention"),
        parallel=Parallel(cp=4),
        train=replace(RUN.train, seq_length=128),
    )
    ring = time.workload(base, wide)
    kv, q = 2 * 32 * 4 * 2, 32 * 8 * 2  # elements of 32 tokens
    assert (ring.ring_forward, ring.ring_backward, ring.hops_forward) == (
        4 * 3 * kv * 2,
        4 * (3 * kv * 2 + 4 * kv * 4),
        16,
    )
    gather = time.workload(replace(base, parallel=Parallel(cp=4, cp_comm_type="all_gather")), wide)
    assert (gather.ring_forward, gather.ring_backward) == (4 * 3 * kv * 2, 4 * (3 * kv * 2 + 3 * kv * 4))
    assert (gather.hops_forward, gather.hops_backward) == (4 * 4, 4 * 8), "one message per KV head"
    all_to_all = time.workload(replace(base, parallel=Parallel(cp=4, ulysses=4)), wide)
    # (U - 1) s (d e (2 h/U + 2 n) + 4 h/U) and (U - 1) s (d e (4 h/U + 4 n) + 4 h/U), n = 1
    assert (all_to_all.exchange_forward, all_to_all.exchange_backward) == (
        4 * 3 * 32 * (4 * (4 + 2) + 8),
        4 * 3 * 32 * (4 * (8 + 4) + 8),
    )
    assert (all_to_all.ring_forward, all_to_all.hops_backward, all_to_all.merge_backward) == (0, 0, 0)
    both = time.workload(replace(base, parallel=Parallel(cp=4, ulysses=2)), wide)
    assert (both.ring_forward, both.hops_forward) == (4 * kv * 2, 4 * 2)
    twice = time.workload(
        replace(base, parallel=Parallel(cp=8, ulysses=8), train=replace(RUN.train, seq_length=256)), wide
    )
    assert twice.exchange_forward == 4 * 7 * 32 * (4 * (2 + 2) + 4), "each KV head goes to two ranks"
    # Two chunks of queries: keys go round twice; the projection of q, k and v five times more, as FLOPs of
    # one going forward.
    chunked = time.workload(
        with_memory(base, "all_but_attention", "all", query_chunks=True, layer_chunk=16), wide
    )
    assert (chunked.ring_forward, chunked.ring_backward, chunked.hops_forward) == (
        2 * ring.ring_forward,
        2 * ring.ring_backward,
        32,
    )
    assert chunked.recompute_products - ring.recompute_products == 5 * 4 * 32 * 2 * 8 * 2 * (8 + 2 * 4)
    assert chunked.host_again == 2 * 4 * 32 * 8 * 2, "the input is fetched three times"
    machine = Machine(gpu=SLOW, gpus=4, assumed=IDEAL)
    assert time.iteration_time(replace(base, parallel=Parallel(cp=4, ulysses=4)), wide, machine)[
        "CP all-to-all"
    ] == pytest.approx(2 * (all_to_all.exchange_forward + all_to_all.exchange_backward) / 100)
    assert q == 2 * kv / 2


def test_attention_inside_documents():
    masked = replace(RUN, data=Data(documents="masked"))
    machine = Machine(gpu=SLOW, gpus=4, assumed=IDEAL)
    joined = time.workload(RUN, SMALL).attention
    assert time.workload(masked, SMALL).attention == joined, "documents are as long as the row by default"
    assert time.workload(masked, SMALL, documents=DocumentLengths((16,))).attention == joined / 4
    assert (
        time.workload(masked, SMALL, documents=DocumentLengths((1000,))).attention
        == time.workload(RUN, SMALL, documents=DocumentLengths((16,))).attention
        == joined
    )
    short = time.iteration_time(masked, SMALL, replace(machine, documents=DocumentLengths((16,))))
    assert short["attention"] == pytest.approx(time.iteration_time(RUN, SMALL, machine)["attention"] / 4)
    plan = make_report(
        recipe="ultralong_1m", gpus=64, settings=["data.documents=masked"], document_length="8K"
    )
    assert "attention inside documents, as much as equal ones of 8,192 tokens have" in plan.text
    whole = make_report(recipe="ultralong_1m", gpus=64)
    assert (
        plan.values["plans"]["best"]["seconds_per_iteration"]["all"]
        < whole.values["plans"]["best"]["seconds_per_iteration"]["all"]
    )
    assert plan.values["plans"]["best"]["causal_mfu"] < 1


def test_all_to_all_is_searched_inside_a_node():
    base = replace(
        with_memory(RUN, "all_but_attention"),
        parallel=Parallel(tp=2, cp=16),
        train=replace(RUN.train, seq_length=1024, global_batch=8),
    )
    wide = replace(SMALL, heads=32, kv_heads=8, ffn_size=64)
    assert [r.parallel.ulysses for r in layouts.with_ulysses(base, wide)] == [1, 2, 4], (
        "TP 2 x 4 is a node; 8 would be two"
    )
    assert [r.parallel.ulysses for r in layouts.with_ulysses(base, replace(wide, kv_heads=6, heads=18))] == [
        1
    ], "three KV heads per rank, nine query heads"
    assert [r.parallel.ulysses for r in layouts.with_ulysses(base, wide, ["parallel.ulysses"])] == [1]
    for other in (
        replace(base, parallel=Parallel(cp=16, cp_comm_type="all_gather")),
        with_memory(base, "all_but_attention", query_chunks=True),
    ):
        assert layouts.with_ulysses(other, wide) == [other]


def test_query_chunks_only_if_nothing_else_fits():
    plan = make_report(model="llama-3.1-8b", seq_length="4M", gpus=8, host_memory="4T")
    longer = make_report(model="llama-3.1-8b", seq_length="128K", gpus=64)
    assert any(p["memory"]["query_chunks"] for p in plan.values["plans"].values())
    assert not any(p["memory"]["query_chunks"] for p in longer.values["plans"].values())
    held = make_report(model="llama-3.1-8b", seq_length="4M", gpus=8, settings=["memory.query_chunks=false"])
    assert not any(p["memory"]["query_chunks"] for p in held.values["plans"].values())
    assert layouts.with_query_chunks(with_memory(RUN, "full"), ["memory.recompute"]) is None
    assert (
        layouts.with_query_chunks(
            replace(with_memory(RUN, "all_but_attention"), parallel=Parallel(cp=2, ulysses=2))
        )
        is None
    )


def test_time_by_hand():
    assert time.iteration_time(RUN, SMALL, Machine(gpu=SLOW, gpus=4, assumed=IDEAL)) == pytest.approx(
        {
            "attention": 2 * 65.536 * 3.5,
            "other matrix products": 2 * (3 * 73.728 + 7.68),
            "recompute": 2 * (65.536 + 73.728),
            "CP ring, merges and hops": 2 * (2 * 6.912 + 7.68),
            "CP ring, not overlapped": 0.0,
            "TP collectives": 2 * 148.48,
            "pipeline transfers": 0.0,
            "host copies, not overlapped": 0.0,
            "pipeline bubble": 0.0,
            "DP gradients, weights": 1304 * 6 / 2 / 100,
        }
    )
    # Assumptions divide: half of the peak takes twice as long; hops cost what is assumed.
    half = replace(IDEAL, attention_forward=0.5, attention_backward=0.5, hop_microseconds=1e6)
    parts = time.iteration_time(RUN, SMALL, Machine(gpu=SLOW, gpus=4, assumed=half))
    assert parts["attention"] == pytest.approx(2 * 2 * 65.536 * 3.5)
    assert parts["CP ring, merges and hops"] == pytest.approx(2 * (2 * 6.912 + 7.68) + 2 * 24)
    # float32 has another peak.
    fp32 = replace(RUN, train=replace(RUN.train, precision="fp32"))
    assert time.iteration_time(fp32, SMALL, Machine(gpu=SLOW, gpus=4, assumed=IDEAL))[
        "attention"
    ] == pytest.approx(2 * 2 * 65.536 * 3.5)


def test_transfers_overlap_up_to_their_length():
    # 1024 bytes forward and 5120 backward, twice; the attention they overlap with takes 65.536 and 163.84 s.
    machine = Machine(gpu=replace(SLOW, nvlink=10.0), gpus=4, assumed=IDEAL)
    assert time.iteration_time(with_memory(RUN, "none"), SMALL, machine)[
        "CP ring, not overlapped"
    ] == pytest.approx(2 * (102.4 - 65.536 + 512 - 163.84))
    assert time.iteration_time(RUN, SMALL, machine)["CP ring, not overlapped"] == pytest.approx(
        2 * (2 * (102.4 - 65.536) + 512 - 163.84)
    )
    # 3072 bytes each way; the forward takes 65.536 + 73.728 + 7.68 s, the backward 163.84 + 147.456 + 73.728.
    machine = Machine(gpu=replace(SLOW, pcie=4.0), gpus=4, assumed=IDEAL)
    exposed = time.iteration_time(with_memory(RUN, "all_but_attention", "all"), SMALL, machine)[
        "host copies, not overlapped"
    ]
    assert exposed == pytest.approx(2 * (768 - 146.944 + 768 - 385.024))


def test_bubble():
    run = replace(with_memory(RUN, "none"), parallel=Parallel(pp=4), train=replace(RUN.train, global_batch=8))
    machine = Machine(gpu=replace(SLOW, nvlink=1e9), gpus=4, assumed=IDEAL)
    parts = time.iteration_time(run, SMALL, machine)
    # One layer per stage; the last has the output layer, whose time is no bubble of the first micro-batch's
    # way through the other three.
    layer = (1024 * 64 * 3.5 + 3 * 2 * 576 * 64) / 1000
    assert parts["pipeline bubble"] == pytest.approx(3 * layer, rel=1e-4)
    assert parts["attention"] == pytest.approx(8 * 1024 * 64 * 3.5 / 1000)
    halved = replace(run, parallel=Parallel(pp=2, vpp=2))
    assert time.iteration_time(halved, SMALL, replace(machine, gpus=2))["pipeline bubble"] == pytest.approx(
        layer, rel=1e-4
    )


def test_links_follow_the_placement_of_ranks():
    machine = Machine(gpu=SLOW, gpus=16, assumed=IDEAL)
    assert [machine.link_bandwidth(n) for n in (1, 2, 4, 8, 16)] == [100, 100, 100, 100, 10]
    assert [machine.link_bandwidth(n) for n in (3, 6)] == [10, 10], "some groups of three span two nodes"
    assert replace(machine, gpus=6).link_bandwidth(3) == 100


@pytest.mark.parametrize(
    "parallel", [Parallel(), Parallel(tp=2, cp=2), Parallel(pp=4), Parallel(tp=2, pp=2, cp=4)]
)
def test_workload_equals_the_mfu_formula(parallel):
    """Over all ranks, without recompute and with the backward twice the forward: the FLOPs that MFU
    counts."""
    run = replace(with_memory(RUN, "none"), parallel=parallel)
    todo = [time.workload(run, SMALL, last=stage == parallel.pp - 1) for stage in range(parallel.pp)]
    here = parallel.tp * parallel.cp * sum(3 * w.attention + 3 * w.products + w.output for w in todo)
    assert here == pytest.approx(64 * flops_per_token(SMALL, 64))


@pytest.mark.parametrize("mode", memory.MEMORY_MODES, ids=lambda m: f"{m.recompute}-{m.offload}")
def test_longer_takes_more(mode):
    run, machine = (
        replace(recipes.get("ultralong_1m"), parallel=Parallel(tp=8, cp=4), memory=mode),
        Machine(gpu=GPUS["h100"], gpus=256),
    )
    plans = [
        search.estimate(replace(run, train=replace(run.train, seq_length=s * 1024)), LLAMA_3_1_8B, machine)
        for s in (128, 256, 512, 1024, 2048, 4096)
    ]
    for short, long in itertools.pairwise(plans):
        assert memory.total(short.memory) < memory.total(long.memory)
        assert memory.total(short.host) < memory.total(long.host) or mode.offload == "off"
        assert 2 * short.seconds < long.seconds + 1.0, "attention grows faster than the tokens do"
        assert short.tokens_per_second > long.tokens_per_second
        assert all(
            short.time[part] <= long.time[part]
            for part in short.time
            if part != "host copies, not overlapped"
        )


# ---- layouts and memory modes ------------------------------------------------------------------


def shapes(runs) -> list[tuple[int, int, int]]:
    return [(r.parallel.tp, r.parallel.pp, r.parallel.cp) for r in runs]


def test_layouts():
    base = replace(RUN, parallel=Parallel())
    # DP 4 does not divide the batch of 2, and TP 4 not the two KV heads.
    assert shapes(layouts.layouts(base, SMALL, 4)) == [
        (1, 1, 2),
        (1, 1, 4),
        (1, 2, 1),
        (1, 2, 2),
        (1, 4, 1),
        (2, 1, 1),
        (2, 1, 2),
        (2, 2, 1),
    ]
    assert shapes(
        layouts.layouts(replace(base, parallel=Parallel(tp=2)), SMALL, 4, fixed=("parallel.tp",))
    ) == [
        (2, 1, 1),
        (2, 1, 2),
        (2, 2, 1),
    ]
    assert shapes(
        layouts.layouts(replace(base, parallel=Parallel(dp=2)), SMALL, 4, fixed=("parallel.dp",))
    ) == [
        (1, 1, 2),
        (1, 2, 1),
        (2, 1, 1),
    ]
    assert (
        shapes(layouts.layouts(replace(base, parallel=Parallel(cp=8)), SMALL, 4, fixed=("parallel.cp",)))
        == []
    )
    # A ring of 64 would need 128 chunks; TP is at most 8.
    wide = replace(SMALL, heads=64, kv_heads=64, ffn_size=64)
    assert max(shapes(layouts.layouts(base, wide, 64)), key=lambda s: s[2]) == (1, 1, 32)
    assert max(tp for tp, _, _ in shapes(layouts.layouts(base, wide, 64))) == 8
    interleaved = replace(base, parallel=Parallel(pp=2, vpp=2))
    assert {(r.parallel.pp, r.parallel.vpp) for r in layouts.layouts(interleaved, SMALL, 4)} == {
        (1, 1),
        (2, 2),
    }  # PP 4 has no 8 layers to interleave


def words(runs) -> list[tuple[str, str]]:
    return [(r.memory.recompute, r.memory.offload) for r in runs]


def test_modes():
    attention = [
        ("all_but_attention", "off"),
        ("all_but_attention", "layer_inputs"),
        ("all_but_attention", "all"),
    ]
    run = replace(RUN, memory=Memory(layer_chunk=4096))
    assert words(memory.memory_modes(run)) == [("none", "off"), ("full", "off"), *attention]
    assert words(memory.memory_modes(run, ["memory.recompute", "memory.offload"])) == attention, (
        "auto is all three"
    )
    assert words(memory.memory_modes(with_memory(run, "full"), ["memory.recompute"])) == [("full", "off")]
    assert words(
        memory.memory_modes(with_memory(run, "all_but_attention", "layer_inputs"), ["memory.offload"])
    ) == [("all_but_attention", "layer_inputs")]
    assert {r.memory.layer_chunk for r in memory.memory_modes(run)} == {4096}


def test_auto_is_the_first_that_fits():
    run = replace(recipes.get("ultralong_1m"), parallel=Parallel(tp=8, cp=4), memory=Memory(layer_chunk=8192))
    sizes = [
        memory.total(memory.gpu_memory(mode, LLAMA_3_1_8B, 32))
        for mode in memory.memory_modes(run, ["memory.recompute"])
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    for size, before, at_most in zip(
        sizes, ("layer_inputs", "all", "all"), ("off", "layer_inputs", "all"), strict=True
    ):
        for gpu_bytes, settled in ((int(size / 0.9) + 1, at_most), (int(size / 0.9) - 1, before)):
            assert memory.settle_offload(run, LLAMA_3_1_8B, 32, gpu_bytes) == replace(
                run, memory=replace(run.memory, offload=settled)
            )
    assert memory.settle_offload(run, LLAMA_3_1_8B, 32, None).memory.offload == "off", "a CPU"
    for checkpoint in ("none", "full"):
        assert words([memory.settle_offload(with_memory(run, checkpoint, "auto"), LLAMA_3_1_8B, 32, 1)]) == [
            (checkpoint, "off")
        ]
    asked = with_memory(run, "all_but_attention", "layer_inputs")
    assert (
        memory.settle_offload(asked, LLAMA_3_1_8B, 32, 10**15) is asked
        and memory.settle_offload(asked, LLAMA_3_1_8B, 32, None) is asked
    )
    with pytest.raises(AssertionError, match="settle_offload comes first"):
        memory.gpu_memory(run, LLAMA_3_1_8B, 32)


def test_search_ranks_by_time_and_keeps_one_estimate_per_layout():
    run = replace(recipes.get("ultralong_1m"), parallel=Parallel())
    result = search.search(run, LLAMA_3_1_8B, Machine(gpu=GPUS["h100"], gpus=32))
    assert result.best and result.fitting > len(result.best)
    assert [p.seconds for p in result.best] == sorted(p.seconds for p in result.best)
    assert len({p.run.parallel for p in result.best}) == len(result.best)
    assert all(p.problem is None and memory.fits(p.memory, 80 * 10**9) for p in result.best)
    assert (
        result.closest is not None
        and result.closest.problem is not None
        and not memory.fits(result.closest.memory, 80 * 10**9)
    )
    assert result.faster is not None and result.faster.seconds < result.best[0].seconds
    best = result.best[0]
    assert best.tokens_per_second == pytest.approx(8 * 1024**2 / best.seconds / 32)
    assert best.mfu == pytest.approx(best.tokens_per_second * (4.50e10 + 786432 * 1024**2) / 989e12, rel=1e-3)


# ---- what fits ---------------------------------------------------------------------------------


def test_1m_on_256_fits_and_4m_on_8_does_not():
    good = make_report(model="llama-3.1-8b", seq_length="1M", gpus=256)
    assert good.fits and set(good.values["plans"]) == {"best", "no. 2", "no. 3", "no. 4"}
    assert (
        "best: --set train.seq_length=1M" in good.text
        and "assumed, not measured" in good.text
        and "data-sheet" in good.text
    )
    bad = make_report(model="llama-3.1-8b", seq_length="4M", gpus=8, settings=["memory.recompute=full"])
    assert not bad.fits and list(bad.values["plans"]) == ["closest"]
    assert not bad.values["plans"]["closest"]["fits"] and bad.values["plans"]["closest"]["set"] == []
    reason = next(note for note in bad.values["notes"] if note.startswith("nothing fits"))
    assert (
        "72.0 GB are usable; the largest part is saved activations with" in reason
        and "to reduce it use " in reason
        and "more parallel.cp" in reason
    )
    # The reported figures are the limit: it fits there, and not at half the GPUs or twice the length.
    gpus, length = (
        int(number.replace(",", ""))
        for number in re.findall(r"a layout fits on (\S+) GPUs; 8 GPUs fit (\S+) tokens", bad.text)[0]
    )
    fits = [
        make_report(model="llama-3.1-8b", seq_length=str(s), gpus=n, settings=["memory.recompute=full"]).fits
        for n, s in ((gpus, 4 * 1024**2), (gpus // 2, 4 * 1024**2), (8, length), (8, 2 * length))
    ]
    assert fits == [True, False, True, False]


@pytest.mark.parametrize(
    ("settings", "part", "remedy"),
    [
        (
            ["memory.recompute=none"],
            "saved activations",
            "memory.recompute=all_but_attention with memory.offload=auto",
        ),
        (["memory.offload=off"], "saved activations", "memory.offload=all"),
        (
            ["memory.recompute=full", "parallel.pp=1"],
            "working layer",
            "memory.recompute=all_but_attention with memory.offload=auto, more parallel.cp",
        ),
        (
            ["memory.recompute=full", "memory.loss_chunk=0", "parallel.cp=8", "parallel.tp=1"],
            "loss",
            "a smaller memory.loss_chunk (now all at once)",
        ),
    ],
)
def test_why_it_does_not_fit(settings, part, remedy):
    run = override(replace(recipes.get("ultralong_1m"), parallel=Parallel()), settings)
    result = search.search(
        run, LLAMA_3_1_8B, Machine(gpu=GPUS["h100"], gpus=8), [s.partition("=")[0] for s in settings]
    )
    assert result.best == [] and result.closest is not None
    assert f"the largest part is {part} with " in str(result.closest.problem) and remedy in str(
        result.closest.problem
    )


def test_weights_optimizer_and_host_memory_as_reasons():
    machine = Machine(gpu=GPUS["h100"], gpus=1)
    big = replace(LLAMA_3_1_8B, layers=320)
    run = Run(
        name="x",
        memory=Memory(offload="off"),
        train=Train(seq_length=8192, global_batch=8, iterations=1, lr=1.0),
    )
    assert "optimizer (fp32)" in str(search.estimate(run, big, machine).problem) and "more GPUs" in str(
        search.estimate(run, big, machine).problem
    )
    wide = replace(run, parallel=Parallel(), train=replace(run.train, global_batch=64))
    assert "more parallel.tp or parallel.pp" in str(
        search.estimate(wide, big, replace(machine, gpus=64)).problem
    )
    long = with_memory(
        replace(recipes.get("ultralong_1m"), parallel=Parallel(tp=8, cp=4)), "all_but_attention", "all"
    )
    assert search.estimate(long, LLAMA_3_1_8B, Machine(gpu=GPUS["h100"], gpus=32)).problem is None
    short = search.estimate(long, LLAMA_3_1_8B, Machine(gpu=GPUS["h100"], gpus=32, host_memory=64 * 1024**3))
    assert memory.total(short.host) == 8 * 32 * (1024**2 // 4) * (2 * 4096 + 2 * 4096 + 128) // 8
    assert "of host memory per node, but only 62 GB are usable" in str(
        short.problem
    ) and "memory.offload=layer_inputs" in str(short.problem)


MODELS = {"tiny": None, **dict.fromkeys(("tiny_extend", "tiny_extend_sft"), recipes.tiny().model)}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_planned(name):
    run = recipes.get(name)
    model = run.model or MODELS.get(name) or SHAPES.get(run.base, LLAMA_3_1_8B)
    ranks = run.parallel.tp * run.parallel.pp * run.parallel.cp
    own = search.estimate(
        memory.settle_offload(run, model, ranks, GPUS["h100"].memory),
        model,
        Machine(gpu=GPUS["h100"], gpus=ranks),
    )
    assert own.problem is None and own.seconds > 0 and own.dp == 1 and 0 < own.mfu < 1
    assert sum(own.time.values()) == own.seconds
    if run.base or run.model:
        plan = make_report(recipe=name, gpus=ranks)
        assert plan.fits and "recipe" in plan.values["plans"]
        fastest, theirs = (
            plan.values["plans"][which]["seconds_per_iteration"]["all"] for which in ("best", "recipe")
        )
        assert fastest <= theirs or not plan.values["plans"]["recipe"]["fits"]


def test_printed_settings_reproduce_the_estimate():
    for recipe, gpus in (("ultralong_1m", 64), ("smollm2_135m", 4)):
        base = recipes.get(recipe)
        plan = make_report(recipe=recipe, gpus=gpus, settings=["train.global_batch=16", "parallel.pp=1"])
        for new in plan.values["plans"].values():
            run = override(base, new["set"])
            assert run.train.global_batch == 16
            p = run.parallel
            assert {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "dp": p.data_parallel(gpus)} == new[
                "layout"
            ]
            assert asdict(run.memory) == new["memory"]
            again = search.estimate(run, SHAPES[base.base], Machine(gpu=GPUS["h100"], gpus=gpus))
            assert (
                memory.total(again.memory) == new["memory_bytes_per_gpu"]["all"]
                and again.seconds == new["seconds_per_iteration"]["all"]
            )
    # Without a recipe the settings include length and batch, and apply to any recipe.
    plan = make_report(model="llama-3.1-8b", seq_length="512K", gpus=64)
    run = override(recipes.get("ultralong_4m"), plan.values["plans"]["best"]["set"])
    assert (run.train.seq_length, run.train.global_batch) == (512 * 1024, 16)


def test_given_memory_settings_are_kept():
    settings = ["memory.offload=all", "memory.layer_chunk=8K"]
    plan = make_report(recipe="ultralong_1m", gpus=32, settings=settings)
    assert plan.fits and all(
        p["memory"] == asdict(Memory(offload="all", layer_chunk=8192)) for p in plan.values["plans"].values()
    )
    assert "GB of host memory per node" in plan.text and "memory.layer_chunk=8K" in plan.text
    auto = make_report(
        recipe="ultralong_1m", gpus=32, settings=["memory.recompute=all_but_attention", "memory.offload=auto"]
    )
    free = make_report(recipe="ultralong_1m", gpus=32, settings=["memory.recompute=all_but_attention"])
    assert auto.text == free.text and "offload=auto" not in auto.text


# ---- the tool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "lama-3.1-8b", "seq_length": "1M"},
            "--model lama-3.1-8b: neither a directory nor a known name; did you mean llama-3.1-8b?",
        ),
        ({}, "nothing to plan: give --model with --seq-length, or --recipe"),
        ({"model": "llama-3.1-8b"}, "needs --seq-length"),
        ({"model": "llama-3.1-8b", "seq_length": "long"}, "--seq-length=long: expected a whole number"),
        ({"model": "llama-3.1-8b", "seq_length": "0"}, "train.seq_length=0 must be at least 1"),
        ({"recipe": "ultralong_9m"}, "did you mean ultralong_"),
        ({"recipe": "tiny", "model": "llama-3.1-8b"}, "recipe tiny defines its own model"),
        ({"recipe": "ultralong_1m_sft"}, "give it with --model"),
        (
            {"recipe": "ultralong_1m", "gpu": "v100"},
            "--gpu v100: unknown; choose one of h100, h200, a100, b200",
        ),
        ({"recipe": "ultralong_1m", "gpus": 0}, "--gpus 0: must be at least 1"),
        ({"recipe": "ultralong_1m", "gpus": 7}, "no layout of 7 GPUs divides 32 heads, 8 KV heads"),
        ({"recipe": "ultralong_1m", "settings": ["parallel.cp=3"]}, "not divisible by 2 x parallel.cp = 6"),
        (
            {"recipe": "ultralong_1m", "settings": ["parallel.tp=16"]},
            "no layout of 8 GPUs with parallel.tp=16 divides",
        ),
        ({"recipe": "ultralong_1m", "settings": ["parallel.tq=2"]}, "did you mean parallel.tp?"),
        (
            {"recipe": "ultralong_1m", "settings": ["memory.recompute=some"]},
            "memory.recompute=some: choose one of",
        ),
        (
            {"recipe": "ultralong_1m", "settings": ["memory.recompute=full", "memory.offload=all"]},
            "memory.offload=all requires",
        ),
        ({"recipe": "ultralong_1m", "settings": ["memory.layer_chunk=few"]}, "expected a whole number"),
        ({"recipe": "ultralong_1m", "global_batch": 0}, "train.global_batch=0 must be at least 1"),
        ({"recipe": "ultralong_1m", "host_memory": "much"}, "--host-memory much: expected bytes"),
        ({"recipe": "ultralong_1m", "host_memory": "0T"}, "--host-memory 0: must be above 0"),
        (
            {"recipe": "ultralong_1m", "document_length": "8K"},
            "--document-length applies only where attention stays inside documents",
        ),
        (
            {"recipe": "ultralong_1m", "document_length": "0", "settings": ["data.documents=masked"]},
            "--document-length 0: must be at least 1",
        ),
        ({"recipe": "ultralong_1m", "assumptions": ["speed=1"]}, "--assume speed=1: expected NAME=NUMBER"),
        (
            {"recipe": "ultralong_1m", "assumptions": ["products=2"]},
            "--assume products=2.0: must be a fraction above 0 and at most 1",
        ),
        ({"recipe": "ultralong_1m", "assumptions": ["products=nan"]}, "must be a fraction above 0"),
        ({"recipe": "ultralong_1m", "assumptions": ["hop_microseconds=-1"]}, "must be 0 or more"),
        ({"recipe": "ultralong_1m", "show": 0}, "--show 0: must be at least 1"),
        ({"recipe": "ultralong_1m", "save_rate": "fast"}, "--save-rate fast: expected bytes, like 10G"),
        ({"recipe": "ultralong_1m", "save_rate": "0"}, "--save-rate 0: must be above 0"),
        (
            {"recipe": "ultralong_1m_stages", "seq_length": "1M"},
            "--seq-length and --global-batch apply to one stage; ultralong_1m_stages has several",
        ),
        (
            {"recipe": "ultralong_1m_stages", "settings": ["sft:train.lr=1"]},
            "ultralong_1m_stages has no stage sft; its stages: ultralong_1m, ultralong_1m_sft",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError) as refused:
        make_report(**{"gpus": 8, **arguments})
    assert message in str(refused.value) and "\n" not in str(refused.value)


# ---- the whole run -----------------------------------------------------------------------------


def test_hours_of_a_run_by_hand():
    run = replace(RUN, train=replace(RUN.train, iterations=250, save_every=100))
    machine = Machine(gpu=SLOW, gpus=4, assumed=IDEAL, save_rate=1000.0)
    one = search.estimate(run, SMALL, machine)
    got = whole_run.duration(one, SMALL, machine)
    # 4 layers of 192 + 384 weights and two norms of 8, two embeddings of 10 x 8, the last norm; after
    # iterations 100, 200 and 250, in bf16 with a float32 copy and two moments.
    parameters = 4 * (192 + 384 + 16) + 2 * 80 + 8
    assert (got.iterations, got.saves, got.save_bytes) == (250, 3, 3 * parameters * 14)
    assert got.training == 250 * one.seconds and got.saving == 3 * parameters * 14 / 1000
    assert got.hours == (got.training + got.saving) / 3600 and got.gpu_hours == 4 * got.hours
    unknown = whole_run.duration(one, SMALL, replace(machine, save_rate=None))
    assert unknown.saving is None and unknown.hours == got.training / 3600
    assert (got + got).saving == 2 * got.saving and (got + got).hours == 2 * got.hours
    assert (got + unknown).saving is None and (got + unknown).hours == 2 * unknown.hours
    for every, saves in ((0, 1), (250, 1), (125, 2), (1000, 1)):
        often = search.estimate(replace(run, train=replace(run.train, save_every=every)), SMALL, machine)
        assert whole_run.duration(often, SMALL, machine).saves == saves
    fp32 = replace(run, train=replace(run.train, precision="fp32"))
    assert whole_run.checkpoint_bytes(fp32, SMALL) == 16 * parameters


def test_all_stages_of_a_recipe():
    settings = ["ultralong_1m:train.iterations=7", "memory.recompute=full"]
    plan = make_report(recipe="ultralong_1m_stages", gpus=64, settings=settings, save_rate="1G")
    alone = make_report(
        recipe="ultralong_1m",
        gpus=64,
        settings=["train.iterations=7", "memory.recompute=full"],
        save_rate="1G",
    )
    assert plan.fits and list(plan.values["stages"]) == ["ultralong_1m", "ultralong_1m_sft"]
    assert plan.values["stages"]["ultralong_1m"] == alone.values
    first, second = (stage["whole_run"]["best"] for stage in plan.values["stages"].values())
    assert first["iterations"] == 7 and first["saving_seconds"] == first["save_bytes"] / 1024**3
    assert plan.values["whole_run"]["gpu_hours"] == pytest.approx(first["gpu_hours"] + second["gpu_hours"])
    assert plan.values["whole_run"]["gpu_hours"] == pytest.approx(64 * plan.values["whole_run"]["hours"])
    iterations = 7 + second["iterations"]
    assert f"whole run of {iterations:,} iterations, estimated: all stages " in plan.text
    assert (
        "GPU-hours" in alone.text
        and "GPU-hours" not in make_report(model="llama-3.1-8b", seq_length="64K", gpus=64).text
    ), "a model alone has no number of iterations"


def test_a_hugging_face_directory_is_a_model(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    from_directory = make_report(model=str(tmp_path), seq_length="64K", gpus=4)
    assert (
        from_directory.values["plans"]
        == make_report(model="smollm2-135m", seq_length="64K", gpus=4).values["plans"]
    )
    assert (
        from_directory.values["plans"]
        == make_report(model="HuggingFaceTB/SmolLM2-135M-Instruct", seq_length="64K", gpus=4).values["plans"]
    )


def test_tool_prints_and_writes(tmp_path, monkeypatch, capsys):
    file = tmp_path / "link.json"
    file.symlink_to(tmp_path / "new" / "plan.json")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            str(TOOL),
            "--model",
            "llama-3.1-8b",
            "--seq-length",
            "1M",
            "--gpus",
            "256",
            "--gpu",
            "h100",
            "--show",
            "2",
            "--json",
            str(file),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 0
    text, values = capsys.readouterr().out, json.loads((tmp_path / "new" / "plan.json").read_text())
    assert file.is_symlink()
    assert (
        list(values["plans"]) == ["best", "no. 2"]
        and values["estimated"]
        and values["machine"]["assumed"]["products"] == 0.65
    )
    for part in (
        "weights",
        "gradients (fp32)",
        "optimizer (fp32)",
        "saved activations",
        "working layer",
        "RoPE tables",
        "loss",
        "attention",
        "other matrix products",
        "TP collectives",
        "DP gradients, weights",
    ):
        assert f"\n  {part} " in text, part
    assert max(len(line) for line in text.splitlines() if line.startswith("  ")) < 140


def searched(*settings):
    return make_report(gpus=256, recipe="ultralong_1m", settings=settings).values["plans"]


def test_settings_that_are_not_searched_are_kept():
    for new in searched("memory.query_chunks=true").values():
        assert new["memory"]["recompute"] == "all_but_attention"
    for new in searched("parallel.ulysses=4").values():
        assert new["layout"]["cp"] % 4 == 0
    # 32 query heads: all-to-all over 8 ranks leaves TP up to 4.
    assert all(
        new["layout"]["tp"] <= 4
        for name, new in searched("parallel.ulysses=8", "parallel.cp_comm_type=all_gather").items()
        if name != "recipe"
    )
