"""Recipes: functions that return a complete run. `--set` changes a setting of a run; a new recipe is a new
function here.

The values of `ultralong_*` are those of "From 128K to 4M: Efficient Training of Ultra-Long Context LLMs"
(arXiv 2504.06214); each recipe's `notes` say which values are published, which are second-hand and which are
this project's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from megatron_ultralong import family_recipes, peer_recipes, recipe_file
from megatron_ultralong.config import Data, Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import text_table
from megatron_ultralong.rope.methods import Unscaled, YaRN

# ---- laptop ------------------------------------------------------------------------------------


def tiny() -> Run:
    """A model of under a million parameters from scratch, context 512: minutes on a laptop."""
    return Run(
        name="tiny",
        notes="A toy model from scratch; every figure is this project's own choice.",
        # Larger initial weights than a large model's: at 0.02 a model this narrow would spend hundreds of
        # steps growing them.
        model=Model(
            hidden_size=128,
            ffn_size=256,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=32,
            vocab_size=1024,
            tied_embeddings=True,
            init_std=0.08,
        ),
        rope=Unscaled(theta=10000.0, original_length=512),
        memory=Memory(recompute="none"),
        optim=Optim(weight_decay=0.01),
        train=Train(
            seq_length=512,
            global_batch=16,
            iterations=500,
            lr=3e-3,
            min_lr=1e-4,
            warmup=25,
            precision="fp32",
            save_every=0,
            log_every=10,
        ),
    )


def tiny_extend() -> Run:
    """The model of `tiny`, or another of context 512, extended to 4,096 tokens on two context parallel
    ranks."""
    return Run(
        name="tiny_extend",
        notes="A toy extension by 8; every figure is this project's own choice.",
        # Unlike the paper: with temperature, so small a model retrieves keys at eight times its length almost
        # at once.
        rope=YaRN(theta=10000.0, factor=8.0, original_length=512, ramp="dimension", temperature=True),
        parallel=Parallel(cp=2),
        memory=Memory(recompute="none"),
        optim=Optim(weight_decay=0.01),
        train=Train(
            seq_length=4096,
            global_batch=4,
            iterations=60,
            lr=1e-3,
            min_lr=1e-4,
            warmup=5,
            precision="fp32",
            save_every=0,
            log_every=5,
        ),
    )


def tiny_extend_sft() -> Run:
    """Instruction tuning after `tiny_extend`, on examples under 512 tokens; RoPE is that of the loaded
    checkpoint."""
    return Run(
        name="tiny_extend_sft",
        notes="Toy instruction tuning; every figure is this project's own choice.",
        memory=Memory(recompute="none"),
        data=Data(documents="masked"),
        optim=Optim(weight_decay=0.01),
        train=Train(
            seq_length=512,
            global_batch=16,
            iterations=60,
            lr=5e-4,
            warmup=5,
            precision="fp32",
            save_every=0,
            log_every=10,
        ),
    )


# ---- one node ----------------------------------------------------------------------------------


def smollm2_135m() -> Run:
    """SmolLM2-135M-Instruct from 8K to 64K tokens. One GPU or one node; on a CPU with a shorter
    `train.seq_length`."""
    return Run(
        name="smollm2_135m",
        notes="SmolLM2 from 8K to 64K with the paper's YaRN and learning rate; every other figure is this project's own choice.",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        rope=family_recipes.paper_yarn(8, theta=100000.0, original_length=8192),
        train=Train(
            seq_length=65536, global_batch=8, iterations=200, lr=3e-5, min_lr=3e-6, warmup=10, save_every=50
        ),
    )


# ---- the paper ---------------------------------------------------------------------------------


def ultralong_1m() -> Run:
    """Llama-3.1-8B-Instruct to 1M tokens; 256 H100 in the paper, any multiple of 32 GPUs here."""
    return _ultralong(
        "1m",
        factor=128,
        cp=4,
        train=_pretraining(1024**2, global_batch=8, iterations=125),
        batch_note="125 iterations of 8 sequences are unverified",
        unpublished=("train.iterations", "train.global_batch"),
    )


def ultralong_2m() -> Run:
    """Llama-3.1-8B-Instruct to 2M tokens; 256 H100 in the paper, any multiple of 128 GPUs here."""
    return _ultralong(
        "2m",
        factor=256,
        cp=16,
        train=_pretraining(2 * 1024**2, global_batch=4, iterations=125),
        batch_note="iterations and global batch are this project's own (1B tokens, as published)",
        unpublished=("train.iterations", "train.global_batch"),
    )


def ultralong_4m() -> Run:
    """Llama-3.1-8B-Instruct to 4M tokens; 256 H100 in the paper, any multiple of 128 GPUs here."""
    return _ultralong(
        "4m",
        factor=512,
        cp=16,
        train=_pretraining(4 * 1024**2, global_batch=2, iterations=150),
        batch_note="150 iterations of 2 sequences as on the released model's card",
    )


def ultralong_1m_sft() -> Run:
    """Instruction tuning after `ultralong_1m`; any multiple of 8 GPUs."""
    return _ultralong_sft("1m")


def ultralong_2m_sft() -> Run:
    """Instruction tuning after `ultralong_2m`; any multiple of 8 GPUs."""
    return _ultralong_sft("2m")


def ultralong_4m_sft() -> Run:
    """Instruction tuning after `ultralong_4m`; any multiple of 8 GPUs."""
    return _ultralong_sft("4m")


def ultralong_1m_constant() -> Run:
    """`ultralong_1m` with a constant learning rate."""
    return _constant(ultralong_1m())


def ultralong_2m_constant() -> Run:
    """`ultralong_2m` with a constant learning rate."""
    return _constant(ultralong_2m())


def ultralong_4m_constant() -> Run:
    """`ultralong_4m` with a constant learning rate."""
    return _constant(ultralong_4m())


def _constant(run: Run) -> Run:
    """The variant with a constant learning rate and no warm-up, as NVIDIA's later extensions to 1M use it
    (Nemotron 3); the paper does not publish its schedule."""
    return replace(
        run,
        name=f"{run.name}_constant",
        notes=f"{run.notes} Constant learning rate without warm-up, as in NVIDIA's later extensions (Nemotron 3).",
        train=replace(run.train, schedule="constant", warmup=0, min_lr=0.0),
    )


_UNPUBLISHED = (
    "train.schedule",
    "train.warmup",
    "train.min_lr",
    "optim.weight_decay",
    "optim.clip",
    "train.seed",
)


def _ultralong(
    size: str, *, factor: int, cp: int, train: Train, batch_note: str, unpublished: tuple[str, ...] = ()
) -> Run:
    dp = 256 // (8 * cp)
    return Run(
        name=f"ultralong_{size}",
        notes=f"arXiv 2504.06214: length, YaRN factor {factor} over 8192 positions with alpha 1 and beta 4, learning "
        "rate, one step of one epoch are published; "
        f"256 GPUs as TP 8 x CP {cp} (data parallel {dp}) and AdamW's betas are second-hand; {batch_note}; "
        "schedule, warm-up, weight decay, clipping and seed are this project's own.",
        unpublished=(*_UNPUBLISHED, *unpublished),
        base="meta-llama/Llama-3.1-8B-Instruct",
        rope=family_recipes.paper_yarn(factor, theta=500000.0, original_length=8192),
        parallel=Parallel(tp=8, cp=cp),
        memory=Memory(recompute="all_but_attention"),
        optim=Optim(beta1=0.9, beta2=0.95),
        train=train,
        runtime=Runtime(device="cuda"),
    )


def _pretraining(seq_length: int, *, global_batch: int, iterations: int) -> Train:
    return Train(
        seq_length=seq_length,
        global_batch=global_batch,
        iterations=iterations,
        lr=3e-5,
        min_lr=3e-6,
        warmup=5,
        save_every=25,
    )


def _ultralong_sft(size: str) -> Run:
    """100K examples under 8K tokens. RoPE is that of the loaded checkpoint: instruction tuning must not
    rescale it."""
    return Run(
        name=f"ultralong_{size}_sft",
        notes="arXiv 2504.06214: learning rate 5e-6, global batch 128 and 100K examples under 8K tokens are published; "
        "one epoch of them, one example a row (782 iterations; prepare_data.py sft --fit single), TP 8, AdamW's "
        "betas, schedule, warm-up, weight decay, clipping and seed are this project's own. Attention stays inside "
        "documents, so packed rows work too, with fewer rows a step and iterations.",
        unpublished=(
            "train.iterations",
            "data.documents",
            "parallel.tp",
            "optim.beta1",
            "optim.beta2",
            *_UNPUBLISHED,
        ),
        parallel=Parallel(tp=8),
        memory=Memory(recompute="all_but_attention"),
        data=Data(documents="masked"),
        optim=Optim(beta1=0.9, beta2=0.95),
        train=Train(seq_length=8192, global_batch=128, iterations=782, lr=5e-6, warmup=24, save_every=200),
        runtime=Runtime(device="cuda"),
    )


# ---- by name -----------------------------------------------------------------------------------

RECIPES: tuple[Callable[[], Run], ...] = (
    tiny,
    tiny_extend,
    tiny_extend_sft,
    smollm2_135m,
    ultralong_1m,
    ultralong_2m,
    ultralong_4m,
    ultralong_1m_sft,
    ultralong_2m_sft,
    ultralong_4m_sft,
    ultralong_1m_constant,
    ultralong_2m_constant,
    ultralong_4m_constant,
    *family_recipes.RECIPES,
    *peer_recipes.RECIPES,
)


STAGES: dict[str, tuple[str, ...]] = {
    "tiny_stages": ("tiny", "tiny_extend"),
    "ultralong_1m_stages": ("ultralong_1m", "ultralong_1m_sft"),
    "ultralong_2m_stages": ("ultralong_2m", "ultralong_2m_sft"),
    "ultralong_4m_stages": ("ultralong_4m", "ultralong_4m_sft"),
    "prolong": ("prolong_64k", "prolong_512k", "prolong_sft"),
    "gradient": ("gradient_65k", "gradient_262k", "gradient_524k", "gradient_1048k", "gradient_4194k"),
}
"""Recipes that are trained one after the other, each from the one before."""


def stages(name: str) -> tuple[Run, ...]:
    """The runs of a name given to --recipe: several for one of `STAGES`, otherwise one. UserError as in
    `get`."""
    return tuple(get(stage) for stage in STAGES.get(name, (name,)))


def names() -> list[str]:
    """The names of the recipes, as given to --recipe."""
    return [recipe.__name__ for recipe in RECIPES]


def listed() -> list[str]:
    """The lines of a table: each recipe's name and the first sentence of its description; then those of
    several stages."""
    about = {recipe.__name__: " ".join((recipe.__doc__ or "").split()) for recipe in RECIPES}
    about = {name: text.partition(". ")[0].removesuffix(".") for name, text in about.items()}
    about |= {name: f"the stages {', '.join(of)}" for name, of in STAGES.items()}
    return text_table.described(about)


def is_recipe(name: str) -> bool:
    """Whether `get` or `stages` knows `name`."""
    return name in names() or name in STAGES or recipe_file.is_file(name)


def get(name: str) -> Run:
    """Return the run named `name`, or that of a user's own FILE.py (recipe_file.py). UserError for an unknown
    name, with the nearest one."""
    if recipe_file.is_file(name):
        return recipe_file.load(name)
    for recipe in RECIPES:
        if recipe.__name__ == name:
            return recipe()
    if name in STAGES:
        raise UserError(f"--recipe {name} has several stages; give one of them: {', '.join(STAGES[name])}")
    known = [*names(), *STAGES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise UserError(f"--recipe {name}: no such recipe; did you mean {near}? All: {', '.join(known)}")
