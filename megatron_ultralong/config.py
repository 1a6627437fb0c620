"""The settings of a run as frozen dataclasses: each field is documented with its unit, and combinations that
cannot work are refused when the run is built."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.families import OPTIONS, FamilyName, check_options
from megatron_ultralong.lora import Lora
from megatron_ultralong.rope.base import Rope, ScaledRope
from megatron_ultralong.rope.methods import from_values

OFFLOADED_LAYERS_ON_GPU = 2
"""Layers whose offloaded tensors are on the GPU at a time: one is copied while the next is computed."""

KEY_BLOCK = 65536
"""Keys, of those before a chunk of queries, whose gradients a kernel computes at a time where they are summed
outside the kernel: it allocates them in its own dtype, FlashAttention-2 even for each query head."""

AttentionBackend = Literal["auto", "cudnn", "flash", "flash3", "flash4"]
"""Attention kernels of a GPU: the best one known for it (auto), cuDNN, FlashAttention-2 of PyTorch, or
FlashAttention-3 or 4, which are packages of their own."""

LOSS_BLOCK = 2**25
"""Logits that the loss holds in float32 at a time (128 MiB), for any chunk size."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Shape of a model: a decoder with RMSNorm, grouped-query attention with RoPE, and a SwiGLU MLP."""

    hidden_size: int
    """Width of the residual stream."""
    ffn_size: int
    """Width of the SwiGLU MLP (after the gate)."""
    layers: int
    """Transformer layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; query heads must be a multiple of them."""
    head_dim: int
    """Dimensions of a head; even."""
    vocab_size: int
    """Rows of the Hugging Face model's embedding; padded internally to a multiple of the tensor parallel
    size."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool = False
    """The output layer uses the weights of the input embedding."""
    init_std: float = 0.02
    """Standard deviation of initial weights, for a model that is trained from scratch."""
    family: FamilyName = "llama"
    """The `model_type` of its config.json (families.py); it says which of the following options it can
    have."""
    qkv_bias: bool = False
    """Biases of the projections of queries, keys and values."""
    attention_output_bias: bool = False
    """Bias of the output projection of attention."""
    mlp_bias: bool = False
    """Biases of the MLP's projections."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, before RoPE."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size"):
            _positive(f"model.{name}", getattr(self, name))
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even for RoPE")
        if not 0 < self.norm_eps < math.inf:
            raise UserError(f"model.norm_eps={self.norm_eps} must be a positive number")
        _not_negative("model.init_std", self.init_std)
        check_options(self.family, {name: getattr(self, name) for name in OPTIONS})


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How model and sequence are split over ranks: world size = tp x pp x cp x dp."""

    tp: int = 1
    """Tensor parallel ranks; above 1, with sequence parallelism."""
    pp: int = 1
    """Pipeline parallel ranks."""
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved 1F1B when above 1)."""
    cp: int = 1
    """Context parallel ranks; each holds two zigzag chunks of every sequence, or of a row of several masked
    documents the tokens that context_parallel/placement.py gives it."""
    ulysses: int = 1
    """Adjacent context parallel ranks that exchange heads for tokens (all-to-all); cp / ulysses such groups
    form the ring."""
    cp_comm_type: Literal["p2p", "all_gather"] = "p2p"
    """Communication between those groups: p2p = keys and values rotate in a ring; all_gather = every rank
    gathers them, one head at a time. Without effect on rows of several masked documents."""
    dp: int | None = None
    """Data parallel ranks; None = the rest of the world size."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ulysses"):
            _positive(f"parallel.{name}", getattr(self, name))
        if self.cp % self.ulysses:
            raise UserError(f"parallel.cp={self.cp} is not divisible by parallel.ulysses={self.ulysses}")
        if self.dp is not None:
            _positive("parallel.dp", self.dp)
        if self.vpp > 1 and self.pp == 1:
            raise UserError(f"parallel.vpp={self.vpp} requires parallel.pp above 1")

    def ring_ranks_per_node(self, ranks_per_node: int) -> int:
        """Adjacent ranks of the ring between groups that exchange heads, in a node of so many ranks."""
        return max(1, ranks_per_node // (self.tp * self.ulysses))

    def data_parallel(self, world_size: int) -> int:
        """Data parallel size on `world_size` ranks. UserError where the layout does not divide it."""
        ranks = self.tp * self.pp * self.cp
        layout = f"parallel.tp={self.tp} x pp={self.pp} x cp={self.cp}"
        if world_size % ranks or world_size < ranks:
            raise UserError(
                f"{layout} needs a multiple of {ranks} ranks, but {world_size} were started; "
                "change torchrun's --nproc-per-node or the layout"
            )
        dp = world_size // ranks
        if self.dp is not None and self.dp != dp:
            raise UserError(
                f"{layout} x dp={self.dp} needs {ranks * self.dp} ranks, but {world_size} were started"
            )
        return dp


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is kept for the backward pass, and where."""

    recompute: Literal["none", "full", "all_but_attention"] = "all_but_attention"
    """none = keep every activation; full = keep each layer's input and recompute the layer; all_but_attention
    = also keep the attention output and its logsumexp, and recompute everything except attention."""
    offload: Literal["off", "layer_inputs", "all", "auto"] = "auto"
    """With recompute=all_but_attention, what is moved to host memory until the backward: off = nothing;
    layer_inputs = each layer's input; all = also the attention output and its logsumexp; auto = chosen at
    start, the first of these that fits the GPU (off on a CPU, or with another recompute)."""
    query_chunks: bool = False
    """With recompute=all_but_attention, process queries and attention outputs in chunks too: only a layer's
    keys and values exist for the full sequence, and offloaded tensors return chunk by chunk. For the longest
    sequences: keys rotate around the ring once per chunk, and are projected twice."""
    layer_chunk: int = 16384
    """Tokens per rank whose norms, projections and MLP are computed at a time, with
    recompute=all_but_attention and in passes without a backward; 0 = all."""
    loss_chunk: int = 8192
    """Tokens per rank whose output layer and loss are computed at a time; 0 = all."""

    def __post_init__(self) -> None:
        for name in ("layer_chunk", "loss_chunk"):
            if getattr(self, name) < 0:
                raise UserError(f"memory.{name}={getattr(self, name)} must be 0 or more")
        if self.offload in ("layer_inputs", "all") and self.recompute != "all_but_attention":
            raise UserError(
                f"memory.offload={self.offload} requires memory.recompute=all_but_attention, not {self.recompute}"
            )
        if self.query_chunks and self.recompute != "all_but_attention":
            raise UserError(
                f"memory.query_chunks=true requires memory.recompute=all_but_attention, not {self.recompute}"
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """How packed rows are read."""

    shuffle: bool = True
    """Shuffle the rows of each epoch by the run's seed; held-out rows are never shuffled."""
    workers: int = 0
    """Data loader processes per rank; 0 = a thread."""
    documents: Literal["joined", "masked"] = "joined"
    """joined = attention crosses the documents of a row (the paper); masked = it stays inside each document,
    and a document's first token is not a target."""
    positions: Literal["row", "document"] = "row"
    """With documents=masked: RoPE positions count from the start of the row, or of each document."""
    mix: Literal["rows", "iterations"] = "rows"
    """With several data sets: rows = each row comes from one of them, by weight; iterations = all rows of an
    iteration come from one of them, by weight."""
    allow_other_tokenizer: bool = False
    """Train on rows that were made with another tokenizer than the model's."""

    def __post_init__(self) -> None:
        if self.positions == "document" and self.documents != "masked":
            raise UserError("data.positions=document requires data.documents=masked")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with the distributed optimizer."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Not applied to norms (one-dimensional parameters)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must be from 0 to below 1")
        if not 0 < self.eps < math.inf:
            raise UserError(f"optim.eps={self.eps} must be a positive number")
        for name in ("weight_decay", "clip"):
            _not_negative(f"optim.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Sequence length, batch, schedule and checkpoints of a run."""

    seq_length: int
    """Tokens per sequence, S."""
    micro_batch: int = 1
    """Sequences per forward pass and data parallel rank."""
    global_batch: int = 8
    """Sequences per optimizer step, over all ranks."""
    iterations: int
    """Optimizer steps."""
    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine schedule."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine = falls from lr to min_lr at the last iteration; constant = stays at lr."""
    warmup: int = 0
    """Iterations of linear warm-up from 0."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 = bf16 weights and activations with fp32 master weights and gradients."""
    save_every: int = 100
    """Iterations between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Checkpoints kept; 0 = all."""
    async_save: bool = True
    """Write checkpoints while training goes on: an iteration waits only until weights and optimizer are
    copied to host memory. Without room for the copy there, and for the last checkpoint, training waits."""
    save_failures: int = 3
    """Saves in a row that may fail, because the disk is full for example, before the run ends. At the end of
    training, and when it is asked to stop, the first one ends it."""
    eval_every: int = 0
    """Iterations between evaluations on held-out data; 0 = only at the end."""
    eval_rows: int = 64
    """Held-out rows per evaluation (all if fewer)."""
    log_every: int = 1
    """Iterations between log lines."""
    load_optimizer: bool = False
    """With --load: start with the optimizer's moments of that checkpoint too. Iterations and schedule start
    anew."""
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a loss or gradient norm that is not finite, or a loss spike: stop = the run ends; skip =
    no update, and the next batch; rewind = back to the last good checkpoint, and the next batch. The bad
    batch is not used again."""
    max_bad_steps: int = 10
    """Bad iterations of the whole run after which it ends, with skip and rewind."""
    loss_spike: float = 0.0
    """A loss above this many times the median of the last 32 good iterations is bad too; 0 = off."""
    z_loss: float = 0.0
    """Weight of the squared logsumexp of the logits in what is minimised; 0 = off. It is logged as `z loss`;
    `lm loss`, in training and held-out, is the cross entropy alone."""
    seed: int = 1234
    """Of the order of rows, and of initial weights."""
    deterministic: bool = False
    """Bit-reproducible GPU kernels (slower); CPU runs are always reproducible."""

    def __post_init__(self) -> None:
        for name in (
            "seq_length",
            "micro_batch",
            "global_batch",
            "iterations",
            "log_every",
            "eval_rows",
            "save_failures",
            "max_bad_steps",
        ):
            _positive(f"train.{name}", getattr(self, name))
        for name in ("lr", "min_lr", "warmup", "save_every", "keep", "eval_every", "loss_spike", "z_loss"):
            _not_negative(f"train.{name}", getattr(self, name))
        if 0 < self.loss_spike <= 1:
            raise UserError(f"train.loss_spike={self.loss_spike} must be above 1, or 0 = off")
        if self.min_lr > self.lr:
            raise UserError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}")
        if self.warmup >= self.iterations and self.warmup:
            raise UserError(f"train.warmup={self.warmup} must be below train.iterations={self.iterations}")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, timeouts and logging."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto = cuda if available; the paper's recipes require cuda."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel on a GPU (docs/context_parallel.md): auto = FlashAttention-3 on Hopper if installed,
    otherwise cuDNN from Hopper on, FlashAttention-2 for what cuDNN cannot compute and on older GPUs."""
    timeout_minutes: int = 60
    """Minutes that a collective waits for other ranks before it fails."""
    hang_minutes: float = 5.0
    """Minutes without a sign of life of a rank, or without progress where an iteration usually takes less
    than a fifth of it, after which the run ends and names the rank; at most nine tenths of timeout_minutes. 0
    = off."""
    wandb: str | None = None
    """Weights & Biases project to log to, in addition to TensorBoard."""
    profile: str | None = None
    """FROM:TO = write a torch profiler trace of these iterations of rank 0 to SAVE/profile."""

    def __post_init__(self) -> None:
        _positive("runtime.timeout_minutes", self.timeout_minutes)
        if self.hang_minutes and not 0.1 <= self.hang_minutes < math.inf:
            raise UserError(f"runtime.hang_minutes={self.hang_minutes} must be 0 (off), or at least 0.1")
        self.profiled()

    def profiled(self) -> tuple[int, int] | None:
        """The first and the last iteration of `profile`. UserError where it is not FROM:TO."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(
                f"runtime.profile={self.profile} must be FROM:TO, two iterations counted from 1, like 10:12"
            )
        return int(first), int(last)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run: returned by a recipe, printed at start, stored in every checkpoint and export."""

    name: str
    notes: str = ""
    """Where the values come from, and which of them are this project's own choice."""
    unpublished: tuple[str, ...] = ()
    """Settings (`section.name`) that the recipe's source does not state: this project's own choice."""
    base: str = ""
    """Hugging Face name of the base model."""
    model: Model | None = None
    """Model to train from scratch; None = that of --load-hf or --load."""
    rope: Rope | None = None
    """None = that of the loaded model, extended only if it does not reach train.seq_length."""
    parallel: Parallel = field(default_factory=Parallel)
    memory: Memory = field(default_factory=Memory)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    lora: Lora = field(default_factory=Lora)
    train: Train
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        s, p = self.train.seq_length, self.parallel
        if self.model is not None:
            check_model_layout(self.model, p)
        if self.memory.query_chunks and (p.ulysses > 1 or p.cp_comm_type != "p2p"):
            raise UserError(
                "memory.query_chunks=true requires parallel.ulysses=1 and parallel.cp_comm_type=p2p"
            )
        if p.cp > 1 and s % (2 * p.cp):
            raise UserError(
                f"train.seq_length={s} is not divisible by 2 x parallel.cp = {2 * p.cp}; "
                f"the nearest that are: {_nearest(s, 2 * p.cp * p.tp)}"
            )
        if (s // p.cp) % p.tp:
            power = 1 << p.tp.bit_length() - 1
            other = f"another parallel.tp, like {math.gcd(s // p.cp, power)} (it must also divide the model's heads), or "
            other = "" if power == p.tp else other
            raise UserError(
                f"train.seq_length={s} over parallel.cp={p.cp} is not divisible by parallel.tp={p.tp} (sequence "
                f"parallelism); use {other}the nearest lengths that are: {_nearest(s, 2 * p.cp * p.tp)}"
            )
        if self.train.global_batch % self.train.micro_batch:
            raise UserError(
                f"train.global_batch={self.train.global_batch} is not a multiple of "
                f"train.micro_batch={self.train.micro_batch}"
            )
        profiled = self.runtime.profiled()
        if profiled is not None and profiled[0] > self.train.iterations:
            raise UserError(
                f"runtime.profile={self.runtime.profile} begins after train.iterations={self.train.iterations}"
            )
        if self.data.documents == "masked" and self.train.micro_batch != 1:
            raise UserError(
                f"data.documents=masked requires train.micro_batch=1, not {self.train.micro_batch}"
            )
        if self.rope is not None and self.rope.draws_positions and self.data.positions == "document":
            raise UserError(
                f"rope.type={self.rope.type} draws the positions of a row; set data.positions=row"
            )
        if p.dp is not None:
            self.micro_batches(p.dp)
        if self.lora.rank and self.rope is not None and self.rope.draws_positions:
            raise UserError(f"lora.rank={self.lora.rank} requires another rope.type than {self.rope.type}")
        if self.lora.rank and self.train.load_optimizer:
            raise UserError(
                "train.load_optimizer=true takes the moments of all weights; with lora.rank only adapters have any"
            )

    def micro_batches(self, dp: int) -> int:
        """Micro-batches per iteration on each of `dp` data parallel ranks. UserError where they do not
        divide."""
        t, p = self.train, self.parallel
        if t.global_batch % (t.micro_batch * dp):
            raise UserError(
                f"train.global_batch={t.global_batch} is not a multiple of train.micro_batch={t.micro_batch} "
                f"x {dp} data parallel ranks"
            )
        n = t.global_batch // (t.micro_batch * dp)
        if p.vpp > 1 and n % p.pp:
            raise UserError(
                f"interleaved pipeline: {n} micro-batches are not a multiple of parallel.pp={p.pp}; change train.global_batch"
            )
        return n


def check_reach(rope: Rope, covered: int | None, seq_length: int) -> None:
    """UserError where `rope` is not made for sequences of `seq_length` tokens, unless it says so itself.
    covered: tokens it is made for, None = any number."""
    if covered is not None and seq_length > covered and not rope.allow_short:
        factor = seq_length / (rope.original_length or covered)
        change = f"rope.factor={rope.possible_factor(factor) if isinstance(rope, ScaledRope) else factor:g}"
        if not isinstance(rope, ScaledRope):
            change = f"another rope.type, like yarn with {change}"
        raise UserError(
            f"train.seq_length={seq_length} is longer than the {covered} tokens that rope.type={rope.type} covers here; "
            f"set {change}{', or rope.allow_short=true to train beyond them' if rope.reaches_further else ''}"
        )


def check_model_layout(model: Model, parallel: Parallel) -> None:
    """UserError where `model` cannot be split as `parallel` says."""
    if model.heads % parallel.tp:
        raise UserError(f"model.heads={model.heads} is not divisible by parallel.tp={parallel.tp}")
    if model.kv_heads % parallel.tp:
        raise UserError(
            f"model.kv_heads={model.kv_heads} is not divisible by parallel.tp={parallel.tp}; "
            f"use a parallel.tp that divides it and more parallel.cp"
        )
    if model.ffn_size % parallel.tp:
        raise UserError(f"model.ffn_size={model.ffn_size} is not divisible by parallel.tp={parallel.tp}")
    if model.layers % (parallel.pp * parallel.vpp):
        raise UserError(
            f"model.layers={model.layers} is not divisible by parallel.pp x vpp = {parallel.pp * parallel.vpp}"
        )
    check_heads(model.heads // parallel.tp, model.kv_heads // parallel.tp, parallel.ulysses)


def check_heads(heads: int, kv_heads: int, ulysses: int) -> None:
    """UserError unless heads and kv_heads (of one tensor parallel rank) can be divided over `ulysses` ranks.

    `ulysses` must divide heads, and either divide kv_heads or be a multiple of it.
    """
    if not divides_heads(heads, kv_heads, ulysses):
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if divides_heads(heads, kv_heads, size))
        raise UserError(
            f"{heads} query heads and {kv_heads} KV heads per tensor parallel rank cannot be divided over "
            f"parallel.ulysses={ulysses} ranks; set parallel.ulysses to one of {sizes}"
        )


def divides_heads(heads: int, kv_heads: int, ulysses: int) -> bool:
    """The condition of `check_heads`."""
    return ulysses > 0 and heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)


# ---- settings of earlier releases --------------------------------------------------------------------

RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "memory.checkpoint": ("memory.recompute", {"attention": "all_but_attention"}),
    "memory.offload": ("memory.offload", {"checkpoints": "layer_inputs", "attention": "all"}),
    "parallel.cp_way": ("parallel.cp_comm_type", {"ring": "p2p", "gather": "all_gather"}),
}
"""Settings of earlier releases, in run.json of format 1 and on command lines: old name -> (new name, old
values -> new values)."""


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """A stored run with the settings of earlier releases renamed."""
    new = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for old, (now, renamed) in RENAMED.items():
        section, _, old_name = old.partition(".")
        name = now.partition(".")[2]
        settings = new.get(section)
        if isinstance(settings, dict) and old_name in settings:
            value = settings.pop(old_name)
            settings[name] = renamed.get(value, value)
    return new


