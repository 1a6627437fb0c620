"""The merge of merge.py as one Triton kernel: reads and writes every element once and allocates nothing.

Shapes: b sequences, h heads, s tokens, d head dimension; a program merges BLOCK tokens of one head.
"""

from __future__ import annotations

import threading

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Tokens per program."""
launching = threading.Lock()
"""Triton loads a kernel at its first launch, one thread at a time: a second one would find it half loaded."""


def merge_(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """As `merge.merge_`; out and lse float32 with any strides."""
    b, h, s, d = out.shape
    if out.numel() == 0:
        return
    with launching:
        _merge[(triton.cdiv(s, BLOCK), b * h)](
            out,
            lse,
            partial,
            partial_lse,
            h,
            s,
            d,
            *out.stride(),
            *lse.stride(),
            *partial.stride(),
            *partial_lse.stride(),
            BLOCK=BLOCK,
            WIDTH=triton.next_power_of_2(d),
        )


@triton.jit
def _merge(
    out,
    lse,
    partial,
    partial_lse,
    h,
    s,
    d,
    out_b,
    out_h,
    out_s,
    out_d,
    lse_b,
    lse_h,
    lse_s,
    partial_b,
    partial_h,
    partial_s,
    partial_d,
    partial_lse_b,
    partial_lse_h,
    partial_lse_s,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # int64: a head of a million tokens lies beyond 2^31 elements from the first.
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    sequence, head = (tl.program_id(1) // h).to(tl.int64), (tl.program_id(1) % h).to(tl.int64)
    column = tl.arange(0, WIDTH)
    row_valid = token < s
    valid = row_valid[:, None] & (column[None, :] < d)

    lse_at = lse + sequence * lse_b + head * lse_h + token * lse_s
    old = tl.load(lse_at, mask=row_valid, other=0.0)
    new = tl.load(
        partial_lse + sequence * partial_lse_b + head * partial_lse_h + token * partial_lse_s,
        mask=row_valid,
        other=0.0,
    )
    difference = new - old
    weight = 1.0 / (1.0 + tl.exp(-difference))
    tl.store(lse_at, tl.maximum(old, new) + tl.log(1.0 + tl.exp(-tl.abs(difference))), mask=row_valid)

    out_at = out + sequence * out_b + head * out_h + token[:, None] * out_s + column[None, :] * out_d
    partial_at = (
        partial
        + sequence * partial_b
        + head * partial_h
        + token[:, None] * partial_s
        + column[None, :] * partial_d
    )
    old_out = tl.load(out_at, mask=valid, other=0.0)
    new_out = tl.load(partial_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_at, old_out + weight[:, None] * (new_out - old_out), mask=valid)
