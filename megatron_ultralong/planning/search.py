"""Search for a layout: estimate every layout and memory mode, rank those that fit, explain why the others do
not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from megatron_ultralong.config import Model, Run
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import layouts, memory, time
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.flops import flops_per_token
from megatron_ultralong.planning.hardware import Machine

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated memory and time of one layout with one memory mode."""

    run: Run
    """With the layout and memory mode."""
    dp: int
    memory: dict[str, int]
    """Bytes by part on a GPU of the fullest pipeline stage."""
    host: dict[str, int]
    """Bytes by part of a node's pinned host memory."""
    work: dict[str, float]
    """FLOPs and bytes by part of one GPU per iteration."""
    time: dict[str, float]
    """Seconds of an iteration by part."""
    tokens_per_second: float
    """Per GPU."""
    mfu: float
    """Causal MFU by the formula of planning/flops.py, against the bf16 peak. With masked documents, attention
    counts with the mean document length."""
    problem: str | None
    """What does not fit, why, and what would help; None if everything fits."""

    @property
    def seconds(self) -> float:
        return sum(self.time.values())


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Result of a search over layouts and memory modes."""

    best: list[Estimate]
    """Those that fit, fastest first, one per layout."""
    closest: Estimate | None
    """Of those that do not fit, the one that needs least memory."""
    faster: Estimate | None
    """Of those that do not fit and would be faster than the best, the one that needs least memory."""
    tried: int
    """Combinations of layout and memory mode that were estimated."""
    fitting: int
    """Of these, those that fit."""


def estimate(run: Run, model: Model, machine: Machine) -> Estimate:
    """Estimate `run`, with its layout and memory mode, on `machine`. Raises UserError if it cannot be split
    this way."""
    dp = run.parallel.data_parallel(machine.gpus)
    gpu = memory.gpu_memory(run, model, machine.gpus, machine.gpu.backend)
    per_gpu = memory.host_memory(run, model, machine.gpus)
    host = {name: machine.gpus_per_node * size for name, size in per_gpu.items()}
    seconds = time.iteration_time(run, model, machine)
    tokens_per_second = run.train.global_batch * run.train.seq_length / sum(seconds.values()) / machine.gpus
    span = time.attention_span(run, machine.documents)
    return Estimate(
        run=run,
        dp=dp,
        memory=gpu,
        host=host,
        work=_work_per_iteration(run, model, dp, machine.documents),
        time=seconds,
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops_per_token(model, span, frozen=run.lora.rank > 0) / machine.gpu.bf16,
        problem=_problem(gpu, host, run, machine),
    )


def search(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> SearchResult:
    """Estimate every layout of `machine` in every memory mode.

    The settings named in `fixed` stay as they are in `run`. Raises UserError if no layout divides.
    """
    estimates: list[Estimate] = []
    for layout in layouts.layouts(run, model, machine.gpus, fixed):
        tried = [
            estimate(mode, model, machine)
            for candidate in layouts.with_ulysses(layout, model, fixed)
            for mode in memory.memory_modes(candidate, fixed)
        ]
        estimates += tried
        if all(e.problem is not None for e in tried):
            chunked = layouts.with_query_chunks(layout, fixed)
            if chunked is not None:
                estimates += [estimate(mode, model, machine) for mode in memory.memory_modes(chunked, fixed)]
    if not estimates:
        raise UserError(_no_layout(run, model, machine.gpus, fixed))
    # Of equally fast ones, prefer less host memory, then less GPU memory.
    fitting = sorted(
        (e for e in estimates if e.problem is None),
        key=lambda e: (e.seconds, memory.total(e.host), memory.total(e.memory)),
    )
    best: dict[Any, Estimate] = {}
    for e in fitting:
        best.setdefault(replace(e.run.parallel, ulysses=1), e)
    others = [e for e in estimates if e.problem is not None]
    return SearchResult(
        best=list(best.values()),
        closest=min(others, key=lambda e: (memory.total(e.memory), memory.total(e.host)), default=None),
        faster=min(
            (e for e in others if fitting and e.seconds < fitting[0].seconds),
            key=lambda e: memory.total(e.memory),
            default=None,
        ),
        tried=len(estimates),
        fitting=len(fitting),
    )


def as_settings(new: Estimate, base: Run, given: list[str], *, complete: bool) -> list[str]:
    """Return the `--set` values that turn `base` into the run of `new`; those `given` come first.

    complete: include sequence length and batch sizes, so that the settings apply to any recipe.
    """
    p = new.run.parallel
    values: dict[str, Any] = {
        "parallel.tp": p.tp,
        "parallel.pp": p.pp,
        "parallel.cp": p.cp,
        "memory.recompute": new.run.memory.recompute,
        "memory.offload": new.run.memory.offload,
    }
    if p.vpp != 1 or base.parallel.vpp != 1:
        values["parallel.vpp"] = p.vpp
    if p.ulysses != 1 or base.parallel.ulysses != 1:
        values["parallel.ulysses"] = p.ulysses
    if p.cp_comm_type != base.parallel.cp_comm_type:
        values["parallel.cp_comm_type"] = p.cp_comm_type
    if new.run.memory.query_chunks != base.memory.query_chunks:
        values["memory.query_chunks"] = str(new.run.memory.query_chunks).lower()
    if base.parallel.dp is not None:
        values["parallel.dp"] = new.dp
    if complete:
        values = {
            "train.seq_length": _short_count(new.run.train.seq_length),
            "train.micro_batch": new.run.train.micro_batch,
            "train.global_batch": new.run.train.global_batch,
            **values,
        }
    return [setting for setting in given if setting.partition("=")[0].strip() not in values] + [
        f"{key}={value}" for key, value in values.items()
    ]


def _short_count(number: int) -> str:
    """1048576 -> 1M."""
    for letter, scale in (("M", 1024**2), ("K", 1024)):
        if number % scale == 0:
            return f"{number // scale}{letter}"
    return str(number)


def more_gpus(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> int | None:
    """Double the number of GPUs until a layout fits, up to 64 times as many; return that number or None."""
    for gpus in (machine.gpus * 2**i for i in range(1, 7)):
        if _any_fits(run, model, replace(machine, gpus=gpus), fixed):
            return gpus
    return None


def shorter_sequence(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> int | None:
    """Halve the sequence length until a layout fits, down to 1024 tokens; return that length or None."""
    length = run.train.seq_length // 2
    while length >= 1024:
        # Keep the tokens per batch: with fewer sequences than replicas no layout would divide.
        batch = run.train.global_batch * run.train.seq_length // length
        try:
            half = replace(run, train=replace(run.train, seq_length=length, global_batch=batch))
        except UserError:
            return None
        if _any_fits(half, model, machine, fixed):
            return length
        length //= 2
    return None


def _any_fits(run: Run, model: Model, machine: Machine, fixed: Collection[str]) -> bool:
    try:
        return search(run, model, machine, fixed).fitting > 0
    except UserError:
        return False


def _work_per_iteration(
    run: Run, model: Model, dp: int, documents: DocumentLengths | None
) -> dict[str, float]:
    """FLOPs and bytes by part of a GPU of the slowest stage in one iteration."""
    one, n = time.workload(run, model, documents=documents), run.micro_batches(dp)
    forwards = 2 if one.recompute_attention else 1
    return {
        "attention FLOPs": n * (1 + time.BACKWARD) * one.attention,
        "other FLOPs": n * (3 * one.products + one.output),
        "recompute FLOPs": n * (one.recompute_attention + one.recompute_products),
        "CP ring bytes": n * (forwards * one.ring_forward + one.ring_backward),
        "CP all-to-all bytes": n * (forwards * one.exchange_forward + one.exchange_backward),
        "TP bytes": n * one.tensor,
        "pipeline bytes": n * one.pipeline,
        "DP bytes": time.gradient_bytes(run, model, dp),
        "host bytes, both ways": n * (2 * one.host + one.host_again),
    }


# ---- what does not fit -------------------------------------------------------------------------


def _problem(gpu: dict[str, int], host: dict[str, int], run: Run, machine: Machine) -> str | None:
    """Why the estimate does not fit, or None if it does."""
    assumed = machine.assumed
    if not memory.fits(gpu, machine.gpu.memory, assumed.gpu_memory):
        part = max(gpu, key=lambda name: gpu[name])
        return (
            f"needs {memory.total(gpu) / GB:.1f} GB per GPU, but only "
            f"{assumed.gpu_memory * machine.gpu.memory / GB:.1f} GB are usable; the largest part is {part} with "
            f"{gpu[part] / GB:.1f} GB; to reduce it use {_remedy(part, run)}"
        )
    if host and memory.total(host) > assumed.host_memory * machine.host_memory:
        part = max(host, key=lambda name: host[name])
        less = "memory.offload=layer_inputs, " if run.memory.offload == "all" else ""
        return (
            f"needs {memory.total(host) / GB:,.0f} GB of host memory per node, but only "
            f"{assumed.host_memory * machine.host_memory / GB:,.0f} GB are usable; the largest part is {part} with "
            f"{host[part] / GB:,.0f} GB; to reduce it use {less}more parallel.cp (more GPUs) or nodes with more "
            "memory (--host-memory)"
        )
    return None


def _remedy(part: str, run: Run) -> str:
    """What makes a part of GPU memory smaller."""
    more_cp = "more parallel.cp (more GPUs) or a shorter train.seq_length"
    if part in ("weights", "gradients (fp32)"):
        return "more parallel.tp or parallel.pp"
    if part == "optimizer (fp32)":
        return "more GPUs (it is distributed over data and context parallel ranks), or more parallel.tp or parallel.pp"
    if part == "loss":
        return (
            f"a smaller memory.loss_chunk (now {run.memory.loss_chunk or 'all at once'}) or more parallel.tp"
        )
    if part in ("saved activations", "working layer") and run.memory.recompute != "all_but_attention":
        return f"memory.recompute=all_but_attention with memory.offload=auto, {more_cp}"
    if part == "saved activations" and run.memory.offload != "all":
        return f"memory.offload=all, {more_cp}"
    return more_cp


def _no_layout(run: Run, model: Model, gpus: int, fixed: Collection[str]) -> str:
    """Why no layout of `gpus` GPUs divides."""
    held = [
        f"{key}={getattr(run.parallel, key.partition('.')[2])}"
        for key in fixed
        if key.startswith("parallel.")
    ]
    given = " with " + ", ".join(held) if held else ""
    return (
        f"no layout of {gpus} GPUs{given} divides {model.heads} heads, {model.kv_heads} KV heads and an MLP of "
        f"{model.ffn_size} by TP, {model.layers} layers by PP, {run.train.seq_length} tokens by 2 x CP and by CP x TP, "
        f"and a global batch of {run.train.global_batch} by DP x {run.train.micro_batch}; change --gpus or the batch"
    )
