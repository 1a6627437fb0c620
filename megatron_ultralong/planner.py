"""Which layout to use: every layout and memory mode estimated (plan.py), those that fit ranked by time, and why the others do not fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron_ultralong import plan
from megatron_ultralong.config import Model, Run, UserError, override, parse_count
from megatron_ultralong.hardware import Machine
from megatron_ultralong.plan import Choice
from megatron_ultralong.train.metrics import flops_per_token

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout with one memory mode, estimated."""

    run: Run
    """With its layout."""
    choice: Choice
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
    """Causal, of the bf16 peak, by the formula of train/metrics.py."""
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


def estimate(run: Run, model: Model, machine: Machine, choice: Choice | None = None) -> Plan:
    """`run` as it is laid out, on `machine`. UserError where it cannot be split so."""
    choice = choice or Choice.of(run)
    dp = run.parallel.data_parallel(machine.gpus)
    memory = plan.memory(run, model, machine.gpus, choice)
    host = {name: machine.gpus_a_node * size for name, size in plan.host_memory(run, model, machine.gpus, choice).items()}
    time = plan.time(run, model, machine, choice)
    tokens_per_second = run.train.global_batch * run.train.seq_length / sum(time.values()) / machine.gpus
    return Plan(run=run, choice=choice, dp=dp, memory=memory, host=host, work=_work(run, model, choice, dp), time=time,
                tokens_per_second=tokens_per_second, mfu=tokens_per_second * flops_per_token(model, run.train.seq_length) / machine.gpu.bf16,
                problem=_problem(memory, host, run, choice, machine))


def search(run: Run, model: Model, machine: Machine, modes: Iterable[Choice], fixed: Collection[str] = ()) -> Search:
    """Every layout of `machine` with each of `modes`; the dimensions in `fixed` stay as `run` has them. UserError where none divides."""
    modes = list(modes)
    plans = [estimate(candidate, model, machine, mode) for layout, mode in itertools.product(plan.layouts(run, model, machine.gpus, fixed), modes)
             if (candidate := _with_mode(layout, mode)) is not None]
    if not plans:
        raise UserError(_no_layout(run, model, machine.gpus, fixed))
    # The same time: rather what takes less of the host, then of the GPU.
    fitting = sorted((p for p in plans if p.problem is None), key=lambda p: (p.seconds, plan.total(p.host), plan.total(p.memory)))
    best: dict[Any, Plan] = {}
    for p in fitting:
        best.setdefault(p.run.parallel, p)
    others = [p for p in plans if p.problem is not None]
    closest = min(others, key=lambda p: (plan.total(p.memory), plan.total(p.host)), default=None)
    faster = min((p for p in others if fitting and p.seconds < fitting[0].seconds), key=lambda p: plan.total(p.memory), default=None)
    return Search(best=list(best.values()), closest=closest, faster=faster, tried=len(plans), fitting=len(fitting))


def modes_of(run: Run, fixed: dict[str, Any]) -> list[Choice]:
    """Memory modes to search for `run`: those with the `fixed` values (checkpoint, offload, layer_chunk) that config.py has.

    Where it lacks one of these values, all that have them: they were asked for. UserError for values that are wrong or exclude each other.
    """
    Choice(**{"checkpoint": "attention", **fixed})
    layer_chunk = fixed.get("layer_chunk", Choice.of(run).layer_chunk)
    words = {name: value for name, value in fixed.items() if name != "layer_chunk"}
    modes = [replace(choice, layer_chunk=layer_chunk) for choice in plan.choices()
             if all(getattr(choice, name) == value for name, value in words.items())]
    all_known = all(plan.config_has(name, value) for name, value in words.items())
    return [choice for choice in modes if choice.in_config] if all_known else modes


