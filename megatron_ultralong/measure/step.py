"""Forward and backward of a slice of a Llama on one device under every memory setting, beside what
planning/memory.py says it holds.

One rank, one sequence of S tokens, embedding and loss included: weights and their gradients in the precision
of the run. Where asked for, an optimizer step follows whose state lies in host memory: then it is a whole
training step. What is measured is time, and the memory beyond weights and gradients, which is what sets the
longest sequence.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ultralong.config import Memory, Model, Parallel, Rope, Run, Runtime, Train
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import report as reports
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.report import Column, Report
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.planning.flops import FORMULA, flops_per_token, peak_flops

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
"""Rows by name. The last is torch.autograd.graph.save_on_cpu around the layers without checkpoints, for
comparison."""
STATIC = ("weights", "gradients (fp32)", "optimizer (fp32)")
"""Parts of a plan that do not grow with the sequence."""
WARM_UP = 256
"""Tokens of the step that loads kernels before the first that counts."""

COLUMNS = (
    Column(key="tokens", title="tokens", show=reports.tokens),
    Column(
        key="seconds",
        title="s/step",
        show=reports.milliseconds,
        meaning="forward and backward, and the optimizer where it is asked for",
    ),
    Column(
        key="optimizer_seconds",
        title="of which optimizer",
        show=reports.milliseconds,
        meaning="AdamW on the host, copies included",
    ),
    Column(key="tokens_per_second", title="tokens/s", show=reports.number),
    Column(key="mfu", title="causal MFU", show=reports.share, meaning=FORMULA),
    Column(
        key="peak_bytes",
        title="peak",
        show=reports.bytes_,
        meaning="weights, gradients and all else on the device",
    ),
    Column(
        key="bytes_per_token",
        title="B/token",
        show=reports.number,
        meaning="peak beyond weights and gradients, over the tokens",
    ),
    Column(
        key="host_bytes", title="host", show=reports.bytes_, meaning="memory of the host that offloading took"
    ),
    Column(
        key="planned_bytes",
        title="planned",
        show=reports.bytes_,
        meaning="planning/memory.py's sum of all but weights, gradients and optimizer",
    ),
    Column(key="measured_over_planned", title="measured/planned", show=reports.ratio),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: Model
    lengths: Sequence[int]
    """S of each row; with `longest` the first is where the search starts."""
    settings: Sequence[str]
    """Names in `SETTINGS`."""
    precision: str
    layer_chunk: int
    loss_chunk: int
    repeats: int = 10
    optimizer: bool = False
    """An AdamW step after each backward, its float32 weights and moments in host memory."""
    longest: bool = False
    """Look for the longest sequence of which one step completes."""
    granularity: int = 4096
    """Tokens up to which `longest` is exact."""
    limit: int | None = None
    """Bytes of the device that may be used; None = all."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.settings if name not in SETTINGS]
        if unknown:
            raise UserError(f"--settings {unknown[0]}: choose from {', '.join(SETTINGS)}")
        for name, value in [("lengths", length) for length in self.lengths] + [
            ("granularity", self.granularity),
            ("repeats", self.repeats),
        ]:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} must be at least 1")


def slice_of(layers: int, gpu: bool) -> Model:
    """`layers` of Llama-3.1-8B with its embedding and output layer; of a small model on a CPU."""
    if gpu:
        return Model(
            hidden_size=4096,
            ffn_size=14336,
            layers=layers,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab_size=128256,
        )
    return Model(
        hidden_size=64, ffn_size=128, layers=layers, heads=4, kv_heads=2, head_dim=16, vocab_size=256
    )


