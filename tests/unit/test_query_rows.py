"""Attention of some rows at a time: outputs of all chunks, and the sums of their gradients, against the whole
in one go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ultralong.context_parallel import ring as ring_module
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.ring import ring_backward, ring_forward
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual

PIECE = 12


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 5, 12, 24])
@pytest.mark.parametrize("stretches", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_queries_make_up_the_whole(
    cp: int, chunk: int, stretches: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "KEY_BLOCK", 5)
    length = PIECE * 2 * cp
    generator = torch.Generator().manual_seed(cp)
    q, k, v, dout = (
        torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    starts = [0, 1, 7, PIECE + 1, length - 3] if packed else None

    def rank(ring: Any) -> None:
        q_, k_, v_, dout_ = (zigzag.shard(x, ring.rank, cp, 2) for x in (q, k, v, dout))
        out, lse = ring_forward(q_, k_, v_, ring, starts=starts)
        want = ring_backward(dout_, q_, k_, v_, out, lse, ring, starts=starts)
        dk, dv = torch.zeros_like(k_), torch.zeros_like(v_)
        sums = torch.zeros(2, *k_.shape, dtype=k_.dtype)
        # A chunk is the same rows of each of `stretches` equal parts, as tensor parallel ranks gather them.
        t = 2 * PIECE // stretches
        for first in range(0, t, chunk):
            rows = [slice(part * t + first, part * t + min(first + chunk, t)) for part in range(stretches)]
            here = (slice(None), slice(None), [i for run in rows for i in range(run.start, run.stop)])
            out_c, lse_c = ring_forward(q_[here], k_, v_, ring, starts=starts, rows=rows)
            torch.testing.assert_close(out_c, out[here])
            torch.testing.assert_close(lse_c, lse[here])
            dq, dk_share, dv_share = ring_backward(
                dout_[here], q_[here], k_, v_, out_c, lse_c, ring, starts=starts, rows=rows
            )
            torch.testing.assert_close(dq, want[0][here])
            dk += dk_share
            dv += dv_share
            dq, dk_sum, dv_sum = ring_backward(
                dout_[here], q_[here], k_, v_, out_c, lse_c, ring, starts=starts, rows=rows, sums=sums
            )
            torch.testing.assert_close(dq, want[0][here])
            assert dk_sum.data_ptr() == sums[0].data_ptr() and dv_sum.data_ptr() == sums[1].data_ptr()
        torch.testing.assert_close(dk, want[1])
        torch.testing.assert_close(dv, want[2])
        torch.testing.assert_close(sums, torch.stack(want[1:]))

    run_virtual(rank, cp)


def test_rows_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 12, 8)
    for rows in (None, [slice(0, 3)], [slice(10, 14)], [slice(0, 4), slice(4, 5)]):
        with pytest.raises(ValueError, match="are not"):
            ring_forward(q, k, k, None, rows=rows)
