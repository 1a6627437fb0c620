"""What tools/plan.py says: a search for layouts as a table for people, and as JSON. GB are 10^9 bytes, as
vendors count GPU memory."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong import recipes
from megatron_ultralong.config import Model, Parallel, Run, Train, override, parse_count, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.planning import search
from megatron_ultralong.planning.flops import FORMULA
from megatron_ultralong.planning.hardware import GPUS, Machine, assume
from megatron_ultralong.planning.search import GB, Plan

TOKENS_A_BATCH = 8 * 1024**2
"""Of an iteration where no batch is given: as in the paper's runs."""

SHORT_NAMES = {name.split("/")[1].lower().removesuffix("-instruct"): name for name in recipes.SHAPES}
"""llama-3.1-8b and so on: Hugging Face name."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome for the user."""

    text: str
    values: dict[str, Any]
    """The same for JSON."""
    fits: bool
    """Whether any plan fits."""


def report(
    *,
    gpus: int,
    gpu: str = "h100",
    model: str | None = None,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    seq_length: str | None = None,
    global_batch: int | None = None,
    host_memory: str = "2T",
    assumptions: Sequence[str] = (),
    document_length: str | None = None,
    show: int = 4,
) -> Report:
    """Search and say; the arguments are those of tools/plan.py. UserError for what a user can mend."""
    machine = _machine(gpus, gpu, host_memory, list(assumptions), document_length)
    if show < 1:
        raise UserError(f"--show {show}: must be at least 1")
    given = [
        f"{key}={value}"
        for key, value in (("train.seq_length", seq_length), ("train.global_batch", global_batch))
        if value is not None
    ]
    given += settings
    if model is None and recipe is None:
        raise UserError("say what to plan: --model with --seq-length, or --recipe")
    start = recipes.get(recipe) if recipe else _new_run(model, seq_length, settings)
    # The search starts from as few ranks as it can, so that a length or layout is not refused for the
    # recipe's own sake.
    inside = next(
        (
            value
            for key, _, value in (setting.partition("=") for setting in reversed(given))
            if key.strip() == "parallel.ulysses"
        ),
        "",
    )
    ulysses = int(inside) if inside.isdigit() and int(inside) else start.parallel.ulysses
    fewest = Parallel(cp=ulysses, ulysses=ulysses, cp_comm_type=start.parallel.cp_comm_type)
    run = override(dataclasses.replace(start, parallel=fewest), given)
    if document_length is not None and run.data.documents != "masked":
        raise UserError(
            "--document-length counts where attention stays inside documents: add --set data.documents=masked, or leave it out"
        )
    shape = _shape(run, model)
    keys = {setting.partition("=")[0].strip() for setting in given}
    fixed = [
        key for key in plan.SEARCHED if key in keys and (key != "parallel.dp" or run.parallel.dp is not None)
    ]

    found = search.search(run, shape, machine, fixed)
    shown = {
        "best" if number == 1 else f"no. {number}": new for number, new in enumerate(found.best[:show], 1)
    }
    notes = [f"{found.fitting:,} of {found.tried:,} plans fit ({len(found.best):,} layouts)"]
    if found.faster is not None:
        notes.append(f"faster, but does not fit: {_name(found.faster)} {found.faster.problem}")
    if not found.best:
        assert found.closest is not None
        shown["closest"] = found.closest
        more, length = (
            search.more_gpus(run, shape, machine, fixed),
            search.shorter(run, shape, machine, fixed),
        )
        notes += [
            f"nothing fits; the closest, {_name(found.closest)}, {found.closest.problem}",
            (f"something fits on {more:,} GPUs" if more else f"nothing fits on up to {64 * gpus:,} GPUs")
            + "; "
            + (f"{gpus:,} take {length:,} tokens a sequence" if length else "no shorter sequence fits here"),
        ]
    if recipe:
        own = _own(start, given, shape, machine)
        if isinstance(own, Plan):
            shown["recipe's"] = own
        if isinstance(own, str) or own.problem is not None:
            notes.append(f"the recipe's own layout: {own if isinstance(own, str) else own.problem}")

    lines = {
        name: search.as_settings(new, start, given, whole=not recipe)
        for name, new in shown.items()
        if new.problem is None
    }
    text = [heading(recipe or str(model), run, machine), "", table(shown, machine), ""]
    text += [f"{name}: --set {' '.join(line)}" for name, line in lines.items()] + notes
    values = {
        "format": 1,
        "estimated": True,
        "run": to_dict(run),
        "machine": dataclasses.asdict(machine),
        "mfu_formula": FORMULA,
        "plans": {name: as_json(new, lines.get(name, [])) for name, new in shown.items()},
        "notes": notes,
    }
    return Report(text="\n".join(text), values=values, fits=bool(found.best))