def run(
    settings: Settings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure all rows; `progress` is told each before it starts. It starts, and ends, torch.distributed with
    one rank."""
    if settings.longest and device.type == "cpu" and settings.limit is None:
        raise UserError(
            "--longest on a CPU needs --limit, like 1G: a CPU does not say when its memory is used up"
        )
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("tools/benchmark.py runs in one process: start it without torchrun")
    m = settings.model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]
    report = Report(
        kind="longest step" if settings.longest else "step",
        columns=COLUMNS,
        bars=("tokens", "bytes_per_token")
        if settings.longest
        else ("tokens_per_second", "bytes_per_token", "measured_over_planned"),
        about=reports.about(
            device,
            command,
            kernel=kernels.choose(device, dtype, m.head_dim),
            dtype=settings.precision,
            shape=f"{m.layers} layers, hidden {m.hidden_size}, MLP {m.ffn_size}, {m.heads} query and {m.kv_heads} KV heads of {m.head_dim}, "
            f"vocabulary {m.vocab_size}, {settings.precision}",
            layer_chunk=settings.layer_chunk,
            loss_chunk=settings.loss_chunk,
            repeats=settings.repeats,
            limit=settings.limit,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    try:
        with _limited(settings.limit, device):
            for name in settings.settings:
                if settings.longest:
                    progress(f"longest, {name}")
                    report.rows.append(_longest(name, settings, ranks))
                    continue
                for length in settings.lengths:
                    progress(f"{name}, {reports.tokens(length)}")
                    row, note = _try(name, length, settings, ranks, settings.repeats)
                    report.rows.append(
                        _row(f"{name}, {reports.tokens(length)}", name)
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
    name: str, length: int, settings: Settings, ranks: Any, repeats: int
) -> tuple[dict[str, Any] | None, str]:
    """(figures, "") of one setting and length, or (None, why there are none)."""
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
    timing.release()  # the graph of a step that failed lets go of what it kept
    for store in stores:
        store.close()
    return row, note


def _measured(
    name: str, length: int, settings: Settings, ranks: Any, repeats: int, stores: list[Any]
) -> dict[str, Any]:
    """`stores` is given the host's buffers, to be closed by the caller."""
    from megatron_ultralong.model import llama

    model, device = settings.model, ranks.device
    memory = replace(SETTINGS[name], layer_chunk=settings.layer_chunk, loss_chunk=settings.loss_chunk)
    (chunk,) = llama.build(model, Rope(), ranks, Parallel(), memory, settings.precision)
    store = llama.unwrap(chunk).store
    stores.append(store)
    parameters = list(chunk.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, model.init_std)
    away = name == "save-on-cpu"

    adam = _HostAdam(parameters, device) if settings.optimizer else None

    def step(tokens: int = length, update: bool = True) -> None:
        row = torch.randint(model.vocab_size, (1, tokens + 1), device=device)
        with (
            torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
            if away
            else contextlib.nullcontext()
        ):
            loss = chunk(row[:, :-1], row[:, 1:], torch.ones(1, tokens, device=device))
        loss.backward()
        if adam is not None and update:
            adam.step()

    step(min(WARM_UP, length))  # now every weight has its gradient
    store.close()  # its host memory is not of this length
    static = timing.size(*parameters, *(x.grad for x in parameters if x.grad is not None))
    if device.type == "cuda":
        with timing.peak(device) as peak:
            seconds = _seconds(step, device, repeats, lambda: store.bytes)
        host = store.bytes
    else:
        seconds = _seconds(step, device, repeats, lambda: store.bytes)
        host = store.bytes  # filled already, so no part of the peak
        step(max(1, length // 2))  # another table of RoPE, so that this length's is
        with timing.peak(device) as peak:
            step(update=False)  # its tensors are the host's, and that is the device here
        if settings.limit is not None and static + peak.bytes > settings.limit:
            raise torch.OutOfMemoryError("beyond --limit")
    found: dict[str, Any] = {
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": static + peak.bytes,
        "bytes_per_token": peak.bytes / length,
        "host_bytes": None if away else host,
    }
    if adam is not None:
        found["optimizer_seconds"] = statistics.median(adam.seconds[1:])  # the first makes the moments
    peak_rate = peak_flops(device)
    if peak_rate is not None:
        found["mfu"] = flops_per_token(model, length) * length / seconds / peak_rate
    if away and device.type == "cpu":
        found["note"] = "on a CPU nothing moves"
    if not away:
        found["planned_bytes"] = planned(model, memory, length, settings.precision)
        found["measured_over_planned"] = peak.bytes / found["planned_bytes"]
    return found


class _HostAdam:
    """AdamW of weights on a device: gradients are copied to pinned host memory, float32 weights and both
    moments live there, and the new weights are copied back. `seconds` of each step."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()
        self._weights = list(parameters)
        self._pinned = [
            torch.empty(p.shape, dtype=p.dtype, pin_memory=device.type == "cuda") for p in parameters
        ]
        # One optimizer a weight: of gradients in float32 there is then never more than one weight's.
        self._masters = [p.detach().float().cpu().clone().requires_grad_() for p in parameters]
        self._adams = [torch.optim.AdamW([master], lr=1e-5, fused=True) for master in self._masters]

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights and set their gradients to zero."""
        timing.synchronize(self.device)
        start = time.perf_counter()
        for weight, pinned in zip(self._weights, self._pinned, strict=True):
            assert weight.grad is not None
            pinned.copy_(weight.grad, non_blocking=True)
            weight.grad.zero_()
        timing.synchronize(self.device)
        for weight, pinned, master, adam in zip(
            self._weights, self._pinned, self._masters, self._adams, strict=True
        ):
            master.grad = pinned.float()
            adam.step()
            master.grad = None
            weight.copy_(pinned.copy_(master), non_blocking=True)
        timing.synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)


def _seconds(step: Callable[[], None], device: torch.device, repeats: int, host: Callable[[], int]) -> float:
    """Median time of a step; of the first where it is slow, or the only one wanted, and took no host memory
    anew (page-locking is slow)."""
    first = timing.once(step, device)
    if (first > timing.SLOW or repeats == 1) and not host():
        return first
    return timing.seconds(step, device, repeats, warm_up=0)


def _longest(name: str, settings: Settings, ranks: Any) -> dict[str, Any]:
    """Doubles the sequence until a step fails, then halves the gap down to the granularity."""
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
    ended = f"{reports.tokens(bad)}: {note}"
    return _row(f"longest, {name}", name) | (best or {}) | {"note": ended, "fails_at": bad}


def planned(model: Model, memory: Memory, length: int, precision: str) -> int:
    """Bytes that planning/memory.py counts for one rank and sequence, without those that do not grow with it."""
    train = Train(
        seq_length=length,
        global_batch=1,
        iterations=1,
        lr=1e-5,
        precision="bf16" if precision == "bf16" else "fp32",
    )
    parts = plan.memory(Run(name="benchmark", model=model, memory=memory, train=train), model, 1)
    return plan.total({part: size for part, size in parts.items() if part not in STATIC})


@contextlib.contextmanager
def _limited(limit: int | None, device: torch.device) -> Iterator[None]:
    """At most `limit` bytes of a GPU for torch's allocator."""
    if limit is None or device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    if limit > whole:
        raise UserError(f"--limit {limit} is more than the {whole} bytes of this GPU")
    torch.cuda.set_per_process_memory_fraction(limit / whole, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
