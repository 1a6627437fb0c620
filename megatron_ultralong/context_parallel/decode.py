"""Attention of new tokens over cached keys and values, of which every context-parallel rank holds a share.

Cached tokens come before all new tokens, so they need no mask, and it does not matter which rank caches which
tokens. New queries go to all ranks, each attends with its own keys, and the partial outputs come back and are
merged by their logsumexps in float32. The result is exact, and the traffic does not grow with the cache: keys
and values stay where they are.

Shapes: n new tokens, c of them on this rank, h query heads, g KV heads, t cached tokens of this rank, d head
dimension. Bytes sent per rank and layer: `prefill_attention` (CP - 1) c h (d e + 4 (d + 1)), e bytes per
element; `decode_attention` (CP - 1) n h 4 (d + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.context_parallel.comm import Communicator, Group, communicator, rank_and_size
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype, merge_, merge_all

CUDNN_MIN_QUERIES = 2048
"""With fewer queries cuDNN is not used; see `_backend`."""
CUDNN_MULTIPLE = 1024
"""Nor for other numbers of queries or keys than multiples of this one."""
CachedKV = Sequence[tuple[Tensor, Tensor]]
"""Keys and values in one or more pieces, each [1, g, t, d]; t may be 0."""


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cached: CachedKV, group: Group, scale: float | None = None
) -> Tensor:
    """Compute causal attention of CP c consecutive tokens over all ranks' `cached` tokens and themselves ->
    [1, h, c, d] in the dtype of q.

    q [1, h, c, d] and k, v [1, g, c, d] of this rank, which has tokens rank x c to (rank + 1) x c. Every rank
    calls it with the same c.
    """
    comm = communicator(group)
    rank, size = rank_and_size(comm)
    c = q.shape[2]
    q_all = q if comm is None else _gather(q, comm).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [1, h, CP c, d]
    out = torch.zeros(q_all.shape, dtype=accumulation_dtype(q), device=q.device)
    lse = torch.full(q_all.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    own, later = slice(rank * c, (rank + 1) * c), slice((rank + 1) * c, size * c)
    out[:, :, own], lse[:, :, own] = kernels.forward(q, k, v, True, scale, backend=_backend(q, k))
    out[:, :, later], lse[:, :, later] = _unmasked(q_all[:, :, later], k, v, scale)
    for keys, values in cached:
        if keys.shape[2]:  # so that one of the two merged logsumexps is finite
            merge_(out, lse, *_unmasked(q_all, keys, values, scale))
    if comm is None:
        return out.to(q.dtype)
    return merge_all(*_exchange(out, lse, comm))[0].to(q.dtype)


def decode_attention(
    q: Tensor,
    shared: CachedKV,
    own: Sequence[tuple[Tensor, Tensor]],
    group: Group,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of the newest token of each of n sequences over all ranks' keys -> [1, h, n, d] in
    the dtype of q.

    q [1, h, n, d], equal on every rank. shared: the cache that all sequences have in common; own: one cache
    per sequence, including its newest token on the rank that caches it.
    """
    partial = [_unmasked(q, keys, values, scale) for keys, values in shared]
    single = [_unmasked(q[:, :, i : i + 1], *kv, scale) for i, kv in enumerate(own)]
    partial.append(
        (torch.cat([out for out, _ in single], dim=2), torch.cat([lse for _, lse in single], dim=2))
    )
    out, lse = merge_all(torch.stack([out for out, _ in partial]), torch.stack([lse for _, lse in partial]))
    comm = communicator(group)
    if comm is not None:
        gathered = _gather(torch.cat([out, lse.unsqueeze(-1)], dim=-1), comm)  # [CP, 1, h, n, d + 1]
        out, lse = merge_all(gathered[..., :-1], gathered[..., -1])
    return out.to(q.dtype)


def _unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [1, h, n, d] over all of k, v [1, g, t, d].

    Without a mask the m = h/g query heads of a KV head may be treated as more tokens of one head: a single
    decoded token is then a matrix product, and every key is read once.
    """
    _, h, n, d = q.shape
    g = k.shape[1]
    folded = q.reshape(1, g, h // g * n, d)
    out, lse = kernels.forward(folded, k, v, False, scale, backend=_backend(folded, k))
    return out.reshape(1, h, n, d), lse.reshape(1, h, n)


def _backend(q: Tensor, k: Tensor) -> Backend | None:
    """Not cuDNN for few queries, where every cached token changes the shape, nor for the last chunk of a
    prompt, whose length is that prompt's own: cuDNN would build and keep a plan for each. Whole chunks have
    few shapes."""
    n, t = q.shape[2], k.shape[2]
    few_shapes = n >= CUDNN_MIN_QUERIES and n % CUDNN_MULTIPLE == t % CUDNN_MULTIPLE == 0
    return None if few_shapes else kernels.without_cudnn(q)


def _gather(x: Tensor, comm: Communicator) -> Tensor:
    """x of every rank: [CP, *x.shape]."""
    x = x.contiguous()
    gathered = x.new_empty(comm.size, *x.shape)
    comm.all_gather(x, gathered).wait()
    return gathered


def _exchange(out: Tensor, lse: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Partial results [1, h, CP c, d] for all ranks' queries -> every rank's for ours: [CP, 1, h, c, d] and
    [CP, 1, h, c]."""
    packed = torch.cat([out, lse.unsqueeze(-1)], dim=-1)
    send = packed.unflatten(2, (comm.size, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [CP, 1, h, c, d + 1]
    del packed
    received = torch.empty_like(send)
    comm.all_to_all(send, received).wait()
    return received[..., :-1], received[..., -1]
