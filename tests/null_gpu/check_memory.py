"""Peak memory of a step of 128K tokens in Llama-3.1-8B's widths against planning/memory.py: every memory mode
with every attention kernel, and the methods of context parallelism with FlashAttention-2. memory_table.py
has other lengths."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong.config import Memory, Parallel, Runtime
from megatron_ultralong.lora import TARGETS, Lora, Target
from megatron_ultralong.measure import step
from megatron_ultralong.model.llama import NO_LORA
from megatron_ultralong.runtime import launch
from tests.null_gpu import memory_table, step_memory
from tests.null_gpu.step_memory import GIB, KERNELS, MODES, K, Kernel

LENGTH = 128 * K
LAYOUTS = {
    "ring": Parallel(cp=4),
    "all-gather": Parallel(cp=4, cp_comm_type="all_gather"),
    "all-to-all": Parallel(cp=4, ulysses=4),
    "all-to-all and ring": Parallel(cp=8, ulysses=4),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield launch.start(Runtime(device="cuda"), Parallel())
    launch.stop()


def check(
    ranks: Any,
    memory: Memory,
    kernel: str,
    parallel: Parallel,
    tokens: int,
    what: str,
    lora: Lora = NO_LORA,
) -> None:
    have = step_memory.measured(ranks, memory, KERNELS[kernel], parallel, tokens, lora)
    want = step_memory.planned(memory, KERNELS[kernel], parallel, tokens, lora)
    print(
        f"{what}, {kernel}: {have / GIB:.2f} GiB, planned {want / GIB:.2f}: {have / want:.3f}",
        flush=True,
    )
    assert step_memory.least_ratio(kernel) <= have / want <= 1.1


@pytest.mark.parametrize(("mode", "kernel"), itertools.product(MODES, KERNELS))
def test_step_takes_what_is_planned(ranks: Any, mode: str, kernel: str) -> None:
    memory = replace(MODES[mode], layer_chunk=16 * K, loss_chunk=8 * K)
    check(ranks, memory, kernel, Parallel(), LENGTH, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")])
def test_step_with_adapters_takes_what_is_planned(ranks: Any, mode: str, targets: tuple[Target, ...]) -> None:
    memory = replace(MODES[mode], layer_chunk=16 * K, loss_chunk=8 * K)
    lora = Lora(rank=16, targets=targets)
    check(ranks, memory, "flash", Parallel(), LENGTH, f"{mode}, {len(targets)} adapters", lora)


@pytest.mark.parametrize(
    ("layout", "kernel"), itertools.product(LAYOUTS, ["cuDNN", "flash", "flash, deterministic"])
)
def test_context_parallel_step_takes_what_is_planned(ranks: Any, layout: str, kernel: str) -> None:
    memory = replace(step.SETTINGS["all-but-attention"], layer_chunk=8 * K, loss_chunk=4 * K)
    check(ranks, memory, kernel, LAYOUTS[layout], LENGTH // 2, layout)


@pytest.mark.parametrize("mode", ["all-but-attention", "query-chunks"])
@pytest.mark.parametrize(
    ("layout", "length"),
    itertools.product(["ring", "all-to-all and ring"], [2048.0, 0.37, 0.78, 0.9999]),
)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_placed_documents_take_at_most_what_is_planned(
    ranks: Any, mode: str, layout: str, length: float, ranks_per_node: int
) -> None:
    """A plan does not know how long the documents are: it is for a long one over all ranks."""
    if LAYOUTS[layout].ulysses > 1 and (mode == "query-chunks" or ranks_per_node > 1):
        pytest.skip("query chunks are without all-to-all, and a ring of two ranks without relays")
    kernel = Kernel(document_length=length, ranks_per_node=ranks_per_node)
    memory = replace(step.SETTINGS[mode], layer_chunk=8 * K, loss_chunk=4 * K)
    parallel = LAYOUTS[layout]
    have = step_memory.measured(ranks, memory, kernel, parallel, LENGTH // 2)
    want = step_memory.planned(memory, kernel, parallel, LENGTH // 2)
    print(
        f"{mode}, {layout}, {length:g}, {ranks_per_node} a node: {have / GIB:.2f} GiB, planned {want / GIB:.2f}: {have / want:.3f}"
    )
    assert 0.5 <= have / want <= 1.1


def test_table_is_resumed(ranks: Any, tmp_path: Path) -> None:
    """memory_table.py measures what is missing, and nothing again."""
    cases = [(128 * K, mode, "flash") for mode in ("full", "offload-all")]
    rows = tmp_path / "rows.jsonl"
    first = {"tokens": 128 * K, "mode": "full", "kernel": "flash", "measured": 3 * GIB}
    rows.write_text(json.dumps(first) + "\n")
    memory_table.measure(ranks, cases, rows)
    memory_table.measure(ranks, cases, rows)
    assert len(rows.read_text().splitlines()) == 2
    found = memory_table.measured(cases, rows)
    assert 0.9 < found[cases[1]] / memory_table.planned(cases[1]) < 1.1
    lines = memory_table.markdown(cases, found).splitlines()
    assert lines[0] == "| 128K tokens | flash |" and lines[2].startswith("| full | 3.0 (0.")
    assert lines[3].startswith("| offload-all | ")
