"""Which groups leave a host: tensor parallel groups should not, and rings should as rarely as they can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ultralong.check_cluster.findings import Findings, on_ranks

Group = tuple[int, ...]


def check(groups: dict[str, list[Group]], hosts: Sequence[str]) -> Findings:
    """groups: the groups of each dimension as global ranks, in ring order. hosts: of every rank."""
    lines: list[str] = []
    problems: list[str] = []
    figures: list[dict[str, Any]] = []
    for ring in groups.get("cp", []):
        leaving = hops_between_hosts(ring, hosts)
        number = len({hosts[rank] for rank in ring})
        least = number if number > 1 else 0
        figures.append({"ranks": ring, "hops": len(ring), "leave_a_host": leaving, "least": least})
        if leaving > least:
            problems.append(
                f"cp ring of {on_ranks(ring, hosts)}: {leaving} of {len(ring)} hops leave a host, {least} in the best order; "
                "start one torchrun a host, so that its ranks have adjacent numbers"
            )
    if figures and len(groups["cp"][0]) > 1:
        most = max(figures, key=lambda one: one["leave_a_host"])
        lines.append(
            f"cp rings: {len(figures)} of {most['hops']} ranks; {most['leave_a_host']} hops leave a host at most "
            f"(least possible: {most['least']})"
        )
    split = [group for group in groups.get("tp", []) if len({hosts[rank] for rank in group}) > 1]
    if split:
        problems.append(
            f"{len(split)} tp groups span hosts, the first is {on_ranks(split[0], hosts)}; choose a parallel.tp that divides "
            "the ranks of a host"
        )
    if len(groups.get("tp", [()])[0]) > 1:
        lines.append(f"tp groups: {len(groups['tp'])}, {len(split) or 'none'} across hosts")
    return Findings(
        title="rank order",
        lines=tuple(lines) or ("no tensor or context parallel groups",),
        figures={"cp_rings": figures, "tp_groups_across_hosts": split},
        problems=tuple(problems),
    )


def hops_between_hosts(ring: Group, hosts: Sequence[str]) -> int:
    """Hops of a ring, of which the last leads to its begin, between ranks of different hosts."""
    return sum(hosts[one] != hosts[ring[i - 1]] for i, one in enumerate(ring))
