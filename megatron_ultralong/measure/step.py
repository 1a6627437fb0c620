"""Speed and memory of a training step of some Llama layers on one device, under every memory setting.

One rank, one sequence of S tokens, forward and backward with embedding and loss; weights and their gradients
in the precision of the run. With `optimizer`, an AdamW step with its state in host memory follows. Measured
are the time and the memory beyond weights and gradients, which limits the sequence length; the latter is
shown next to the estimate of planning/memory.py.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ultralong.config import Data, Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.host_adam import HostAdam
from megatron_ultralong.measure.number_format import (
    byte_count,
    integer,
    percent,
    ratio,
    three_digits,
    token_count,
)
from megatron_ultralong.measure.report import RecordRow, ReportColumn, SpeedReport, about
from megatron_ultralong.planning import memory as planned_memory
from megatron_ultralong.planning.flops import FORMULA, flops_per_token, peak_flops
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.shapes import LLAMA_3_1_8B

SETTINGS = {
    "none": Memory(recompute="none", offload="off"),
    "full": Memory(recompute="full", offload="off"),
    "all-but-attention": Memory(recompute="all_but_attention", offload="off"),
    "offload-layer-inputs": Memory(recompute="all_but_attention", offload="layer_inputs"),
    "offload-all": Memory(recompute="all_but_attention", offload="all"),
    "query-chunks": Memory(recompute="all_but_attention", offload="off", query_chunks=True),
    "query-chunks-offload": Memory(recompute="all_but_attention", offload="all", query_chunks=True),
    "save-on-cpu": Memory(recompute="none", offload="off"),
}
"""Memory settings by name. For comparison, the last one is torch.autograd.graph.save_on_cpu around layers
without recompute."""
RENAMED = {
    "attention": "all-but-attention",
    "offload-checkpoints": "offload-layer-inputs",
    "offload-attention": "offload-all",
}
"""Names of settings in earlier releases, and what they are called now."""
CONSTANT_PARTS = ("weights", "gradients (fp32)", "optimizer (fp32)")
"""Parts of planning/memory.py that do not grow with the sequence."""
WARM_UP = 256
"""Tokens of a first step that loads kernels and is not measured."""

COLUMNS = (
    ReportColumn("tokens", "tokens", token_count),
    ReportColumn(
        "seconds", "s/step", three_digits, "forward and backward, and the optimizer with --optimizer"
    ),
    ReportColumn(
        "optimizer_seconds", "of which optimizer", three_digits, "AdamW on the host, copies included"
    ),
    ReportColumn("tokens_per_second", "tokens/s", integer, higher_is_better=True),
    ReportColumn("mfu", "causal MFU", percent, FORMULA),
    ReportColumn(
        "peak_bytes", "peak", byte_count, "all memory on the device, weights and gradients included"
    ),
    ReportColumn(
        "bytes_per_token",
        "B/token",
        integer,
        "peak beyond weights and gradients, divided by the tokens",
        higher_is_better=False,
    ),
    ReportColumn("host_bytes", "host", byte_count, "host memory used by offloading"),
    ReportColumn(
        "planned_bytes",
        "planned",
        byte_count,
        "estimate of planning/memory.py, without weights, gradients and optimizer",
    ),
    ReportColumn(
        "measured_over_planned", "measured/planned", ratio, "of the bytes beyond weights and gradients"
    ),
)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What is measured."""

    model: Model
    lengths: Sequence[int]
    """S of each row; with `longest` the search starts at the first."""
    settings: Sequence[str]
    """Names in `SETTINGS`."""
    precision: str
    layer_chunk: int
    loss_chunk: int
    repeats: int = 10
    optimizer: bool = False
    """Add an AdamW step after each backward, with float32 weights and moments in host memory."""
    longest: bool = False
    """Search for the longest sequence for which one step completes."""
    granularity: int = 4096
    """Resolution of `longest`, tokens."""
    limit: int | None = None
    """Bytes of device memory that may be used; None = all."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.settings if name not in SETTINGS]
        for name in unknown:
            if name in RENAMED:
                raise UserError(f"--settings {name}: this setting is now called {RENAMED[name]}")
        if unknown:
            raise UserError(f"--settings {unknown[0]}: choose from {', '.join(SETTINGS)}")
        for name, value in [("lengths", length) for length in self.lengths] + [
            ("granularity", self.granularity),
            ("repeats", self.repeats),
        ]:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--max-memory {self.limit} must be at least 1")


def slice_of(layers: int, gpu: bool) -> Model:
    """Return a model of `layers` layers in the shape of Llama-3.1-8B, or of a small model on a CPU."""
    if gpu:
        return replace(LLAMA_3_1_8B, layers=layers)
    return Model(
        hidden_size=64, ffn_size=128, layers=layers, heads=4, kv_heads=2, head_dim=16, vocab_size=256
    )


def model_text(model: Model) -> str:
    """Return the shape of a model in words."""
    return (
        f"{model.layers} layers, hidden {model.hidden_size}, MLP {model.ffn_size}, {model.heads} query and "
        f"{model.kv_heads} KV heads of {model.head_dim}, vocabulary {model.vocab_size}"
    )


def run(
    settings: StepSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
    record: RecordRow = lambda row: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each before it starts, `record` with each row
    as soon as it is measured.

    Starts and ends torch.distributed with one rank.
    """
    if settings.longest and device.type == "cpu" and settings.limit is None:
        raise UserError(
            "--longest on a CPU needs --max-memory, like 1G: a CPU does not report that its memory is exhausted"
        )
    from megatron_ultralong.model import kernel_choices
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("`ultralong benchmark` runs in one process: start it without torchrun")
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    choices = kernel_choices.apply(device, settings.model, settings.precision)
    dtype = timing.DTYPES[settings.precision]
    report = SpeedReport(
        kind="longest step" if settings.longest else "step",
        columns=COLUMNS,
        record=record,
        bars=("tokens", "bytes_per_token")
        if settings.longest
        else ("tokens_per_second", "bytes_per_token", "measured_over_planned"),
        about=about(
            device,
            command,
            kernel=kernels.choose(device, dtype, settings.model.head_dim),
            **choices,
            dtype=settings.precision,
            shape=f"{model_text(settings.model)}, {settings.precision}",
            layer_chunk=settings.layer_chunk,
            loss_chunk=settings.loss_chunk,
            repeats=settings.repeats,
            limit=settings.limit,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    try:
        with _limited(settings.limit, device):
            for name in settings.settings:
                if settings.longest:
                    progress(f"longest, {name}")
                    report.add(_longest(name, settings, ranks))
                    continue
                for length in settings.lengths:
                    progress(f"{name}, {token_count(length)}")
                    row, note = _try(name, length, settings, ranks, settings.repeats)
                    report.add(
                        _row(f"{name}, {token_count(length)}", name)
                        | {"tokens": length}
                        | (row or {"note": note})
                    )
    finally:
        launch.stop()
    return report


# ---- rows --------------------------------------------------------------------------------------


def _row(title: str, name: str) -> dict[str, Any]:
    return {"name": title, "setting": name, "ours": name not in ("none", "full", "save-on-cpu")}


def _try(
    name: str, length: int, settings: StepSettings, ranks: Any, repeats: int
) -> tuple[dict[str, Any] | None, str]:
    """(figures, "") of one setting and length, or (None, why it failed)."""
    stores: list[Any] = []
    row, note = None, ""
    try:
        row = _measured(name, length, settings, ranks, repeats, stores)
    except UserError as error:  # the host's memory
        note = str(error)
    except RuntimeError as error:
        if not timing.is_out_of_memory(error):
            raise
        note = "out of memory"
    timing.free_memory()  # frees what the graph of a failed step still holds
    for store in stores:
        store.close()
    return row, note


def _measured(
    name: str, length: int, settings: StepSettings, ranks: Any, repeats: int, stores: list[Any]
) -> dict[str, Any]:
    """Figures of one setting and length. Host buffers are appended to `stores`; the caller closes them."""
    from megatron_ultralong.model import llama

    model, device = settings.model, ranks.device
    memory = replace(SETTINGS[name], layer_chunk=settings.layer_chunk, loss_chunk=settings.loss_chunk)
    (chunk,) = llama.build(model, Unscaled(), ranks, Parallel(), memory, settings.precision)
    store = llama.unwrap(chunk).store
    stores.append(store)
    parameters = list(chunk.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, model.init_std)
    save_on_cpu = name == "save-on-cpu"

    adam = HostAdam(parameters, device) if settings.optimizer else None

    def step(tokens: int = length, update: bool = True) -> None:
        row = torch.randint(model.vocab_size, (1, tokens + 1), device=device)
        with (
            torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
            if save_on_cpu
            else contextlib.nullcontext()
        ):
            loss = chunk(row[:, :-1], row[:, 1:], torch.ones(1, tokens, device=device))
        loss.backward()
        if adam is not None and update:
            adam.step()

    step(min(WARM_UP, length))  # now every weight has a gradient
    store.close()  # its host buffers have the size of another length
    static = timing.tensor_bytes(*parameters, *(x.grad for x in parameters if x.grad is not None))
    if device.type == "cuda":
        with timing.peak_memory(device) as peak:
            seconds = _seconds(step, device, repeats, lambda: store.bytes)
        host = store.bytes
    else:
        seconds = _seconds(step, device, repeats, lambda: store.bytes)
        host = store.bytes  # allocated already, so not part of the peak
        step(max(1, length // 2))  # caches another RoPE table, so that this length's is counted
        with timing.peak_memory(device) as peak:
            step(update=False)  # the optimizer's tensors are in host memory, which is the device here
        if settings.limit is not None and static + peak.bytes > settings.limit:
            raise torch.OutOfMemoryError("beyond --max-memory")
    figures: dict[str, Any] = {
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": static + peak.bytes,
        "bytes_per_token": peak.bytes / length,
        "host_bytes": None if save_on_cpu else host,
    }
    if adam is not None:
        figures["optimizer_seconds"] = statistics.median(
            adam.seconds[1:]
        )  # the first one allocates the moments
    peak_rate = peak_flops(device)
    if peak_rate is not None:
        figures["mfu"] = flops_per_token(model, length) * length / seconds / peak_rate
    if save_on_cpu and device.type == "cpu":
        figures["note"] = "on a CPU nothing is copied"
    if not save_on_cpu:
        figures["planned_bytes"] = planned_bytes(
            model,
            memory,
            length,
            settings.precision,
            kernels.choose(device, timing.DTYPES[settings.precision], model.head_dim),
        )
        figures["measured_over_planned"] = peak.bytes / figures["planned_bytes"]
    return figures


def _seconds(step: Callable[[], None], device: torch.device, repeats: int, host: Callable[[], int]) -> float:
    """Median time of a step.

    The first step counts only if it is slow or the only one, and allocated no host memory (page-locking is
    slow).
    """
    first = timing.run_seconds(step, device)
    if (first > timing.SLOW or repeats == 1) and not host():
        return first
    return timing.median_seconds(step, device, repeats, warm_up=0)


def _longest(name: str, settings: StepSettings, ranks: Any) -> dict[str, Any]:
    """Double the sequence until a step fails, then bisect down to the granularity."""
    best: dict[str, Any] | None = None
    note = ""
    length, good, bad = settings.lengths[0], 0, 0
    while not bad or bad - good > settings.granularity:
        row, why = _try(name, length, settings, ranks, 1)
        if row is None:
            bad, note = length, why
        else:
            good, best = length, row | {"tokens": length}
        middle = (good + bad) // 2
        length = max(1, middle // settings.granularity * settings.granularity) if bad else 2 * length
        if bad and not good < length < bad:
            break
    ended = f"{token_count(bad)}: {note}"
    return _row(f"longest, {name}", name) | (best or {}) | {"note": ended, "fails_at": bad}


def planned_bytes(
    model: Model, memory: Memory, length: int, precision: str, backend: Backend, masked: bool = False
) -> int:
    """Return the bytes planning/memory.py estimates for one rank and sequence, without `CONSTANT_PARTS`.

    masked: attention stays inside documents.
    """
    train = Train(
        seq_length=length,
        global_batch=1,
        iterations=1,
        lr=1e-5,
        precision="bf16" if precision == "bf16" else "fp32",
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    data = Data(documents="masked" if masked else "joined")
    run = Run(name="benchmark", model=model, memory=memory, train=train, data=data)
    parts = planned_memory.gpu_memory(run, model, 1, backend)
    return planned_memory.total({part: size for part, size in parts.items() if part not in CONSTANT_PARTS})


@contextlib.contextmanager
def _limited(limit: int | None, device: torch.device) -> Iterator[None]:
    """Limit torch's allocator to `limit` bytes of a GPU."""
    if limit is None or device.type != "cuda":
        yield
        return
    capacity = torch.cuda.get_device_properties(device).total_memory
    if limit > capacity:
        raise UserError(f"--max-memory {limit} is more than the {capacity} bytes of this GPU")
    torch.cuda.set_per_process_memory_fraction(limit / capacity, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