def write(file: Path, values: dict[str, Any]) -> None:
    """`values` as JSON. UserError where the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error}") from None


# ---- what was asked for ------------------------------------------------------------------------


def _machine(
    gpus: int, kind: str, host_memory: str, assumptions: list[str], document_length: str | None
) -> Machine:
    if kind.lower() not in GPUS:
        raise UserError(f"--gpu {kind}: not known; choose one of {', '.join(GPUS)}")
    scale = {"G": 1024**3, "T": 1024**4}.get(host_memory[-1:].upper(), 1)
    digits = host_memory[:-1] if scale > 1 else host_memory
    try:
        size = int(float(digits) * scale)
    except (ValueError, OverflowError):
        raise UserError(f"--host-memory {host_memory}: expected bytes, like 2T or 1500G") from None
    return Machine(
        gpu=GPUS[kind.lower()],
        gpus=gpus,
        host_memory=size,
        assumed=assume(assumptions),
        document_length=None
        if document_length is None
        else parse_count(document_length, "--document-length"),
    )


def _new_run(model: str | None, seq_length: str | None, settings: Sequence[str]) -> Run:
    """A run of `model` without a recipe, of one rank."""
    length = seq_length or next(
        (s.partition("=")[2] for s in settings if s.startswith("train.seq_length=")), None
    )
    if length is None:
        raise UserError("--model without --recipe needs --seq-length, like 1M")
    tokens = parse_count(length, "--seq-length")
    return Run(
        name=str(model),
        train=Train(
            seq_length=tokens, global_batch=max(1, TOKENS_A_BATCH // max(tokens, 1)), iterations=1, lr=0.0
        ),
    )


def _shape(run: Run, name: str | None) -> Model:
    """The model to plan for: the run's own, that of `name`, or the one the recipe starts from."""
    if run.model is not None:
        if name is not None:
            raise UserError(f"recipe {run.name} has a model of its own; leave --model out")
        return run.model
    if name is None and run.base not in recipes.SHAPES:
        raise UserError(
            f"recipe {run.name} takes its model's shape from what it loads; say which with --model"
        )
    if name is None:
        return recipes.SHAPES[run.base]
    if Path(name).is_dir():
        from megatron_ultralong.checkpoint.hf import config as hf_config

        return hf_config.read_config(name).model
    known = {
        **{short: recipes.SHAPES[long] for short, long in SHORT_NAMES.items()},
        **{long.lower(): m for long, m in recipes.SHAPES.items()},
    }
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.0)[0]
        raise UserError(
            f"--model {name}: no such directory, and no known name; did you mean {near}? Known: {', '.join(SHORT_NAMES)}"
        )
    return known[name.lower()]


def _own(recipe: Run, given: list[str], shape: Model, machine: Machine) -> Plan | str:
    """The recipe's own layout and mode with the settings given, memory.offload as training would settle it;
    or why it cannot be."""
    try:
        run = plan.settle_offload(override(recipe, given), shape, machine.gpus, machine.gpu.memory)
        return search.estimate(run, shape, machine)
    except UserError as error:
        return str(error)


def _name(new: Plan) -> str:
    p, memory = new.run.parallel, new.run.memory
    more = (
        f" of {p.ulysses} x {p.cp // p.ulysses}" if p.ulysses > 1 else "",
        ", query_chunks=true" if memory.query_chunks else "",
    )
    return f"TP {p.tp} x PP {p.pp} x CP {p.cp}{more[0]} x DP {new.dp} with recompute={memory.recompute}, offload={memory.offload}{more[1]}"


# ---- table and JSON ----------------------------------------------------------------------------


def heading(title: str, run: Run, machine: Machine) -> str:
    """What was planned for which machine; which figures are data sheets' and which are assumed."""
    gpu, t = machine.gpu, run.train
    t_masked, attended = run.data.documents == "masked", plan.attended(run, machine.document_length)
    assumed = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(machine.assumed).items())
    return "\n".join(
        [
            f"{title}: {t.seq_length:,} tokens a sequence, global batch {t.global_batch}, {t.precision}, on {machine.gpus:,} {gpu.name}",
            f"data-sheet peaks a GPU: {gpu.memory / GB:.0f} GB, {gpu.bf16 / 1e12:,.0f} TFLOP/s dense bf16; GPU memory {gpu.hbm / GB:,.0f} GB/s, "
            f"one way NVLink {gpu.nvlink / GB:.0f}, InfiniBand {gpu.infiniband / GB:.0f}, PCIe {gpu.pcie / GB:.0f} GB/s",
            f"assumed, not measured: {assumed} (--assume)",
            f"assumed, not measured: {machine.host_memory / GB:,.0f} GB host memory a node (--host-memory)",
            *(
                [f"attention inside documents, of {attended:,} tokens on average (--document-length)"]
                if t_masked
                else []
            ),
            "estimated from these, not measured: all figures below. MFU by",
            f"  {FORMULA}",
        ]
    )


