"""The paper's recipe applied to other models, and schemes of mixed lengths applied to its model. Length,
RoPE, layout and learning rate are this project's own choice; no trained model has confirmed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_ultralong.config import Data, Memory, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.rope.methods import YaRN

_UNPUBLISHED = (
    "train.seq_length",
    "train.iterations",
    "train.global_batch",
    "train.lr",
    "train.schedule",
    "train.warmup",
    "train.min_lr",
    "train.seed",
    "parallel.tp",
    "parallel.cp",
    "optim.beta1",
    "optim.beta2",
    "optim.weight_decay",
    "optim.clip",
)


def qwen3_8b_1m() -> Run:
    """Qwen3-8B to 1M tokens; any multiple of 32 GPUs."""
    return _extended(
        "qwen3_8b_1m",
        base="Qwen/Qwen3-8B",
        # The card states 32,768 tokens of pre-training, and YaRN over that length; max_position_embeddings is
        # larger by the room for an answer.
        rope=paper_yarn(32, theta=1_000_000.0, original_length=32768),
        parallel=Parallel(tp=8, cp=4),
        train=_pretraining(1024**2, global_batch=8, lr=3e-5),
    )


def llama3_70b_512k() -> Run:
    """Llama-3.3-70B-Instruct to 512K tokens; any multiple of 128 GPUs."""
    return _extended(
        "llama3_70b_512k",
        base="meta-llama/Llama-3.3-70B-Instruct",
        rope=paper_yarn(64, theta=500_000.0, original_length=8192),
        # CP instead of PP: no pipeline bubble, and the optimizer is divided over it.
        parallel=Parallel(tp=8, cp=16),
        # Half of the 8B's learning rate, as in Llama 3's own pre-training (arXiv 2407.21783, table 3).
        train=_pretraining(512 * 1024, global_batch=16, lr=1.5e-5),
    )


def nemotron_super_mix() -> Run:
    """Iterations of long and of short documents in turn; any multiple of 32 GPUs."""
    return _mixed(
        "nemotron_super_mix",
        "the last phase of Nemotron 3 Super alternates sequences of 1M and of 4K tokens: --data 1 LONG 1 SHORT",
    )


def nemotron_ultra_mix() -> Run:
    """92% of the iterations on long documents, 8% on short ones; any multiple of 32 GPUs."""
    return _mixed(
        "nemotron_ultra_mix",
        "Nemotron 3 Ultra trains 92% of its iterations at 1M and 8% at 4K tokens: --data 0.92 LONG 0.08 SHORT",
    )


def _mixed(name: str, scheme: str) -> Run:
    """A scheme of mixed lengths. Its rows all have 1M tokens: of one long document, or of 256 of 4K."""
    return Run(
        name=name,
        notes=f"A scheme of NVIDIA-NeMo/Nemotron at e27b371 applied to Llama-3.1-8B-Instruct, no reproduction: {scheme}, "
        "rows of 1M tokens both, SHORT with documents of up to 4K tokens; constant learning rate and no warm-up are "
        "published. Everything else is that of ultralong_1m or this project's own.",
        unpublished=(*_UNPUBLISHED, "data.documents"),
        base="meta-llama/Llama-3.1-8B-Instruct",
        rope=paper_yarn(128, theta=500_000.0, original_length=8192),
        parallel=Parallel(tp=8, cp=4),
        memory=Memory(recompute="all_but_attention"),
        data=Data(documents="masked", mix="iterations"),
        optim=Optim(beta1=0.9, beta2=0.95),
        train=replace(
            _pretraining(1024**2, global_batch=8, lr=3e-5), schedule="constant", warmup=0, min_lr=3e-5
        ),
        runtime=Runtime(device="cuda"),
    )


def _extended(name: str, *, base: str, rope: YaRN, parallel: Parallel, train: Train) -> Run:
    return Run(
        name=name,
        notes=f"The recipe of arXiv 2504.06214 (YaRN without temperature, one step, 1B tokens) for {base}, which "
        f"the paper does not train: factor {rope.factor:g} over {rope.original_length} positions, layout, learning "
        "rate, batch, schedule, weight decay, clipping and seed are this project's own.",
        unpublished=_UNPUBLISHED,
        base=base,
        rope=rope,
        parallel=parallel,
        memory=Memory(recompute="all_but_attention"),
        optim=Optim(beta1=0.9, beta2=0.95),
        train=train,
        runtime=Runtime(device="cuda"),
    )


def paper_yarn(factor: int, *, theta: float, original_length: int) -> YaRN:
    """The paper's YaRN: ramp over rotations, no temperature; `factor` replaces the base model's own."""
    return YaRN(
        theta=theta,
        factor=float(factor),
        original_length=original_length,
        alpha=1.0,
        beta=4.0,
        ramp="rotation",
        temperature=False,
    )


def _pretraining(seq_length: int, *, global_batch: int, lr: float) -> Train:
    """1B tokens in steps of 8M."""
    return Train(
        seq_length=seq_length,
        global_batch=global_batch,
        iterations=125,
        lr=lr,
        min_lr=lr / 10,
        warmup=5,
        save_every=25,
    )


RECIPES: tuple[Callable[[], Run], ...] = (
    qwen3_8b_1m,
    llama3_70b_512k,
    nemotron_super_mix,
    nemotron_ultra_mix,
)
