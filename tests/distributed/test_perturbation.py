"""One token is changed: on every layout the outputs that see it change, and no others; planted faults are
found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong import recipes
from megatron_ultralong.config import Data, Memory, Parallel, Run
from megatron_ultralong.context_parallel import exchange, ring
from megatron_ultralong.context_parallel.zigzag import AttentionBlock
from tests import processes
from tests.spawn import leave_groups, run_ranks

S = 96
STARTS = [0, 1, 40, 41, 70, 95]
POSITIONS = [0, 1, 20, 39, 40, 41, 69, 70, 94, 95]
TINY = recipes.get("tiny")
CHUNKED = Memory(offload="off", query_chunks=True, layer_chunk=16, loss_chunk=16)
LAYOUTS = [
    (Parallel(cp=4), Memory(offload="off")),
    (Parallel(cp=4, ulysses=2), Memory(offload="off", recompute="none")),
    (Parallel(cp=2, tp=2), CHUNKED),
    (Parallel(cp=2, pp=2), Memory(offload="off")),
]


def run_of(parallel: Parallel, memory: Memory = LAYOUTS[0][1], precision: str = "fp32") -> Run:
    assert TINY.model is not None
    return replace(
        TINY,
        model=replace(TINY.model, layers=2, vocab_size=128),
        parallel=parallel,
        memory=memory,
        data=Data(documents="masked"),
        train=replace(TINY.train, seq_length=S, micro_batch=1, precision=precision),
    )


def test_layouts() -> None:
    run_ranks(_layouts, 4)


def _layouts(rank: int, world: int) -> None:
    for parallel, memory in LAYOUTS:
        for starts in (STARTS, [0]):
            assert _faults(run_of(parallel, memory), starts) == [], (parallel, starts)
            leave_groups()


def _faults(run: Run, starts: list[int]) -> list[str]:
    from megatron_ultralong.train import perturbation
    from megatron_ultralong.train.run import model_alone

    trainer = model_alone(run, None, None).__enter__()  # the groups are left by the caller
    probes = perturbation.probe(trainer, starts, POSITIONS, seed=3)
    assert [one.position for one in probes] == POSITIONS
    for one in probes:
        first, last = one.document
        assert sum(one.later.values()) == last - one.position and first <= one.position < last
    return [fault for one in probes for fault in one.faults(0.99)]


def test_planted_faults() -> None:
    run_ranks(_planted, 2)


def _planted(rank: int, world: int) -> None:
    run = run_of(Parallel(cp=2))
    hops = ring.hops

    def leaking(k: torch.Tensor, v: torch.Tensor, group: Any, spec: Any) -> Any:
        """All of a rank's documents are one."""
        rows = slice(0, k.shape[2])
        for hop, (blocks, kv) in enumerate(hops(k, v, group, spec)):
            yield ([AttentionBlock(rows, rows, True)] if hop == 0 else blocks), kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "hops", leaking)
        faults = _faults(run, STARTS)
        assert any("outputs that it must not" in fault for fault in faults), faults
    leave_groups()

    arrivals = exchange.arrivals

    def lost(*arguments: Any) -> Any:
        """What another rank sends is not computed with."""
        for hop, (blocks, kv) in enumerate(arrivals(*arguments)):
            yield (blocks if hop == 0 else []), kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "arrivals", lost)
        faults = _faults(run, [0, 5])
        assert any("changed 0 of the" in fault for fault in faults), faults
        assert not any("must not" in fault for fault in faults)
    leave_groups()


def test_tool(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    settings = ["--set", "parallel.cp=2", "train.seq_length=128", "--document-count", "4", "--probes", "3"]
    tool = [sys.executable, processes.ROOT / "tools" / "check_context_parallel.py"]
    done = processes.torchrun([*tool, *settings, "--json", out], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every token is seen where it should be"
    found = json.loads(out.read_text())
    assert len(found["starts"]) == 4 and len(found["probes"]) == 3 and found["faults"] == []
