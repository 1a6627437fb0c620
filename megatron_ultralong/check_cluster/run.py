"""All checks in turn, the table, and one line of verdict."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.check_cluster import clocks, links, machines, same_step, shared_folder, topology
from megatron_ultralong.check_cluster.findings import WIDTH, Findings
from megatron_ultralong.io.atomic_files import write_json
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks


def check_all(ranks: Ranks, shared: Path) -> list[Findings]:
    """Run all checks. Every rank calls it; the result is the same on all of them."""
    own = machines.gathered(ranks.device, shared)  # before collectives use memory of the GPU
    hosts, gathered = agreement.gather(socket.gethostname()), agreement.gather(own)
    store = torch.distributed.distributed_c10d._get_default_store()
    return [
        machines.check(gathered, hosts, shared),
        clocks.check(ranks.rank, hosts, store),
        shared_folder.check(shared, ranks.rank, hosts),
        topology.check(_groups(ranks), hosts),
        links.check(ranks, hosts),
        same_step.check(ranks.device, hosts),
    ]


def _groups(ranks: Ranks) -> dict[str, list[topology.Group]]:
    """The groups of every dimension as global ranks."""
    found = {}
    for name in ("tp", "cp", "dp", "pp"):
        mine = tuple(torch.distributed.get_process_group_ranks(getattr(ranks.groups, name)))
        found[name] = sorted(set(agreement.gather(mine)))
    return found


def text(findings: Sequence[Findings], ranks: Ranks) -> str:
    """The table, 80 columns wide, and the verdict as its last line."""
    lines = []
    for one in findings:
        lines.append(f"== {one.title} ==")
        for line in one.lines:
            lines += _wrapped(line)
        for problem in one.problems:
            lines += _wrapped(f"problem: {problem}")
    return "\n".join([*lines, "", verdict(findings, ranks)])


def _wrapped(line: str) -> list[str]:
    return (
        textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]
        if len(line) > WIDTH
        else [line]
    )


def verdict(findings: Sequence[Findings], ranks: Ranks) -> str:
    """One line: ready, or what to change first."""
    problems = [problem for one in findings for problem in one.problems]
    layout = f"TP {ranks.tp} x PP {ranks.pp} x CP {ranks.cp} x DP {ranks.dp}"
    if not problems:
        return f"verdict: ready, {ranks.world} ranks, {layout}"
    more = f" (and {len(problems) - 1} more above)" if len(problems) > 1 else ""
    return f"verdict: not ready{more}: {problems[0]}"


def write(findings: Sequence[Findings], ranks: Ranks, path: Path) -> None:
    """Write all figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "ready": not any(one.problems for one in findings),
        "verdict": verdict(findings, ranks),
        "layout": {name: getattr(ranks, name) for name in ("tp", "pp", "cp", "dp", "world")},
        "checks": {one.title: {**one.figures, "problems": list(one.problems)} for one in findings},
    }
    write_json(path, values)
