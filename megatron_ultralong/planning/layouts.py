"""Layouts of a run on a number of GPUs: tensor, pipeline, context and data parallel sizes, Ulysses, query
chunks."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

from megatron_ultralong.config import Model, Run, divides_heads
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning.hardware import GPUS_PER_NODE
from megatron_ultralong.planning.memory import data_parallel_split

LARGEST_TP = 8

SEARCHED_SETTINGS = (
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.dp",
    "memory.recompute",
    "memory.offload",
    "parallel.ulysses",
    "parallel.cp_comm_type",
    "memory.query_chunks",
)
"""Settings that a search varies, or chooses where they are not given."""


def layouts(run: Run, model: Model, gpus: int, fixed: Collection[str] = ()) -> Iterator[Run]:
    """Yield `run` under every layout of `gpus` GPUs that divides model, sequence and batch.

    The settings named in `fixed` stay as they are in `run`. TP is at most 8, so that it stays inside a node;
    DP is what TP, PP and CP leave. Interleaving (vpp) stays as it is in `run` where PP > 1.
    """
    old = run.parallel

    def sizes(name: str, largest: int) -> list[int]:
        if f"parallel.{name}" in fixed:
            return [getattr(old, name)]
        return [n for n in range(1, largest + 1) if gpus % n == 0]

    dp = old.dp if "parallel.dp" in fixed else None
    for tp, pp in itertools.product(sizes("tp", LARGEST_TP), sizes("pp", min(gpus, model.layers))):
        for cp in sizes("cp", gpus // (tp * pp)):
            try:  # ulysses and cp_comm_type stay where they can
                parallel = replace(old, tp=tp, pp=pp, cp=cp, vpp=old.vpp if pp > 1 else 1, dp=dp)
                candidate = replace(run, parallel=parallel)
                data_parallel_split(candidate, model, gpus)
            except UserError:
                continue
            yield candidate


def with_ulysses(run: Run, model: Model, fixed: Collection[str] = ()) -> list[Run]:
    """Return `run` with every parallel.ulysses that divides CP and a rank's heads and, times TP, a node of
    eight.

    Returns `run` alone if parallel.ulysses is in `fixed` or above 1, or with query chunks or all-gather.
    """
    p = run.parallel
    if "parallel.ulysses" in fixed or p.ulysses > 1 or p.cp_comm_type != "p2p" or run.memory.query_chunks:
        return [run]
    sizes = [
        u
        for u in range(1, p.cp + 1)
        if p.cp % u == 0
        and (u == 1 or (GPUS_PER_NODE % (p.tp * u) == 0))
        and divides_heads(model.heads // p.tp, model.kv_heads // p.tp, u)
    ]
    return [replace(run, parallel=replace(p, ulysses=u)) for u in sizes]


def with_query_chunks(run: Run, fixed: Collection[str] = ()) -> Run | None:
    """Return `run` with memory.query_chunks=true, or None if the settings in `fixed` or the layout rule it
    out."""
    m, p = run.memory, run.parallel
    if (
        "memory.query_chunks" in fixed
        or m.query_chunks
        or p.ulysses > 1
        or p.cp_comm_type != "p2p"
        or ("memory.recompute" in fixed and m.recompute != "all_but_attention")
    ):
        return None
    return replace(run, memory=replace(m, recompute="all_but_attention", query_chunks=True))
