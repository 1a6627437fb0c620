"""The report of `ultralong plan` as text: a heading and a table of layouts. GB are 10^9 bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_ultralong.config import Run
from megatron_ultralong.io.text_table import paragraphs, text_table
from megatron_ultralong.planning.flops import FORMULA
from megatron_ultralong.planning.hardware import Machine
from megatron_ultralong.planning.memory import total
from megatron_ultralong.planning.search import GB, Estimate
from megatron_ultralong.planning.time import attention_span


def heading(title: str, run: Run, machine: Machine) -> str:
    """Return the lines that say what is planned, for which machine, and which figures are assumed."""
    gpu, t, assumed = machine.gpu, run.train, machine.assumed
    lines = [
        f"{title}: {t.seq_length:,} tokens per sequence, global batch {t.global_batch}, {t.precision}, on "
        f"{machine.gpus:,} {gpu.name}",
        f"data-sheet peaks per GPU: {gpu.memory / GB:.0f} GB, {gpu.bf16 / 1e12:,.0f} TFLOP/s dense bf16; GPU memory "
        f"{gpu.hbm / GB:,.0f} GB/s; per direction NVLink {gpu.nvlink / GB:.0f}, InfiniBand {gpu.infiniband / GB:.0f}, "
        f"PCIe {gpu.pcie / GB:.0f} GB/s",
        "assumed, not measured: "
        + ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(assumed).items())
        + " (--assume)",
        f"assumed, not measured: {machine.host_memory / GB:,.0f} GB host memory per node (--host-memory)",
    ]
    if run.data.documents == "masked":
        span = round(attention_span(run, machine.documents))
        lines.append(
            f"attention inside documents, as much as equal ones of {span:,} tokens have (--documents)"
        )
    figures = ["all figures below are estimated from these, not measured. MFU by", f"  {FORMULA}"]
    return "\n".join(paragraphs([*lines, *figures], "    "))


def table(estimates: dict[str, Estimate], machine: Machine) -> str:
    """Return the estimates side by side under their names: layout, memory and time by part, speed."""
    columns, assumed = list(estimates.values()), machine.assumed
    lines: list[list[str]] = [["", *estimates]]

    def line(name: str, cell: Callable[[Estimate], str]) -> None:
        lines.append([name, *(cell(e) for e in columns)])

    def block(name: str, parts_of: Callable[[Estimate], dict[str, float]], unit: float) -> None:
        lines.append([name])
        for part in dict.fromkeys(part for e in columns for part in parts_of(e)):
            if any(parts_of(e).get(part) for e in columns):
                line(f"  {part}", lambda e, part=part: _number(parts_of(e).get(part, 0) / unit))  # type: ignore[misc]

    line("TP", lambda e: str(e.run.parallel.tp))
    line("PP", lambda e: str(e.run.parallel.pp))
    line("CP", lambda e: str(e.run.parallel.cp))
    if any(e.run.parallel.cp > 1 for e in columns):
        line("  of Ulysses x ring", _context_groups)
    line("DP", lambda e: str(e.dp))
    line("memory.recompute", lambda e: e.run.memory.recompute)
    line("memory.offload", lambda e: e.run.memory.offload)
    if any(e.run.memory.query_chunks for e in columns):
        line("memory.query_chunks", lambda e: str(e.run.memory.query_chunks).lower())
    block("GB per GPU, fullest stage", lambda e: dict(e.memory), GB)
    line(
        f"  all (of {assumed.gpu_memory * machine.gpu.memory / GB:.1f})",
        lambda e: _number(total(e.memory) / GB),
    )
    if any(e.host for e in columns):
        block("GB of host memory per node", lambda e: dict(e.host), GB)
        line(
            f"  all (of {assumed.host_memory * machine.host_memory / GB:,.0f})",
            lambda e: _number(total(e.host) / GB),
        )
    lines.append(["work per GPU and iteration"])
    for part in columns[0].work:
        if any(e.work[part] for e in columns):
            unit, name = (1e15, "PFLOP") if part.endswith("FLOPs") else (GB, "GB")
            label = part.replace("FLOPs", name).replace("bytes", name)
            line(f"  {label}", lambda e, part=part, unit=unit: _number(e.work[part] / unit))  # type: ignore[misc]
    block("seconds per iteration, estimated", lambda e: e.time, 1.0)
    line("  all", lambda e: _number(e.seconds))
    if any(e.host for e in columns):
        pcie = machine.gpu.pcie * assumed.links
        line("host copies, both ways, s", lambda e: _number(e.work["host bytes, both ways"] / pcie))
        computation = ("attention", "other matrix products", "recompute")
        line("computation they overlap with, s", lambda e: _number(sum(e.time[part] for part in computation)))
    line("tokens/s/GPU, estimated", lambda e: f"{e.tokens_per_second:,.0f}")
    line("causal MFU, estimated", lambda e: f"{e.mfu:.1%}")
    line("fits", lambda e: "yes" if e.problem is None else "no")
    return "\n".join(text_table(lines))


def _context_groups(e: Estimate) -> str:
    p = e.run.parallel
    return f"{p.ulysses} x {p.cp // p.ulysses}" + (" all-gather" if p.cp_comm_type == "all_gather" else "")


def _number(value: float) -> str:
    """Two decimals, or two significant digits if it is small."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
