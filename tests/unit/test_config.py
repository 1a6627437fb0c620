"""Settings: what is refused when a run is built, and what `--set` understands."""

from __future__ import annotations

import re

import pytest

from megatron_ultralong import command_settings, config
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Data, Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import YaRN

TRAIN = Train(seq_length=64, iterations=10, lr=1e-3)
RUN = Run(name="x", train=TRAIN)
MODEL = {
    "hidden_size": 32,
    "ffn_size": 48,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Unknown keys and values.
        (
            ["train.sequence_length=1"],
            r"--set train.sequence_length: no such setting; did you mean train.seq_length\?",
        ),
        (["paralel.tp=2"], r"did you mean parallel.tp\?"),
        # Names of other trainers, and settings of another section.
        (["train.learning_rate=1"], r"did you mean train.lr\?"),
        (["lr=1"], r"did you mean train.lr\?"),
        (["optim.learning_rate=1"], r"did you mean train.lr\?"),
        (["rope.learning_rate=1"], r"did you mean rope.lr\?"),
        (["max_steps=1"], r"did you mean train.iterations\?"),
        (["model.num_key_value_heads=1"], r"did you mean model.kv_heads\?"),
        (["parallel.tensor-model-parallel-size=1"], r"did you mean parallel.tp\?"),
        (["train.weight_decay=1"], r"did you mean optim.weight_decay\?"),
        (["lr=1"], "--set lr: no such setting; did you mean"),
        (["train.lr"], "--set train.lr: expected key=value"),
        (
            ["train.seq_length=long"],
            "--set train.seq_length=long: expected a whole number, like 4096 or 128K",
        ),
        (["train.seq_length=1.5K"], "expected a whole number"),
        (["train.seq_length=-4"], "expected a whole number"),
        (["train.lr=fast"], "--set train.lr=fast: expected a number"),
        (["data.shuffle=maybe"], "--set data.shuffle=maybe: expected true or false"),
        (
            ["rope.type=pi"],
            "--set rope.type=pi: choose one of none, theta, linear, ntk, dynamic, llama3, yarn",
        ),
        (["runtime.device=tpu"], "choose one of auto, cuda, cpu"),
        (["model.layers=2"], "--set model.layers: recipe x takes its model from --load-hf or --load"),
        (["name=y"], "--set name: no such setting"),
        # Lengths and layouts.
        (
            ["train.seq_length=66", "parallel.cp=2"],
            "train.seq_length=66 is not divisible by 2 x parallel.cp = 4; the nearest that are: 64 and 68",
        ),
        (["train.seq_length=2", "parallel.cp=2"], "the nearest that are: 4"),
        (
            ["train.seq_length=66", "parallel.tp=4"],
            r"train.seq_length=66 over parallel.cp=1 is not divisible by parallel.tp=4 \(sequence parallelism\)",
        ),
        (["parallel.cp=2", "parallel.tp=3", "train.seq_length=64"], "is not divisible by parallel.tp=3"),
        (
            ["parallel.tp=3"],
            r"use another parallel.tp, like 2 \(it must also divide the model's heads\), or the nearest lengths",
        ),
        (["parallel.tp=0"], "parallel.tp=0 must be at least 1"),
        (["parallel.vpp=2"], "parallel.vpp=2 requires parallel.pp above 1"),
        (
            ["parallel.dp=3"],
            "train.global_batch=8 is not a multiple of train.micro_batch=1 x 3 data parallel ranks",
        ),
        (["train.micro_batch=3"], "train.global_batch=8 is not a multiple of train.micro_batch=3"),
        (
            ["parallel.pp=2", "parallel.vpp=2", "parallel.dp=8"],
            "1 micro-batches are not a multiple of parallel.pp=2",
        ),
        # Memory.
        (["memory.offload=on"], "--set memory.offload=on: choose one of off, layer_inputs, all, auto"),
        (
            ["memory.recompute=none", "memory.offload=all"],
            "memory.offload=all requires memory.recompute=all_but_attention, not none",
        ),
        # Schedule.
        (["train.iterations=0"], "train.iterations=0 must be at least 1"),
        (["train.warmup=10"], "train.warmup=10 must be below train.iterations=10"),
        (["train.min_lr=1"], "train.min_lr=1.0 is above train.lr=0.001"),
        (["train.lr=-1"], "train.lr=-1.0 must be 0 or more"),
        (["train.lr=nan"], "train.lr=nan must be 0 or more"),
        (["train.z_loss=inf"], "train.z_loss=inf must be 0 or more"),
        (["optim.beta1=2"], "optim.beta1=2.0 must be from 0 to below 1"),
        (["optim.beta2=nan"], "optim.beta2=nan must be from 0 to below 1"),
        (["optim.eps=0"], "optim.eps=0.0 must be a positive number"),
        (["optim.clip=-1"], "optim.clip=-1.0 must be 0 or more"),
        (["optim.weight_decay=nan"], "optim.weight_decay=nan must be 0 or more"),
        (["lora.rank=-1"], "expected a whole number"),
        (["lora.rank=8", "lora.alpha=0"], "lora.alpha=0.0 must be a positive number"),
        (
            ["lora.rank=8", "lora.targets=q_proj,lm_head"],
            "lora.targets=lm_head: choose one of q_proj, k_proj",
        ),
        (
            ["lora.rank=8", "lora.targets=q_proj,q_proj"],
            "lora.targets=q_proj,q_proj must name each linear once",
        ),
        (["lora.train_norms=true"], "lora.train_norms and lora.train_embeddings require lora.rank above 0"),
        (["lora.rank=8", "train.load_optimizer=true"], "with lora.rank only adapters have any"),
        (
            ["lora.rank=8", "rope.type=clex", "rope.theta=1e4", "rope.original_length=16"],
            "lora.rank=8 requires another rope.type than clex",
        ),
        (["runtime.timeout_minutes=0"], "runtime.timeout_minutes=0 must be at least 1"),
        *(
            (
                [f"runtime.profile={window}"],
                f"runtime.profile={window} must be FROM:TO, two iterations counted from 1",
            )
            for window in ("5", "0:3", "4:3", "-1:3", "a:b", "1:2:3", ":", "1.5:2")
        ),
        (
            ["runtime.profile=90000:90001"],
            "runtime.profile=90000:90001 begins after train.iterations=",
        ),
        # RoPE.
        (
            ["rope.factor=8"],
            "--set rope.factor: recipe x keeps the RoPE of the loaded model; set rope.type too",
        ),
        (
            ["rope.type=none", "rope.factor=8"],
            "rope.factor is a setting of rope.type=linear or ntk or .*; rope.type=none has theta, original_length",
        ),
        (
            ["rope.type=linear", "rope.ramp=dimension"],
            "rope.ramp is a setting of rope.type=yarn; rope.type=linear",
        ),
        (["rope.type=longrope"], "rope.type=longrope requires rope.factors, one per pair of head dimensions"),
        (
            ["rope.type=longrope", "rope.factors=1,two"],
            "--set rope.factors=1,two: expected numbers with commas",
        ),
        (["rope.type=longrope", "rope.factors=no.json"], "--set rope.factors=no.json: cannot read the file"),
        (["rope.type=longrope", "rope.factors=1,0"], "rope.factors: 0.0 must be a positive number"),
        (
            ["rope.type=longrope", "rope.factors=1,2", "rope.short_factors=1"],
            "rope.short_factors has 1 numbers, but rope.factors 2",
        ),
        (["rope.type=dynamic", "rope.factor=0.5"], "rope.factor=0.5 must be at least 1"),
        (["rope.type=yarn", "rope.factor=0.5"], "rope.factor=0.5 must be at least 1"),
        (["rope.type=yarn", "rope.factor=inf"], "rope.factor=inf must be at least 1"),
        (["rope.type=yarn", "rope.alpha=4"], "rope.alpha=4.0 must be positive and below rope.beta=4.0"),
        (["rope.type=yarn", "rope.theta=1"], "rope.theta=1.0 must be above 1"),
        (
            ["rope.type=llama3", "rope.temperature=true"],
            "rope.temperature is a setting of rope.type=yarn; rope.type=llama3 has",
        ),
        (
            ["rope.type=yarn", "rope.factor=2", "rope.original_length=16", "train.seq_length=64"],
            "train.seq_length=64 is longer than the 32 tokens that rope.type=yarn covers here; set rope.factor=4, or "
            "rope.allow_short=true",
        ),
        (
            ["rope.type=yarn", "rope.attention_factor=1.5"],
            "rope.attention_factor requires rope.temperature=true",
        ),
    ],
)
def test_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        override(RUN, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "model.heads=6 is not a multiple of model.kv_heads=4"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"layers": 0}, "model.layers=0 must be at least 1"),
    ],
)
def test_model_refused(change, message):
    with pytest.raises(UserError, match=message):
        Model(**{**MODEL, **change})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(tp=8), "model.heads=4 is not divisible by parallel.tp=8"),
        (Parallel(tp=4), "model.kv_heads=2 is not divisible by parallel.tp=4"),
        (Parallel(pp=3), "model.layers=4 is not divisible by parallel.pp x vpp = 3"),
        (Parallel(pp=2, vpp=4), "model.layers=4 is not divisible by parallel.pp x vpp = 8"),
    ],
)
def test_model_layout_refused(parallel, message):
    with pytest.raises(UserError, match=message):
        config.check_model_layout(Model(**MODEL), parallel)
    with pytest.raises(UserError, match=message):
        Run(name="x", model=Model(**MODEL), parallel=parallel, train=TRAIN)


