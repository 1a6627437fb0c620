"""No host synchronisation inside the forward and backward of the model: the host must stay ahead of the
GPU."""

from __future__ import annotations

import ctypes
import itertools
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Memory, Model, Parallel, Runtime
from megatron_ultralong.model import llama
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.runtime import launch
from megatron_ultralong.train.stopwatch import Stopwatch
from tests.packed import placed

MODEL = Model(hidden_size=256, ffn_size=512, layers=3, heads=4, kv_heads=2, head_dim=64, vocab_size=500)
LENGTH = 4096
KEPT = Memory(recompute="all_but_attention", offload="off", layer_chunk=1024, loss_chunk=512)
MEMORY = {
    "none": Memory(recompute="none", offload="off", loss_chunk=512),
    "full": Memory(recompute="full", offload="off", loss_chunk=512),
    "kept": KEPT,
    "offloaded": Memory(offload="all", layer_chunk=1024, loss_chunk=512),
    "query chunks": Memory(offload="off", query_chunks=True, layer_chunk=1024, loss_chunk=512),
    "query chunks, offloaded": Memory(offload="all", query_chunks=True, layer_chunk=1024, loss_chunk=512),
}
STARTS = {"whole row": None, "documents": range(0, LENGTH, 100)}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield launch.start(Runtime(device="cuda"), Parallel())
    launch.stop()


def logged_synchronisations() -> list[str]:
    """The lines of the stub's log that say that the host waited for the device."""
    ctypes.CDLL(None).fflush(None)
    return [
        line for line in Path(os.environ["NULL_GPU_LOG"]).read_text().splitlines() if line.startswith("sync")
    ]


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Counts what the block waits for: by the line of this library, as PyTorch sees it; and in the stub's
    log."""
    found: Counter[str] = Counter()

    def note(message: Any, *more: Any, **unused: Any) -> None:
        if "called a synchronizing" in str(message):
            stack = [
                f"{Path(f.filename).name}:{f.lineno}"
                for f in traceback.extract_stack()
                if "ultralong" in f.filename
            ]
            found[" < ".join(stack[:-4:-1]) or str(message)] += 1

    before = len(logged_synchronisations())
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", note)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(logged_synchronisations()[before:])


@pytest.mark.parametrize(("memory", "starts"), itertools.product(MEMORY, STARTS))
def test_none_in_forward_and_backward(ranks: Any, memory: str, starts: str) -> None:
    (chunk,) = llama.build(
        MODEL, Unscaled(), ranks, Parallel(), MEMORY[memory], "bf16", positions_by_document=True
    )
    tokens = torch.zeros(1, LENGTH + 1, dtype=torch.int64, device="cuda")
    mask = torch.ones(1, LENGTH, device="cuda")

    def step(starts: Sequence[int] | None) -> None:
        placement = placed(starts, LENGTH, 1)
        chunk(tokens[:, :-1], tokens[:, 1:], loss_mask=mask, placement=placement).backward()

    step(STARTS[starts])  # host buffers are page-locked, cuDNN's lse is looked at
    other = None if starts == "whole row" else range(0, LENGTH, 128)
    with synchronisations() as found:
        step(other)
    llama.unwrap(chunk).store.close()
    assert not found, dict(found)


def test_a_stopwatch_waits_at_the_end_only(ranks: Any) -> None:
    watch = Stopwatch(ranks.device)
    for iteration in range(2):  # events are made in the first
        watch.begin()
        with synchronisations() as found:
            for _ in range(3):
                with watch.part("forward"), watch.part("data"):
                    torch.zeros(8, device="cuda")
        assert not found, dict(found)
        before = len(logged_synchronisations())
        timing = watch.end(ranks)
        waits = [" ".join(line.split()[:2]) for line in logged_synchronisations()[before:]]
        # For the passes, which have ended; for the device; for the figures of the ranks, which are there.
        assert waits == ["sync event", "sync device", "sync stream"], (iteration, waits)
        assert timing.parts == {
            "data": pytest.approx(3e-3),
            "forward": pytest.approx(6e-3),
            "other": pytest.approx(5e-3),
        }