# ---- runs as plain values ----------------------------------------------------------------------


def to_dict(run: Run) -> dict[str, Any]:
    """Return the run as the plain values that JSON has."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def from_dict(values: dict[str, Any]) -> Run:
    """Inverse of `to_dict`, also for runs of earlier releases. UserError for unknown keys."""
    values, kinds = _with_new_names(values), sections()
    try:
        rope = values.pop("rope", None)
        built: dict[str, Any] = {"rope": from_values(rope, ignore_others=True) if rope is not None else None}
        built |= {
            key: kinds[key](**value) if key in kinds and value is not None else value
            for key, value in values.items()
        }
        built["unpublished"] = tuple(built.get("unpublished", ()))
        return Run(**built)
    except TypeError as error:
        raise UserError(f"stored run cannot be read by this version: {error}") from None


def sections() -> dict[str, type]:
    """The dataclasses of a run's sections by name, but for rope, whose class `rope.type` selects."""
    return {
        "model": Model,
        "parallel": Parallel,
        "memory": Memory,
        "data": Data,
        "optim": Optim,
        "lora": Lora,
        "train": Train,
        "runtime": Runtime,
    }


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:  # nan too
        raise UserError(f"{name}={value} must be 0 or more")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1")


def _nearest(value: int, step: int) -> str:
    low = value // step * step
    return f"{low} and {low + step}" if low else str(step)