def test_ranks():
    assert Parallel(tp=2, pp=2, cp=2).data_parallel(16) == 2
    with pytest.raises(
        UserError, match=r"parallel.tp=2 x pp=2 x cp=2 needs a multiple of 8 ranks, but 4 were started"
    ):
        Parallel(tp=2, pp=2, cp=2).data_parallel(4)
    with pytest.raises(UserError, match="needs a multiple of 8 ranks, but 12 were started"):
        Parallel(tp=2, pp=2, cp=2).data_parallel(12)
    with pytest.raises(UserError, match=r"x dp=3 needs 6 ranks, but 4 were started"):
        Parallel(tp=2, dp=3).data_parallel(4)


def test_settings_are_applied_at_once():
    # Each alone would be refused.
    run = override(
        RUN,
        [
            "rope.factor=8",
            "rope.type=yarn",
            "train.seq_length=4K",
            "train.iterations=1_000",
            "train.warmup=20",
        ],
    )
    # What is not set is that of the loaded model.
    assert run.rope == YaRN(factor=8.0, theta=None, original_length=None)
    assert (run.train.seq_length, run.train.iterations, run.train.warmup) == (4096, 1000, 20)
    assert RUN.train.seq_length == 64, "the recipe itself is not touched"


def test_values():
    run = override(
        RUN,
        [
            "train.seq_length=1M",
            "parallel.dp=none",
            "data.shuffle=no",
            "runtime.wandb=my project",
            "train.lr=3e-5",
            "train.seed = 7",
        ],
    )
    assert run.train.seq_length == 1024**2 and run.parallel.dp is None and run.data == Data(shuffle=False)
    assert run.runtime == Runtime(wandb="my project") and run.train.lr == 3e-5 and run.train.seed == 7
    assert override(run, ["parallel.dp=4", "runtime.wandb=none"]).parallel.dp == 4
    assert command_settings.parse_count("128k", "x") == 131072
    with pytest.raises(UserError, match="x=K: expected a whole number"):
        command_settings.parse_count("K", "x")


