"""Clocks of the hosts, compared with that of rank 0 through torchrun's store.

A host asks and rank 0 answers with its time; the answer was given between the two moments at which the host
read its own clock, so half of that round trip bounds the error. The shortest of several round trips counts.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from megatron_ultralong.check_cluster.findings import Findings
from megatron_ultralong.runtime import agreement

ROUNDS = 8
MOST = 1.0
"""Seconds that clocks may differ: certificates, file times and logs of several hosts are compared."""


def check(rank: int, hosts: list[str], store: Any) -> Findings:
    """Measure the clock of each host, by its first rank, against rank 0's. Every rank calls it."""
    # Keys of this check alone: answers of an earlier one, before torchrun restarted its ranks, remain.
    prefix = agreement.gather(uuid.uuid4().hex if rank == 0 else "")[0]
    first = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
    measured: tuple[float, float] | None = (0.0, 0.0) if rank == 0 else None
    for asker in list(first.values())[1:]:
        if rank == asker:
            measured = min(
                (_ask(store, f"{prefix}/{asker}/{n}") for n in range(ROUNDS)), key=lambda pair: pair[1]
            )
        elif rank == 0:
            for n in range(ROUNDS):
                store.wait([f"{prefix}/{asker}/{n}/asked"])
                store.set(f"{prefix}/{asker}/{n}/answered", repr(time.time()))
    everywhere = agreement.gather(measured)
    offsets = {host: everywhere[r] for host, r in first.items()}
    problems = tuple(
        f"the clock of {host} is {offset:+.3f} s from that of {hosts[0]} (to {error:.4f} s); start chrony or ntpd there"
        for host, (offset, error) in offsets.items()
        if abs(offset) - error > MOST
    )
    worst = max(offsets, key=lambda host: abs(offsets[host][0]))
    line = f"largest difference from {hosts[0]}: {offsets[worst][0] * 1e3:+.2f} ms ({worst}), to {offsets[worst][1] * 1e3:.2f} ms"
    if len(offsets) == 1:
        line = "one host"
    return Findings(title="clocks", lines=(line,), figures={"offset_seconds": offsets}, problems=problems)


def _ask(store: Any, key: str) -> tuple[float, float]:
    """(this host's clock minus rank 0's, largest error), seconds."""
    sent = time.time()
    started = time.monotonic()
    store.set(f"{key}/asked", "1")
    answer = float(store.get(f"{key}/answered"))
    error = (time.monotonic() - started) / 2
    return sent + error - answer, error