def table(plans: dict[str, Plan], machine: Machine) -> str:
    """Plans side by side, by their headings: layout, memory by part, time by part, speed."""
    rows: list[tuple[str, list[str]]] = [("", list(plans))]

    def row(name: str, cell: Any) -> None:
        rows.append((name, [cell(p) for p in plans.values()]))

    def block(name: str, field: str, unit: float) -> None:
        rows.append((name, [""] * len(plans)))
        for part in dict.fromkeys(part for p in plans.values() for part in getattr(p, field)):
            if any(getattr(p, field).get(part) for p in plans.values()):
                row(f"  {part}", lambda p, part=part: _number(getattr(p, field).get(part, 0) / unit))

    row(
        "TP x PP x CP x DP",
        lambda p: f"{p.run.parallel.tp} x {p.run.parallel.pp} x {p.run.parallel.cp} x {p.dp}",
    )
    if any(p.run.parallel.cp > 1 for p in plans.values()):
        row(
            "CP: all-to-all x ring or gather",
            lambda p: (
                f"{p.run.parallel.ulysses} x {p.run.parallel.cp // p.run.parallel.ulysses}"
                + (" gather" if p.run.parallel.cp_comm_type == "all_gather" else "")
            ),
        )
    row("memory.recompute", lambda p: p.run.memory.recompute)
    row("memory.offload", lambda p: p.run.memory.offload)
    if any(p.run.memory.query_chunks for p in plans.values()):
        row("memory.query_chunks", lambda p: str(p.run.memory.query_chunks).lower())
    block("GB a GPU, fullest stage", "memory", GB)
    row(
        f"  all (of {machine.assumed.gpu_memory * machine.gpu.memory / GB:.1f})",
        lambda p: _number(plan.total(p.memory) / GB),
    )
    if any(p.host for p in plans.values()):
        block("GB of host memory a node", "host", GB)
        row(
            f"  all (of {machine.assumed.host_memory * machine.host_memory / GB:,.0f})",
            lambda p: _number(plan.total(p.host) / GB),
        )
    rows.append(("work of a GPU an iteration", [""] * len(plans)))
    for part in [
        part for part in next(iter(plans.values())).work if any(p.work[part] for p in plans.values())
    ]:
        unit, name = (1e15, "PFLOP") if part.endswith("FLOPs") else (GB, "GB")
        label = part.replace("FLOPs", name).replace("bytes", name)
        row(f"  {label}", lambda p, part=part, unit=unit: _number(p.work[part] / unit))
    block("seconds an iteration, estimated", "time", 1.0)
    row("  all", lambda p: _number(p.seconds))
    if any(p.host for p in plans.values()):
        row(
            "host copies, both ways, s",
            lambda p: _number(p.work["host bytes, both ways"] / (machine.gpu.pcie * machine.assumed.links)),
        )
        row(
            "computation they hide behind, s",
            lambda p: _number(
                sum(p.time[part] for part in ("attention", "other matrix products", "recompute"))
            ),
        )
    row("tokens/s/GPU, estimated", lambda p: f"{p.tokens_per_second:,.0f}")
    row("causal MFU, estimated", lambda p: f"{p.mfu:.1%}")
    row("fits", lambda p: "yes" if p.problem is None else "no")
    first = max(len(name) for name, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(plans))]
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths))]).rstrip()
        for name, cells in rows
    )


def _number(value: float) -> str:
    """Two decimals, or two digits of what is small."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def as_json(new: Plan, settings: list[str]) -> dict[str, Any]:
    """A plan as plain values: bytes, FLOPs, seconds."""
    p = new.run.parallel
    return {
        "layout": {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "dp": new.dp},
        "context": {"ulysses": p.ulysses, "cp_comm_type": p.cp_comm_type},
        "memory": dataclasses.asdict(new.run.memory),
        "set": settings,
        "fits": new.problem is None,
        "problem": new.problem,
        "memory_bytes_a_gpu": {**new.memory, "all": plan.total(new.memory)},
        "host_bytes_a_node": {**new.host, "all": plan.total(new.host)},
        "work_a_gpu_and_iteration": new.work,
        "seconds_an_iteration": {**new.time, "all": new.seconds},
        "tokens_per_second_per_gpu": new.tokens_per_second,
        "causal_mfu": new.mfu,
    }
