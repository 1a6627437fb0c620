"""The ring for some of a rank's queries at a time, with keys and values of all its tokens.

For layers that compute their queries in chunks (model/layer/query_chunks.py). KV goes round the ring once per
chunk, and dKV is summed over the chunks. A chunk consists of one or more ranges of local tokens
(`spec.query_rows`), because with sequence parallelism it holds the same rows of every tensor-parallel shard.

Shapes as in ring.py; c queries of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.config import KEY_BLOCK
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype
from megatron_ultralong.context_parallel.ring import gradient_sum, hops


def forward_rows(
    q: Tensor, k: Tensor, v: Tensor, ring: Communicator | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return (out [b, h, c, d] in the dtype of q, lse [b, h, c] in float32) of queries q [b, h, c, d]."""
    rows = spec.query_rows
    assert rows is not None
    for hop, (blocks, (k_source, v_source)) in enumerate(hops(k, v, ring, spec)):
        diagonal, past = zigzag.select_query_rows(blocks, rows)
        if hop == 0:
            out, lse = kernels.forward_diagonal(
                q, _select(k_source, rows), _select(v_source, rows), diagonal, spec
            )
            if ring is not None or past:
                out = torch.empty_like(q, dtype=accumulation_dtype(q)).copy_(out)
        # In parts, so that there are few different lengths: cuDNN builds a plan for each.
        for block in zigzag.split_keys(past, KEY_BLOCK):
            kernels.merge_past(out, lse, q, k_source, v_source, block, spec)
        del k_source, v_source  # before the next hop takes memory
    return out.to(q.dtype), lse


def backward_rows(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ring: Communicator | None,
    spec: AttentionSpec,
    dkv_sum: Tensor,
) -> Tensor:
    """Return dq in the dtype of q, and add these queries' shares of dK and dV to dkv_sum [2, b, g, s, d],
    float32."""
    rows = spec.query_rows
    assert rows is not None
    dkv = gradient_sum(dkv_sum, ring, spec)
    for hop, (blocks, (k_source, v_source)) in enumerate(hops(k, v, ring, spec)):
        diagonal, past = zigzag.select_query_rows(blocks, rows)
        if hop == 0:
            dq, dk_own, dv_own = kernels.backward_diagonal(
                dout, q, _select(k_source, rows), _select(v_source, rows), out, lse, diagonal, spec
            )
            dq = dq.to(accumulation_dtype(q))
            lengths = [row.stop - row.start for row in rows]
            for row, *dkv_row in zip(
                rows, dk_own.split(lengths, dim=2), dv_own.split(lengths, dim=2), strict=True
            ):
                dkv.add(row, dkv_row)
            del dk_own, dv_own, dkv_row
        for block in zigzag.split_keys(past, KEY_BLOCK):
            dq_block, *dkv_block = kernels.backward_past(dout, q, k_source, v_source, out, lse, block, spec)
            dq[:, :, block.queries] += dq_block
            dkv.add(block.keys, dkv_block)
        del k_source, v_source
        dkv.send()
    total = dkv.home()
    if total is not dkv_sum:  # after an odd number of hops
        dkv_sum.copy_(total)
    return dq.to(q.dtype)


def _select(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """`rows` of x [b, g, s, d], concatenated; a view if they are one range."""
    return x[:, :, rows[0]] if len(rows) == 1 else torch.cat([x[:, :, r] for r in rows], dim=2)
