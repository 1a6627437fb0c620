"""Recipes of other published long-context models, stage by stage, for comparison.

- ProLong (arXiv 2410.02660; princeton-nlp/ProLong at 907dcf4): Llama-3-8B-Instruct to 64K and 512K tokens,
  then instruction tuning at 64K. Its mixes of data are in examples/prolong_*.yaml.
- Gradient (cards of gradientai/Llama-3-8B-Instruct-Gradient-*): Llama-3-8B-Instruct in five stages to 4M
  tokens.

Both change RoPE's base instead of scaling frequencies. Each stage starts from the previous one by `--load`.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_ultralong.config import Data, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.rope.methods import ChangedBase

LLAMA_3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
_LAYOUT = ("parallel.tp", "parallel.cp")
_LLAMA_3_LENGTH = 8192


# ---- ProLong -----------------------------------------------------------------------------------


def prolong_64k() -> Run:
    """ProLong's first stage, from Llama-3-8B-Instruct; any multiple of 8 GPUs."""
    return _prolong(
        "64k",
        rope=_changed_base(8_000_000),
        train=_cosine(65536, global_batch=64, iterations=5000, lr=1e-5, warmup=500),
        notes="21.0B tokens of examples/prolong_64k.yaml.",
    )


def prolong_512k() -> Run:
    """ProLong's second stage, from `prolong_64k` with its optimizer; any multiple of 32 GPUs."""
    return _prolong(
        "512k",
        rope=_changed_base(128_000_000),
        train=_cosine(524288, global_batch=16, iterations=2500, lr=5e-6, warmup=250, load_optimizer=True),
        notes="21.0B tokens of examples/prolong_512k.yaml; --load CKPT of prolong_64k with its optimizer, and the "
        "schedule anew.",
        cp=4,
    )


def prolong_sft() -> Run:
    """ProLong's instruction tuning on UltraChat, from `prolong_512k`; any multiple of 8 GPUs."""
    return _prolong(
        "sft",
        rope=None,
        train=_cosine(65536, global_batch=64, iterations=250, lr=2e-5, warmup=12),
        notes="1.05B tokens of UltraChat with loss on the answers, averaged over tokens; RoPE is that of the loaded "
        "checkpoint. Warm-up is published as 5% of the iterations.",
    )


def _prolong(size: str, *, rope: ChangedBase | None, train: Train, notes: str, cp: int = 1) -> Run:
    return Run(
        name=f"prolong_{size}",
        notes=f"ProLong, arXiv 2410.02660 and its code: {notes}",
        unpublished=(*_LAYOUT, "train.seed"),
        base=LLAMA_3_8B,
        rope=rope,
        parallel=Parallel(tp=8, cp=cp),
        data=Data(documents="masked"),
        optim=Optim(beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0),
        train=train,
        runtime=Runtime(device="cuda"),
    )


def _cosine(
    seq_length: int,
    *,
    global_batch: int,
    iterations: int,
    lr: float,
    warmup: int,
    load_optimizer: bool = False,
) -> Train:
    """ProLong's schedule: cosine to a tenth of the learning rate."""
    return Train(
        seq_length=seq_length,
        global_batch=global_batch,
        iterations=iterations,
        lr=lr,
        min_lr=lr / 10,
        warmup=warmup,
        load_optimizer=load_optimizer,
        save_every=125,
    )


# ---- Gradient ----------------------------------------------------------------------------------


def gradient_65k() -> Run:
    """Gradient's first stage, from Llama-3-8B-Instruct; any multiple of 8 GPUs."""
    return _gradient("65k", 65536, theta=15.3e6, global_batch=32, iterations=30)


def gradient_262k() -> Run:
    """Gradient's second stage, from `gradient_65k`; any multiple of 16 GPUs."""
    return _gradient("262k", 262144, theta=207.1e6, global_batch=16, iterations=24, cp=2)


def gradient_524k() -> Run:
    """Gradient's third stage, from `gradient_262k`; any multiple of 32 GPUs."""
    return _gradient("524k", 524288, theta=1.06e9, global_batch=16, iterations=50, cp=4)


def gradient_1048k() -> Run:
    """Gradient's fourth stage, from `gradient_524k`; any multiple of 32 GPUs."""
    return _gradient(
        "1048k",
        1048576,
        theta=3_580_165_449.0,
        global_batch=16,
        iterations=50,
        cp=4,
        note="theta is that of the released config.json; the card says 2.80B. ",
    )


def gradient_4194k() -> Run:
    """Gradient's last stage, from `gradient_1048k`; any multiple of 128 GPUs."""
    return _gradient(
        "4194k",
        4194304,
        theta=45.2e9,
        global_batch=4,
        iterations=12,
        cp=16,
        note="the published run was stopped early at this number of iterations. ",
    )


def _gradient(
    size: str,
    seq_length: int,
    *,
    theta: float,
    global_batch: int,
    iterations: int,
    cp: int = 1,
    note: str = "",
) -> Run:
    return Run(
        name=f"gradient_{size}",
        notes=f"Gradient's model cards: {note}length, theta, sequences and iterations, learning rate; SlimPajama "
        "stretched to the length. Schedule, optimizer and masking are not stated.",
        unpublished=(
            *_LAYOUT,
            "train.schedule",
            "train.warmup",
            "optim.beta1",
            "optim.beta2",
            "optim.weight_decay",
            "optim.clip",
            "data.documents",
            "train.seed",
        ),
        base=LLAMA_3_8B,
        rope=_changed_base(theta),
        parallel=Parallel(tp=8, cp=cp),
        train=Train(
            seq_length=seq_length,
            global_batch=global_batch,
            iterations=iterations,
            lr=2e-5,
            schedule="constant",
            save_every=iterations // 2,
        ),
        runtime=Runtime(device="cuda"),
    )


def _changed_base(theta: float) -> ChangedBase:
    return ChangedBase(theta=float(theta), original_length=_LLAMA_3_LENGTH)


RECIPES: tuple[Callable[[], Run], ...] = (
    prolong_64k,
    prolong_512k,
    prolong_sft,
    gradient_65k,
    gradient_262k,
    gradient_524k,
    gradient_1048k,
    gradient_4194k,
)