@pytest.mark.parametrize("recompute", ["none", "full", "all_but_attention"])
def test_offload_is_settled_later_unless_given(recompute):
    assert override(RUN, [f"memory.recompute={recompute}"]).memory.offload == "auto"


def test_settings_of_a_shape():
    run = Run(name="x", model=Model(**MODEL), train=TRAIN)
    assert override(run, ["model.vocab_size=128", "model.tied_embeddings=true"]).model == Model(
        **{**MODEL, "vocab_size": 128}, tied_embeddings=True
    )


def test_stored_run_reads_back():
    run = Run(
        name="x",
        notes="n",
        base="b",
        model=Model(**MODEL),
        rope=YaRN(factor=2),
        parallel=Parallel(cp=2),
        memory=Memory(loss_chunk=8),
        data=Data(workers=1),
        optim=Optim(clip=0.5),
        train=TRAIN,
        runtime=Runtime(device="cpu"),
    )
    assert config.from_dict(config.to_dict(run)) == run
    assert config.from_dict(config.to_dict(RUN)) == RUN
    with pytest.raises(UserError, match="stored run cannot be read by this version"):
        config.from_dict({**config.to_dict(run), "train": {**config.to_dict(run)["train"], "new_setting": 1}})


def test_micro_batches():
    run = override(RUN, ["train.global_batch=24", "train.micro_batch=2"])
    assert [run.micro_batches(dp) for dp in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(UserError, match="not a multiple of train.micro_batch=2 x 5 data parallel ranks"):
        run.micro_batches(5)


@pytest.mark.parametrize(
    "old, new",
    [
        ("memory.checkpoint=attention", "memory.recompute=all_but_attention"),
        ("memory.checkpoint=full", "memory.recompute=full"),
        ("memory.offload=checkpoints", "memory.offload=layer_inputs"),
        ("memory.offload=attention", "memory.offload=all"),
        ("parallel.cp_way=gather", "parallel.cp_comm_type=all_gather"),
        ("parallel.cp_way=ring", "parallel.cp_comm_type=p2p"),
    ],
)
def test_a_renamed_setting_is_answered_with_its_new_form(old, new):
    with pytest.raises(UserError, match=rf"^--set {re.escape(old)}: this setting is now {re.escape(new)}$"):
        override(RUN, [old])
    assert override(RUN, [new])


def test_a_run_stored_by_an_earlier_release_is_read():
    stored = config.to_dict(RUN)
    stored["memory"] = {
        "checkpoint": "attention",
        "offload": "checkpoints",
        "query_chunks": False,
        "layer_chunk": 1,
        "loss_chunk": 2,
    }
    stored["parallel"]["cp_way"] = stored["parallel"].pop("cp_comm_type") and "gather"
    run = config.from_dict(stored)
    assert run.memory == Memory(
        recompute="all_but_attention", offload="layer_inputs", layer_chunk=1, loss_chunk=2
    )
    assert run.parallel.cp_comm_type == "all_gather" and "cp_way" in stored["parallel"], (
        "the argument is not changed"
    )
