"""Which layout to use: every layout and memory mode estimated (planning/memory.py), those that fit ranked by
time, and why the others do not fit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from megatron_ultralong.config import Model, Run
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.planning.flops import flops_per_token
from megatron_ultralong.planning.hardware import Machine

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout with one memory mode, estimated."""

    run: Run
    """With its layout and mode."""
    dp: int
    memory: dict[str, int]
    """Bytes by part on a GPU of the fullest pipeline stage."""
    host: dict[str, int]
    """Bytes by part of a node's pinned memory."""
    work: dict[str, float]
    """FLOPs and bytes by part of a GPU in an iteration."""
    time: dict[str, float]
    """Seconds of an iteration by part."""
    tokens_per_second: float
    """A GPU."""
    mfu: float
    """Causal, of the bf16 peak, by the formula of planning/flops.py; of the length that attention spans where
    documents are masked."""
    problem: str | None
    """What does not fit, why, and what would help; None where all fits."""

    @property
    def seconds(self) -> float:
        return sum(self.time.values())


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found."""

    best: list[Plan]
    """Plans that fit, fastest first, one for each layout."""
    closest: Plan | None
    """Of the plans that do not fit, the one that needs least."""
    faster: Plan | None
    """Of the plans that do not fit and would be faster than the best that does, the one that needs least."""
    tried: int
    """Plans, of layouts and modes."""
    fitting: int
    """Of these, those that fit."""


def estimate(run: Run, model: Model, machine: Machine) -> Plan:
    """`run` as it is laid out, on `machine`. UserError where it cannot be split so."""
    dp = run.parallel.data_parallel(machine.gpus)
    memory = plan.memory(run, model, machine.gpus)
    host = {
        name: machine.gpus_a_node * size for name, size in plan.host_memory(run, model, machine.gpus).items()
    }
    time = plan.time(run, model, machine)
    tokens_per_second = run.train.global_batch * run.train.seq_length / sum(time.values()) / machine.gpus
    return Plan(
        run=run,
        dp=dp,
        memory=memory,
        host=host,
        work=_work(run, model, dp, machine.document_length),
        time=time,
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second
        * flops_per_token(model, plan.attended(run, machine.document_length))
        / machine.gpu.bf16,
        problem=_problem(memory, host, run, machine),
    )


def search(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> Search:
    """Every layout of `machine` in every memory mode; the settings in `fixed` stay as `run` has them.
    UserError where none divides."""
    plans: list[Plan] = []
    for layout in plan.layouts(run, model, machine.gpus, fixed):
        tried = [
            estimate(mode, model, machine)
            for way in plan.ways(layout, model, fixed)
            for mode in plan.modes(way, fixed)
        ]
        chunked = plan.in_query_chunks(layout, fixed) if all(p.problem is not None for p in tried) else None
        plans += tried + (
            [] if chunked is None else [estimate(mode, model, machine) for mode in plan.modes(chunked, fixed)]
        )
    if not plans:
        raise UserError(_no_layout(run, model, machine.gpus, fixed))
    # The same time: rather what takes less of the host, then of the GPU.
    fitting = sorted(
        (p for p in plans if p.problem is None),
        key=lambda p: (p.seconds, plan.total(p.host), plan.total(p.memory)),
    )
    best: dict[Any, Plan] = {}
    for p in fitting:
        best.setdefault(replace(p.run.parallel, ulysses=1), p)
    others = [p for p in plans if p.problem is not None]
    closest = min(others, key=lambda p: (plan.total(p.memory), plan.total(p.host)), default=None)
    faster = min(
        (p for p in others if fitting and p.seconds < fitting[0].seconds),
        key=lambda p: plan.total(p.memory),
        default=None,
    )
    return Search(
        best=list(best.values()), closest=closest, faster=faster, tried=len(plans), fitting=len(fitting)
    )


def as_settings(new: Plan, base: Run, given: list[str], *, whole: bool) -> list[str]:
    """`--set` values that turn `base` into `new`, after those already `given`. With `whole` also length and
    batch, for any recipe."""
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
    if whole:
        values = {
            "train.seq_length": _count(new.run.train.seq_length),
            "train.micro_batch": new.run.train.micro_batch,
            "train.global_batch": new.run.train.global_batch,
            **values,
        }
    return [setting for setting in given if setting.partition("=")[0].strip() not in values] + [
        f"{key}={value}" for key, value in values.items()
    ]


def _count(number: int) -> str:
    """As short as settings take it: 1048576 is 1M."""
    return next(
        (
            f"{number // scale}{letter}"
            for letter, scale in (("M", 1024**2), ("K", 1024))
            if number % scale == 0
        ),
        str(number),
    )


def more_gpus(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> int | None:
    """The smallest doubling of the GPUs, up to 64 times as many, on which something fits."""
    return next(
        (
            n
            for n in (machine.gpus * 2**i for i in range(1, 7))
            if _any_fits(run, model, replace(machine, gpus=n), fixed)
        ),
        None,
    )


def shorter(run: Run, model: Model, machine: Machine, fixed: Collection[str] = ()) -> int | None:
    """The largest halving of the sequence, down to 1024 tokens, of which something fits."""
    length = run.train.seq_length // 2
    while length >= 1024:
        # As many tokens a batch: with fewer sequences than replicas no layout would divide.
        try:
            half = replace(
                run,
                train=replace(
                    run.train,
                    seq_length=length,
                    global_batch=run.train.global_batch * run.train.seq_length // length,
                ),
            )
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


def _work(run: Run, model: Model, dp: int, document_length: int | None) -> dict[str, float]:
    """FLOPs and bytes by part that a GPU of the slowest stage works off in an iteration."""
    one, n = plan.work(run, model, document_length=document_length), run.micro_batches(dp)
    rings = 2 if one.recompute_attention else 1
    return {
        "attention FLOPs": n * (1 + plan.BACKWARD) * one.attention,
        "other FLOPs": n * (3 * one.products + one.output),
        "recompute FLOPs": n * (one.recompute_attention + one.recompute_products),
        "CP ring bytes": n * (rings * one.ring_forward + one.ring_backward),
        "CP all-to-all bytes": n * (rings * one.exchange_forward + one.exchange_backward),
        "TP bytes": n * one.tensor,
        "pipeline bytes": n * one.pipeline,
        "DP bytes": plan.gradient_bytes(run, model, dp, 2 if run.train.precision == "bf16" else 4),
        "host bytes, both ways": n * (2 * one.host + one.host_again),
    }


# ---- what does not fit -------------------------------------------------------------------------


def _problem(memory: dict[str, int], host: dict[str, int], run: Run, machine: Machine) -> str | None:
    share = machine.assumed
    if not plan.fits(memory, machine.gpu.memory, share.gpu_memory):
        part = max(memory, key=lambda name: memory[name])
        return (
            f"needs {plan.total(memory) / GB:.1f} GB a GPU, {share.gpu_memory * machine.gpu.memory / GB:.1f} are there; the largest part is "
            f"{part} with {memory[part] / GB:.1f} GB; it would help: {_help(part, run)}"
        )
    if host and plan.total(host) > share.host_memory * machine.host_memory:
        part = max(host, key=lambda name: host[name])
        less = " memory.offload=layer_inputs," if run.memory.offload == "all" else ""
        return (
            f"needs {plan.total(host) / GB:,.0f} GB of host memory a node, {share.host_memory * machine.host_memory / GB:,.0f} are there; "
            f"the largest part is {part} with {host[part] / GB:,.0f} GB; it would help:{less} more parallel.cp (more GPUs), "
            "nodes with more memory (--host-memory)"
        )
    return None


def _help(part: str, run: Run) -> str:
    """What makes a part of GPU memory smaller."""
    more_cp = "more parallel.cp (more GPUs), a shorter train.seq_length"
    if part in ("weights", "gradients (fp32)"):
        return "more parallel.tp or parallel.pp"
    if part == "optimizer (fp32)":
        return "more GPUs, over whose data and context parallel ranks it is spread, or more parallel.tp or parallel.pp"
    if part == "loss":
        return f"a smaller memory.loss_chunk (now {run.memory.loss_chunk or 'all at once'}), more parallel.tp"
    if part in ("layer checkpoints", "one layer at work") and run.memory.recompute != "all_but_attention":
        return f"memory.recompute=all_but_attention with memory.offload=auto, {more_cp}"
    if part == "layer checkpoints" and run.memory.offload != "all":
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
        f"no layout of {gpus} GPUs{given} divides {model.heads} heads, {model.kv_heads} KV heads and an MLP of {model.ffn_size} by TP, "
        f"{model.layers} layers by PP, {run.train.seq_length} tokens by 2 x CP and by CP x TP, and a global batch of {run.train.global_batch} by "
        f"DP x {run.train.micro_batch}; change --gpus or the batch"
    )
