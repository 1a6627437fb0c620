"""Every recipe builds; the paper's recipes carry its figures, divide, and fit the GPUs they were run on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ultralong import recipes
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import (
    Memory,
    Model,
    Parallel,
    Run,
    Train,
    check_model_layout,
    from_dict,
    to_dict,
)
from megatron_ultralong.data.pretrain.sources import load as load_sources
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory
from megatron_ultralong.shapes import LLAMA_3_1_8B, SHAPES, SMOLLM2_135M
from megatron_ultralong.train.optimizer import learning_rate

GIB = 1024**3
H100 = 80 * 10**9  # bytes, as the vendor counts them

# The paper's figures (arXiv 2504.06214), written out once more: name, S, factor, CP, data parallel on 256
# GPUs, iterations, global batch.
PAPER = [
    ("ultralong_1m", 1_048_576, 128, 4, 8, 125, 8),
    ("ultralong_2m", 2_097_152, 256, 16, 2, 125, 4),
    ("ultralong_4m", 4_194_304, 512, 16, 2, 150, 2),
]


@pytest.mark.parametrize("name", recipes.names())
def test_builds(name):
    run = recipes.get(name)
    assert run.name == name
    assert run.notes, "a recipe says where its figures come from"
    assert recipes.get(name) is not run and recipes.get(name) == run
    assert from_dict(to_dict(run)) == run
    assert override(run, ["train.iterations=1000", "train.warmup=0"]).train.iterations == 1000


def test_unknown_name_gives_the_nearest():
    with pytest.raises(
        UserError, match=r"--recipe ultralong-1m: no such recipe; did you mean ultralong_1m\?"
    ):
        recipes.get("ultralong-1m")
    with pytest.raises(UserError, match="did you mean"):
        recipes.get("")


@pytest.mark.parametrize(("name", "seq_length", "factor", "cp", "dp", "iterations", "global_batch"), PAPER)
def test_paper_figures(name, seq_length, factor, cp, dp, iterations, global_batch):
    run = recipes.get(name)
    assert run.base == "meta-llama/Llama-3.1-8B-Instruct" and run.model is None
    assert (run.train.seq_length, run.train.iterations, run.train.global_batch, run.train.lr) == (
        seq_length,
        iterations,
        global_batch,
        3e-5,
    )
    assert run.rope is not None
    assert (run.rope.type, run.rope.ramp, run.rope.temperature) == ("yarn", "rotation", False)
    assert (run.rope.theta, run.rope.factor, run.rope.original_length, run.rope.alpha, run.rope.beta) == (
        500000,
        factor,
        8192,
        1,
        4,
    )
    assert run.rope.factor * run.rope.original_length == seq_length
    assert (run.optim.beta1, run.optim.beta2) == (0.9, 0.95)
    assert run.runtime.device == "cuda", "a node with a broken driver must not train on its CPU"
    # One epoch of a billion tokens.
    assert 1.0e9 <= seq_length * global_batch * iterations <= 1.3e9
    # The paper's layout on its 256 GPUs: TP 8 (one of 8 KV heads a rank), CP, and what is left as data
    # parallel.
    check_model_layout(LLAMA_3_1_8B, run.parallel)
    assert (run.parallel.tp, run.parallel.pp, run.parallel.cp, run.parallel.data_parallel(256)) == (
        8,
        1,
        cp,
        dp,
    )
    assert run.micro_batches(dp) * dp == global_batch
    assert seq_length % (2 * cp) == 0 and seq_length // cp % 8 == 0


@pytest.mark.parametrize("size", ["1m", "2m", "4m"])
def test_instruction_tuning_figures(size):
    run = recipes.get(f"ultralong_{size}_sft")
    assert (run.train.lr, run.train.global_batch, run.train.seq_length) == (5e-6, 128, 8192)
    assert run.rope is None, "instruction tuning keeps the checkpoint's RoPE"
    assert run.runtime.device == "cuda"
    assert 128 * (run.train.iterations - 1) < 100_000 <= 128 * run.train.iterations, (
        "one epoch of 100K examples"
    )
    check_model_layout(LLAMA_3_1_8B, run.parallel)
    assert run.micro_batches(run.parallel.data_parallel(256)) == 4


@pytest.mark.parametrize("size", ["1m", "2m", "4m"])
def test_constant_learning_rate(size):
    run, constant = recipes.get(f"ultralong_{size}"), recipes.get(f"ultralong_{size}_constant")
    assert [learning_rate(constant.train, i) for i in (1, 60, constant.train.iterations)] == [3e-5] * 3
    train = replace(constant.train, schedule="cosine", warmup=run.train.warmup, min_lr=run.train.min_lr)
    assert replace(constant, name=run.name, notes=run.notes, train=train) == run


# Published figures of other models, written out once more: recipe, theta, S, global batch, iterations, LR,
# warm-up, LR at the end, tokens in millions as published.
PEERS = [
    ("prolong_64k", 8e6, 65536, 64, 5000, 1e-5, 500, 1e-6, 21_000),
    ("prolong_512k", 1.28e8, 524288, 16, 2500, 5e-6, 250, 5e-7, 21_000),
    ("prolong_sft", None, 65536, 64, 250, 2e-5, 12, 2e-6, 1_050),
    ("gradient_65k", 15.3e6, 65536, 32, 30, 2e-5, 0, 2e-5, 62.9),
    ("gradient_262k", 207.1e6, 262144, 16, 24, 2e-5, 0, 2e-5, 100.7),
    ("gradient_524k", 1.06e9, 524288, 16, 50, 2e-5, 0, 2e-5, 419.4),
    ("gradient_1048k", 3580165449.0, 1048576, 16, 50, 2e-5, 0, 2e-5, 838.9),
    ("gradient_4194k", 4.52e10, 4194304, 4, 12, 2e-5, 0, 2e-5, 201.3),
]


@pytest.mark.parametrize("figures", PEERS, ids=lambda figures: figures[0])
def test_peer_figures(figures):
    name, theta, s, batch, iterations, lr, warmup, last, millions = figures
    run = recipes.get(name)
    t = run.train
    assert (None if run.rope is None else run.rope.theta) == theta
    assert (t.seq_length, t.global_batch, t.iterations, t.lr, t.warmup) == (s, batch, iterations, lr, warmup)
    assert learning_rate(t, t.iterations) == pytest.approx(last)
    assert s * batch * iterations / 1e6 == pytest.approx(millions, rel=2e-3)
    assert t.load_optimizer == (name == "prolong_512k")
    assert run.data.documents == ("masked" if "prolong" in name else "joined")
    check_model_layout(LLAMA_3_1_8B, run.parallel)
    world = run.parallel.tp * run.parallel.cp
    run.micro_batches(run.parallel.data_parallel(world))
    assert memory.fits(
        memory.gpu_memory(override(run, ["memory.offload=all"]), LLAMA_3_1_8B, 4 * world), H100
    )


@pytest.mark.parametrize("name", recipes.names())
def test_unpublished_settings_exist(name):
    run = recipes.get(name)
    values = to_dict(run)
    for key in run.unpublished:
        section, setting = key.split(".")
        assert setting in values[section]
    assert run.unpublished or "own choice" in run.notes
    changed = override(run, ["train.seed=7"])
    assert "train.seed" not in changed.unpublished, "it is the user's choice now"


@pytest.mark.parametrize(("name", "sources"), [("prolong_64k", 10), ("prolong_512k", 12)])
def test_prolong_mixes(tmp_path, name, sources):
    file = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    (tmp_path / file.name).write_text(file.read_text())
    for folder in set(re.findall(r"input: (\S+),", file.read_text())):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("a")
    mix = load_sources(tmp_path / file.name)
    assert len(mix.sources) == sources and sum(source.weight for source in mix.sources) == 1
    run = recipes.get(name).train
    assert mix.tokens == pytest.approx(run.seq_length * run.global_batch * run.iterations, rel=2e-3)
    whole = {source.name: source.weight for source in mix.sources if source.lengths}
    assert float(sum(whole.values())) == pytest.approx(0.6), "repositories and books come in whole packs"


def test_smollm2():
    run = recipes.get("smollm2_135m")
    assert run.rope is not None
    assert run.rope.factor * run.rope.original_length == run.train.seq_length == 65536
    assert run.rope.theta == 100000
    check_model_layout(SMOLLM2_135M, run.parallel)
    override(run, ["train.seq_length=2048", "rope.factor=8", "parallel.cp=2"])
    with pytest.raises(UserError, match=r"model.heads=9 is not divisible by parallel.tp=2"):
        check_model_layout(SMOLLM2_135M, Parallel(tp=2))


# ---- memory ------------------------------------------------------------------------------------


def test_parameters_of_known_models():
    assert memory.stage_parameters(LLAMA_3_1_8B, 1, 1, 0) == 8_030_261_248
    assert memory.stage_parameters(SMOLLM2_135M, 1, 1, 0) == 134_515_008
    # Over pipeline stages nothing is lost; a tied embedding lies on both ends, and the last stage has the
    # final norm.
    assert sum(memory.stage_parameters(LLAMA_3_1_8B, 1, 4, stage) for stage in range(4)) == 8_030_261_248
    assert (
        sum(memory.stage_parameters(SMOLLM2_135M, 1, 2, stage) for stage in range(2))
        == 134_515_008 + 49152 * 576
    )
    # Over tensor parallel ranks norms are copied: two a layer and the last one.
    assert 8 * memory.stage_parameters(LLAMA_3_1_8B, 8, 1, 0) == 8_030_261_248 + 7 * 65 * 4096


@pytest.mark.parametrize("name", [figures[0] for figures in PAPER])
def test_paper_layouts_fit(name):
    run = override(recipes.get(name), ["memory.offload=off"])
    parts = memory.gpu_memory(run, LLAMA_3_1_8B, 256)
    s = run.train.seq_length // run.parallel.cp
    assert memory.fits(parts, H100)
    # Published rules of thumb for this model: 2 + 4 bytes a parameter, 12 over all data and context parallel
    # ranks, 8 KiB a token and layer for its checkpoint, 84 KiB a token for the MLP.
    assert parts["weights"] + parts["gradients (fp32)"] == pytest.approx(6 * 8.03e9 / 8, rel=0.01)
    assert parts["optimizer (fp32)"] == pytest.approx(12 * 8.03e9 / 256, rel=0.01)
    assert parts["saved activations"] == 32 * s // 8 * (
        2 * 8 * 1024 + 32 * 4
    )  # input, attention output, float32 logsumexp of 32 heads
    assert parts["working layer"] > s // 8 * 84 * 1024
    assert parts["RoPE tables"] == s * 128 * 4
    # All of it together is tens of GiB: neither an empty formula nor one that a GPU of 80 GB could never
    # hold.
    assert 12 * GIB < memory.total(parts) < 60 * GIB


def test_without_context_parallelism_1m_does_not_fit():
    run = override(recipes.get("ultralong_1m"), ["memory.offload=off", "parallel.cp=1"])
    assert not memory.fits(memory.gpu_memory(run, LLAMA_3_1_8B, 8), H100)
    run = override(recipes.get("ultralong_1m"), ["memory.recompute=none", "memory.offload=off"])
    assert not memory.fits(memory.gpu_memory(run, LLAMA_3_1_8B, 256), H100)
    run = override(
        recipes.get("ultralong_1m"),
        ["memory.loss_chunk=0", "memory.offload=off", "parallel.tp=1", "parallel.cp=32"],
    )
    whole, chunked = (
        memory.gpu_memory(r, LLAMA_3_1_8B, 256)["loss"]
        for r in (run, override(run, ["memory.loss_chunk=4096"]))
    )
    assert whole - chunked == (32768 - 4096) * 128256 * 2  # logits, whose place their gradient takes


# The paper's recipe for other models: recipe, context before, theta, S, factor, GPUs at least.
OTHER_MODELS = [
    ("qwen3_8b_1m", 32768, 1e6, 1_048_576, 32, 32),
    ("llama3_70b_512k", 8192, 5e5, 524_288, 64, 128),
]


@pytest.mark.parametrize(("name", "original", "theta", "seq_length", "factor", "gpus"), OTHER_MODELS)
def test_recipes_of_other_models(name, original, theta, seq_length, factor, gpus):
    run, model = recipes.get(name), SHAPES[recipes.get(name).base]
    assert run.rope is not None
    assert (run.rope.theta, run.rope.original_length, run.rope.factor) == (theta, original, factor)
    assert run.train.seq_length == seq_length == factor * original
    assert 1.0e9 <= seq_length * run.train.global_batch * run.train.iterations <= 1.3e9
    assert run.parallel.tp * run.parallel.pp * run.parallel.cp == gpus
    for world in (gpus, 2 * gpus):
        settled = memory.settle_offload(run, model, world, H100)
        assert memory.fits(memory.gpu_memory(settled, model, world), H100)
        host = memory.total(memory.host_memory(settled, model, world))
        assert 8 * host < 0.5e12, "bytes of a node of eight GPUs"
    assert not memory.fits(memory.gpu_memory(override(settled, ["parallel.tp=1"]), model, gpus), H100)


def test_memory_of_pipelines():
    model = Model(hidden_size=8, ffn_size=16, layers=8, heads=2, kv_heads=1, head_dim=4, vocab_size=10)
    run = Run(
        name="x",
        parallel=Parallel(pp=4),
        memory=Memory(recompute="full", offload="off"),
        train=Train(seq_length=32, global_batch=8, iterations=1, lr=1.0),
    )
    # The first of four stages holds four micro-batches of two layers' inputs: 1F1B.
    assert memory.stage_memory(run, model, 1, 8, 0)["saved activations"] == 4 * 2 * 32 * 8 * 2
    assert (
        memory.stage_memory(run, model, 1, 8, 3)["saved activations"] == 1 * 2 * 32 * 8 * 2
    )  # the last hands each straight back
    # The fullest stage is reported: here the first, whose layer at work is more than the last's loss; with a
    # large vocabulary the last.
    assert memory.gpu_memory(run, model, 4) == memory.stage_memory(run, model, 1, 8, 0)
    large = replace(model, vocab_size=1000)
    assert memory.gpu_memory(run, large, 4) == memory.stage_memory(run, large, 1, 8, 3)
    # With fewer micro-batches than stages, no more than there are.
    few = replace(run, train=replace(run.train, global_batch=2))
    assert memory.stage_memory(few, model, 1, 2, 0)["saved activations"] == 2 * 2 * 32 * 8 * 2
    # Interleaved in two chunks: 2 x 3 + 4 + 1 forward passes of one layer each.
    interleaved = replace(run, parallel=Parallel(pp=4, vpp=2))
    assert memory.stage_memory(interleaved, model, 1, 8, 0)["saved activations"] == 11 * 1 * 32 * 8 * 2


def test_memory_refuses_what_does_not_divide():
    run = recipes.get("ultralong_1m")
    with pytest.raises(UserError, match="needs a multiple of 32 ranks, but 48 were started"):
        memory.gpu_memory(run, LLAMA_3_1_8B, 48)
    with pytest.raises(
        UserError,
        match=r"train.global_batch=8 is not a multiple of train.micro_batch=1 x 16 data parallel ranks",
    ):
        memory.gpu_memory(run, LLAMA_3_1_8B, 512)
    with pytest.raises(UserError, match=r"model.heads=9 is not divisible"):
        memory.gpu_memory(run, SMOLLM2_135M, 256)