def mode_settings(settings: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(`--set` settings that config.py takes, values of `Choice` among all of them): modes can be planned that no run can have yet."""
    kept, values = [], {}
    for setting in settings:
        section, _, name = setting.partition("=")[0].strip().partition(".")
        value = setting.partition("=")[2].strip()
        if section == "memory" and value and name in {field.name for field in dataclasses.fields(Choice)}:
            values[name] = parse_count(value, "--set memory.layer_chunk") if name == "layer_chunk" else value
            if not plan.config_has(name, value):
                continue
        kept.append(setting)
    return kept, values


def as_settings(new: Plan, base: Run, given: list[str], *, whole: bool) -> list[str]:
    """`--set` values that turn `base` into `new`, after those already `given`. With `whole` also length and batch, for any recipe."""
    p = new.run.parallel
    values: dict[str, Any] = {"parallel.tp": p.tp, "parallel.pp": p.pp, "parallel.cp": p.cp}
    if p.vpp != 1 or base.parallel.vpp != 1:
        values["parallel.vpp"] = p.vpp
    if base.parallel.dp is not None:
        values["parallel.dp"] = new.dp
    values |= new.choice.settings()
    if whole:
        values = {"train.seq_length": _count(new.run.train.seq_length), "train.micro_batch": new.run.train.micro_batch,
                  "train.global_batch": new.run.train.global_batch, **values}
    return [setting for setting in given if setting.partition("=")[0].strip() not in values] + [f"{key}={value}" for key, value in values.items()]


def _count(number: int) -> str:
    """As short as settings take it: 1048576 is 1M."""
    return next((f"{number // scale}{letter}" for letter, scale in (("M", 1024**2), ("K", 1024)) if number % scale == 0), str(number))


def more_gpus(run: Run, model: Model, machine: Machine, modes: list[Choice], fixed: Collection[str] = ()) -> int | None:
    """The smallest doubling of the GPUs, up to 64 times as many, on which something fits."""
    return next((n for n in (machine.gpus * 2**i for i in range(1, 7))
                 if _any_fits(run, model, replace(machine, gpus=n), modes, fixed)), None)


def shorter(run: Run, model: Model, machine: Machine, modes: list[Choice], fixed: Collection[str] = ()) -> int | None:
    """The largest halving of the sequence, down to 1024 tokens, of which something fits."""
    length = run.train.seq_length // 2
    while length >= 1024:
        # As many tokens a batch: with fewer sequences than replicas no layout would divide.
        try:
            half = replace(run, train=replace(run.train, seq_length=length, global_batch=run.train.global_batch * run.train.seq_length // length))
        except UserError:
            return None
        if _any_fits(half, model, machine, modes, fixed):
            return length
        length //= 2
    return None


def _any_fits(run: Run, model: Model, machine: Machine, modes: list[Choice], fixed: Collection[str]) -> bool:
    try:
        return search(run, model, machine, modes, fixed).fitting > 0
    except UserError:
        return False


def _with_mode(run: Run, mode: Choice) -> Run | None:
    """`run` with the settings of `mode`, as far as config.py has them; None where they do not go with its layout."""
    if not mode.in_config:
        return run
    try:
        return replace(override(run, [f"{key}={value}" for key, value in mode.settings().items()]), notes=run.notes)
    except UserError:
        return None


def _work(run: Run, model: Model, choice: Choice, dp: int) -> dict[str, float]:
    """FLOPs and bytes by part that a GPU of the slowest stage works off in an iteration."""
    one, n = plan.work(run, model, choice), run.micro_batches(dp)
    rings = 2 if one.recompute_attention else 1
    return {
        "attention FLOPs": n * (1 + plan.BACKWARD) * one.attention,
        "other FLOPs": n * (3 * one.products + one.output),
        "recompute FLOPs": n * (one.recompute_attention + one.recompute_products),
        "CP ring bytes": n * (rings * one.ring_forward + one.ring_backward),
        "TP bytes": n * one.tensor,
        "pipeline bytes": n * one.pipeline,
        "DP bytes": plan.gradient_bytes(run, model, dp, 2 if run.train.precision == "bf16" else 4),
        "host bytes, both ways": n * 2 * one.host,
    }


# ---- what does not fit -----------------------------------------------------------------------------------------

def _problem(memory: dict[str, int], host: dict[str, int], run: Run, choice: Choice, machine: Machine) -> str | None:
    share = machine.assumed
    if not plan.fits(memory, machine.gpu.memory, share.gpu_memory):
        part = max(memory, key=lambda name: memory[name])
        return (f"needs {plan.total(memory) / GB:.1f} GB a GPU, {share.gpu_memory * machine.gpu.memory / GB:.1f} are there; the largest part is "
                f"{part} with {memory[part] / GB:.1f} GB; it would help: {_help(part, run, choice)}")
    if host and plan.total(host) > share.host_memory * machine.host_memory:
        part = max(host, key=lambda name: host[name])
        less = " memory.offload=checkpoints," if choice.offload == "attention" else ""
        return (f"needs {plan.total(host) / GB:,.0f} GB of host memory a node, {share.host_memory * machine.host_memory / GB:,.0f} are there; "
                f"the largest part is {part} with {host[part] / GB:,.0f} GB; it would help:{less} more parallel.cp (more GPUs), "
                "nodes with more memory (--host-memory)")
    return None


def _help(part: str, run: Run, choice: Choice) -> str:
    """What makes a part of GPU memory smaller, as far as it is a setting of this version."""
    more_cp = "more parallel.cp (more GPUs), a shorter train.seq_length"
    if part in ("weights", "gradients (fp32)"):
        return "more parallel.tp or parallel.pp"
    if part == "optimizer (fp32)":
        return "more GPUs, over whose data and context parallel ranks it is spread, or more parallel.tp or parallel.pp"
    if part == "loss":
        return f"a smaller memory.loss_chunk (now {run.memory.loss_chunk or 'all at once'}), more parallel.tp"
    mode = None
    if part == "layer checkpoints" and choice.checkpoint == "none":
        mode = ("checkpoint", "full")
    elif part == "layer checkpoints" and choice.offload == "off":
        mode = ("offload", "attention" if choice.checkpoint == "attention" else "checkpoints")
    elif part == "one layer at work" and choice.checkpoint != "attention":
        mode = ("checkpoint", "attention")
    return f"memory.{mode[0]}={mode[1]}, {more_cp}" if mode and plan.config_has(*mode) else more_cp


def _no_layout(run: Run, model: Model, gpus: int, fixed: Collection[str]) -> str:
    """Why no layout of `gpus` GPUs divides."""
    held = " with " + ", ".join(f"parallel.{name}={getattr(run.parallel, name)}" for name in fixed) if fixed else ""
    return (f"no layout of {gpus} GPUs{held} divides {model.heads} heads, {model.kv_heads} KV heads and an MLP of {model.ffn_size} by TP, "
            f"{model.layers} layers by PP, {run.train.seq_length} tokens by 2 x CP and by CP x TP, and a global batch of {run.train.global_batch} by "
            f"DP x {run.train.micro_batch}; change --gpus or the batch")
