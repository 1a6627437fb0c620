"""Attention of new tokens over keys and values that are kept, of which every context-parallel rank holds a
share.

What a rank keeps lies before all new tokens, so no mask is needed there and it does not matter which rank
keeps what. New queries go to all ranks, each attends with its own keys, and the partial outputs come back and
are merged by their logsumexps in float32. Exact, and what is sent does not grow with what is kept: keys and
values stay where they are.

Shapes: n new tokens, c of them on this rank, h query heads, g KV heads, t kept tokens of this rank, d head
dimension. Bytes that a rank sends, a layer: `chunk` (CP - 1) c h (d e + 4 (d + 1)), e bytes of an element;
`tokens` (CP - 1) n h 4 (d + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.comm import PeerGroup, Peers, as_peers
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import merge_, merge_all

FEW = 2048
"""Queries; see `_backend`."""
Kept = Sequence[tuple[Tensor, Tensor]]
"""Stretches of keys and values, each [1, g, t, d]; t may be 0."""


def chunk(
    q: Tensor, k: Tensor, v: Tensor, kept: Kept, group: PeerGroup, scale: float | None = None
) -> Tensor:
    """Causal attention of CP c consecutive tokens over all ranks' `kept` and themselves -> [1, h, c, d] in
    the dtype of q.

    q [1, h, c, d] and k, v [1, g, c, d] of this rank, which has tokens rank x c to (rank + 1) x c. Every rank
    calls it with the same c.
    """
    peers = as_peers(group)
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    c = q.shape[2]
    asked = q if peers is None else _gather(q, peers).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [1, h, CP c, d]
    out = torch.zeros(asked.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lse = torch.full(asked.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    own, later = slice(rank * c, (rank + 1) * c), slice((rank + 1) * c, size * c)
    out[:, :, own], lse[:, :, own] = kernels.forward(q, k, v, True, scale, backend=_backend(q))
    out[:, :, later], lse[:, :, later] = _unmasked(asked[:, :, later], k, v, scale)
    for keys, values in kept:
        if keys.shape[2]:  # so that of two logsumexps that are merged one is finite
            merge_(out, lse, *_unmasked(asked, keys, values, scale))
    if peers is None:
        return out.to(q.dtype)
    return merge_all(*_exchange(out, lse, peers))[0].to(q.dtype)


def tokens(
    q: Tensor,
    shared: Kept,
    own: Sequence[tuple[Tensor, Tensor]],
    group: PeerGroup,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest token of each of n sequences over all ranks' keys -> [1, h, n, d] in the dtype
    of q.

    q [1, h, n, d], equal on every rank. shared: what all sequences have in common; own: of each sequence
    alone, its newest token's included, on the rank that keeps it.
    """
    parts = [_unmasked(q, keys, values, scale) for keys, values in shared]
    single = [_unmasked(q[:, :, i : i + 1], *stretch, scale) for i, stretch in enumerate(own)]
    parts.append((torch.cat([out for out, _ in single], dim=2), torch.cat([lse for _, lse in single], dim=2)))
    out, lse = merge_all(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    peers = as_peers(group)
    if peers is not None:
        every = _gather(torch.cat([out, lse.unsqueeze(-1)], dim=-1), peers)  # [CP, 1, h, n, d + 1]
        out, lse = merge_all(every[..., :-1], every[..., -1])
    return out.to(q.dtype)


def _unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [1, h, n, d] over all of k, v [1, g, t, d].

    Without a mask the m = h/g query heads of a KV head may as well be more tokens of one head: a single
    decoded token is then a product of matrices, and every key is read once.
    """
    _, h, n, d = q.shape
    g = k.shape[1]
    folded = q.reshape(1, g, h // g * n, d)
    out, lse = kernels.forward(folded, k, v, False, scale, backend=_backend(folded))
    return out.reshape(1, h, n, d), lse.reshape(1, h, n)


def _backend(q: Tensor) -> kernels.Backend | None:
    """cuDNN builds a plan for every new shape, and with each token that is kept there is one: not worth it
    for few queries."""
    few = q.shape[2] < FEW and kernels.choose(q.device, q.dtype, q.shape[3]) == "cudnn"
    return "flash" if few else None


def _gather(x: Tensor, peers: Peers) -> Tensor:
    """x of every rank: [CP, *x.shape]."""
    x = x.contiguous()
    every = x.new_empty(peers.size, *x.shape)
    peers.all_gather(x, every).wait()
    return every


def _exchange(out: Tensor, lse: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
    """Partial results [1, h, CP c, d] for all ranks' queries -> every rank's for ours: [CP, 1, h, c, d] and
    [CP, 1, h, c]."""
    packed = torch.cat([out, lse.unsqueeze(-1)], dim=-1)
    send = packed.unflatten(2, (peers.size, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [CP, 1, h, c, d + 1]
    del packed
    received = torch.empty_like(send)
    peers.all_to_all(send, received).wait()
    return received[..., :-1], received[..., -1]
