"""Speed of complete training steps of a model, beside plain transformers.

Forward, backward, gradient clipping and AdamW of one sequence of S tokens, from the same weights, on the same
tokens, in the same precision; both start a step in turn, so that what else the machine does slows down both.
Without recompute, and with it: here everything but attention, in transformers gradient checkpointing. The
losses of every step must agree.

In bf16 both keep float32 weights for the optimizer: here Megatron's, in transformers a float32 model under
autocast, as its Trainer does.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.config import Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.bytes_moved import BytesMoved
from megatron_ultralong.measure.number_format import (
    byte_count,
    integer,
    ratio,
    scientific,
    three_digits,
    token_count,
)
from megatron_ultralong.measure.report import ReportColumn, SpeedReport, about
from megatron_ultralong.measure.step import model_text
from megatron_ultralong.model import elementwise, spec, weight_mapping
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.shapes import SMOLLM2_135M
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.step import Trainer, forward_backward

RECOMPUTE = {"none": "none", "recompute": "all_but_attention"}
"""Settings by name, and memory.recompute of each."""
LEARNING_RATE = 1e-5
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Of two losses, relative."""
Step = Callable[[Tensor], float]
"""A training step on a row of S + 1 tokens [1, S + 1]; returns its loss."""

COLUMNS = (
    ReportColumn("tokens", "tokens", token_count),
    ReportColumn("seconds", "s/step", three_digits, "forward, backward, gradient clipping and AdamW"),
    ReportColumn("tokens_per_second", "tokens/s", integer, higher_is_better=True),
    ReportColumn("ratio", "ratio", ratio, "speed relative to transformers: median over pairs of steps", True),
    ReportColumn(
        "bytes_moved",
        "moved/token",
        byte_count,
        "read and written by operations other than matrix products and attention, per token of a step",
    ),
    ReportColumn("loss", "loss", three_digits, "of the first step"),
    ReportColumn("loss_difference", "difference", scientific, "of the losses, largest relative of all steps"),
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What is measured."""

    hf: Path | None
    """A Hugging Face directory; None = random weights of `model` and `rope`."""
    model: Model
    rope: Rope
    lengths: Sequence[int]
    """S of each pair of rows."""
    settings: Sequence[str]
    """Names in `RECOMPUTE`."""
    precision: str
    layer_chunk: int
    loss_chunk: int
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in self.settings:
            if name not in RECOMPUTE:
                raise UserError(f"--settings {name}: choose from {', '.join(RECOMPUTE)}")
        for name, value in [("lengths", n) for n in self.lengths] + [("repeats", self.repeats)]:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")


def shape_of(hf: Path | None, layers: int | None) -> tuple[Model, Rope]:
    """Return shape and RoPE of a Hugging Face directory, or of SmolLM2-135M; layers: only so many (None =
    all), with random weights."""
    if hf is not None:
        if layers is not None:
            raise UserError("--layers applies to random weights: leave out --model")
        config = hf_config.read_config(hf)
        return config.model, config.rope
    rope = Unscaled(theta=100000.0, original_length=8192)
    return replace(SMOLLM2_135M, layers=layers or SMOLLM2_135M.layers), rope


def run(
    settings: TrainSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each pair before it starts.

    Starts and ends torch.distributed with one rank. UserError where the losses differ.
    """
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("`ultralong benchmark` runs in one process: start it without torchrun")
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    dtype = timing.DTYPES[settings.precision]
    use_te = device.type == "cuda" and spec.have_transformer_engine()
    chosen = elementwise.chosen_operations(device, dtype, use_te)
    report = SpeedReport(
        kind="train",
        columns=COLUMNS,
        bars=("tokens_per_second", "ratio"),
        about=about(
            device,
            command,
            kernel=kernels.choose(device, dtype, settings.model.head_dim),
            dtype=settings.precision,
            shape=f"{model_text(settings.model)}, {settings.precision}",
            operations="; ".join(f"{name}: {what}" for name, what in chosen.items()),
            transformers=_transformers_version(),
            layer_chunk=settings.layer_chunk,
            loss_chunk=settings.loss_chunk,
            repeats=settings.repeats,
        ),
    )
    try:
        for length in settings.lengths:
            for name in settings.settings:
                title = f"{name}, {token_count(length)}"
                progress(title)
                report.rows += _pair(title, name, length, settings, ranks)
                timing.free_memory()
    finally:
        launch.stop()
    return report


# ---- rows --------------------------------------------------------------------------------------


def _pair(
    title: str, name: str, length: int, settings: TrainSettings, ranks: Any
) -> Iterator[dict[str, Any]]:
    """The rows of this project and of transformers for one setting and length, measured in turns."""
    theirs = _plain_model(settings, length, ranks.device)
    steps = {
        "ours": _our_step(name, length, settings, ranks, theirs.state_dict()),
        "transformers": _plain_step(theirs, name, settings),
    }
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    losses: dict[str, list[float]] = {who: [] for who in steps}
    moved: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(2 + settings.repeats):
        row = torch.randint(settings.model.vocab_size, (1, length + 1), generator=generator).to(ranks.device)
        for who, step in steps.items():
            with BytesMoved() if number == 1 else contextlib.nullcontext() as counted:
                time, loss = _timed(step, row)
            losses[who].append(loss)
            if counted is not None:
                moved[who] = counted.total / length
            if number > 1:  # the first step loaded kernels and allocated the moments
                seconds[who].append(time)
    pairs = list(zip(losses["ours"], losses["transformers"], strict=True))
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    if not difference <= LARGEST_DIFFERENCE[settings.precision]:
        raise UserError(f"{title}: the losses of this project and transformers differ: {pairs}")
    for who in steps:
        median = statistics.median(seconds[who])
        yield {
            "name": f"{who}, {title}",
            "setting": name,
            "ours": who == "ours",
            "tokens": length,
            "seconds": median,
            "tokens_per_second": length / median,
            "ratio": statistics.median(
                b / a for a, b in zip(seconds[who], seconds["transformers"], strict=True)
            ),
            "bytes_moved": moved[who],
            "loss": losses[who][0],
            "loss_difference": difference,
        }


def _timed(step: Step, row: Tensor) -> tuple[float, float]:
    """Return (seconds, loss) of a step."""
    losses: list[float] = []
    return timing.run_seconds(lambda: losses.append(step(row)), row.device), losses[0]


def _our_step(
    name: str, length: int, settings: TrainSettings, ranks: Any, weights: dict[str, Tensor]
) -> Step:
    """A step as the training loop runs it (train/loop.py), from Hugging Face `weights`."""
    from megatron_ultralong.model import llama

    train = Train(
        seq_length=length,
        global_batch=1,
        iterations=1,
        lr=LEARNING_RATE,
        precision="bf16" if settings.precision == "bf16" else "fp32",
    )
    memory = Memory(
        recompute=RECOMPUTE[name],  # type: ignore[arg-type]
        offload="off",
        layer_chunk=settings.layer_chunk,
        loss_chunk=settings.loss_chunk,
    )
    run = Run(name="benchmark", model=settings.model, rope=settings.rope, memory=memory, train=train)
    chunks = llama.build(settings.model, settings.rope, ranks, run.parallel, memory, settings.precision)
    with torch.no_grad():
        for parameter_name, parameter in llama.named_parameters(chunks[0]).items():
            parameter.copy_(weight_mapping.split(parameter_name, weights, settings.model, 0, 1))
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, train, ranks)
    optim.set_hyperparameters(optimizer, train.lr, run.optim)
    trainer = Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer)

    def step(row: Tensor) -> float:
        mask = torch.ones(1, length, device=row.device)
        batch: Any = {"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": mask}
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(trainer, [iter([batch])], 1)
        optimizer.step()
        return float(sums.loss / sums.tokens)

    return step


# ---- transformers ------------------------------------------------------------------------------


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _plain_model(settings: TrainSettings, length: int, device: torch.device) -> Any:
    """transformers' model in float32, with PyTorch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if settings.hf is not None:
        model = LlamaForCausalLM.from_pretrained(
            settings.hf, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    else:
        torch.manual_seed(0)
        limit = max(length, settings.rope.original() or 0)
        values = hf_config.export_config(settings.model, settings.rope, limit, torch.float32)
        model = LlamaForCausalLM(LlamaConfig(**values, attn_implementation="sdpa"))
    return model.to(device).train()


def _plain_step(model: Any, name: str, settings: TrainSettings) -> Step:
    if name == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hyper = Optim()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": hyper.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (hyper.beta1, hyper.beta2)
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=hyper.eps, fused=True)

    def step(row: Tensor) -> float:
        adam.zero_grad()
        with torch.autocast(row.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            ids, labels = row[:, :-1], row[:, 1:]
            loss = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.clip)
        adam.step()
        return float(loss.detach())

    return step
