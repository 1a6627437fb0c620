"""Attention of some queries at a time: outputs of all chunks, and the sums of their gradients, against all at
once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ultralong.context_parallel import query_rows
from megatron_ultralong.context_parallel.api import (
    ContextGroups,
    attention_backward,
    attention_backward_rows,
    attention_forward,
)
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from tests.packed import held, placed

CHUNK = 12


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 5, 12, 24])
@pytest.mark.parametrize("tp_shards", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_queries_make_up_the_whole(
    cp: int, chunk: int, tp_shards: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_rows, "KEY_BLOCK", 5)
    length = CHUNK * 2 * cp
    generator = torch.Generator().manual_seed(cp)
    q, k, v, dout = (
        torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    starts = [0, 1, 7, CHUNK + 1, length - 3] if packed else None
    placement = placed(starts, length, cp)

    def rank(ring: Any) -> None:
        q_, k_, v_, dout_ = (x[:, :, held(length, ring.rank, cp, starts)] for x in (q, k, v, dout))
        groups, spec = ContextGroups(ring=ring), AttentionSpec(placement=placement)
        out, lse = attention_forward(q_, k_, v_, groups, spec)
        want = attention_backward(dout_, q_, k_, v_, out, lse, groups, spec)
        dkv_sum = torch.zeros(2, *k_.shape, dtype=k_.dtype)
        # A chunk is the same rows of each of `tp_shards` equal shards, as tensor parallel ranks gather them.
        t = 2 * CHUNK // tp_shards
        for first in range(0, t, chunk):
            rows = [slice(i * t + first, i * t + min(first + chunk, t)) for i in range(tp_shards)]
            here = (slice(None), slice(None), [i for run in rows for i in range(run.start, run.stop)])
            spec = AttentionSpec(placement=placement, query_rows=rows)
            out_c, lse_c = attention_forward(q_[here], k_, v_, groups, spec)
            torch.testing.assert_close(out_c, out[here])
            torch.testing.assert_close(lse_c, lse[here])
            dq = attention_backward_rows(dout_[here], q_[here], k_, v_, out_c, lse_c, groups, spec, dkv_sum)
            torch.testing.assert_close(dq, want[0][here])
        torch.testing.assert_close(dkv_sum, torch.stack(want[1:]))

    run_virtual(rank, cp)


def test_rows_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 12, 8)
    for rows in (None, [slice(0, 3)], [slice(10, 14)], [slice(0, 4), slice(4, 5)]):
        with pytest.raises(ValueError, match="are not"):
            attention_forward(q, k, k, ContextGroups(), AttentionSpec(query_rows=rows))
    with pytest.raises(ValueError, match="query rows require cp_comm_type p2p without Ulysses"):
        groups = ContextGroups(cp_comm_type="all_gather")
        attention_forward(q, k, k, groups, AttentionSpec(query_rows=[slice(0, 4)]))


@pytest.mark.parametrize("length", [1200, 4800])
def test_shapes_do_not_grow_with_the_sequence(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN builds and keeps a plan for each shape."""
    monkeypatch.setattr(query_rows, "KEY_BLOCK", 200)
    shapes: set[tuple[str, int, int]] = set()

    def recorded(name: str, call: Any) -> Any:
        def run(*tensors: torch.Tensor, **more: Any) -> Any:
            q, k = tensors[:2] if name == "forward" else tensors[1:3]
            shapes.add((name, q.shape[2], k.shape[2]))
            return call(*tensors, **more)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, recorded(name, getattr(kernels, name)))
    k = torch.randn(1, 1, length, 8)
    groups, dkv = ContextGroups(), torch.zeros(2, *k.shape)
    for first in range(0, length, 50):
        spec = AttentionSpec(query_rows=[slice(first, first + 50)])
        q = torch.randn(1, 1, 50, 8)
        out, lse = attention_forward(q, k, k, groups, spec)
        attention_backward_rows(q, q, k, k, out, lse, groups, spec, dkv)
    assert shapes == {(name, 50, keys) for name in ("forward", "backward") for keys in (50, 100, 150, 200)}
