"""Attention over gathered keys: a rank fetches the whole KV of one KV head after the other.

Queries stay, as in the ring, but the keys of all ranks come by one all-gather a head, so no hop waits for
another, and the backward returns dKV by one reduce-scatter a head, in float32 (the gather of Llama 3's
training, arXiv 2407.21783, taken head by head). The next head is fetched while this one is computed.

Shapes: S tokens of the whole sequence, s = S/CP of this rank, b sequences, h query heads in g KV heads of r =
h/g, d head dimension. Memory beyond inputs and outputs: KV of one head over all tokens twice (arriving, and
in order of position), 2 x [2, b, 1, S, d], and the float32 output; in the backward also dQ and dKV in
float32, and twice the float32 dKV of one head over all tokens. On the wire, a rank and layer: forward (CP -
1) x KV, as the ring; backward (CP - 1) x KV and (CP - 1) x float32 dKV.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import partial_attention, zigzag
from megatron_ultralong.context_parallel.comm import PeerGroup, Peers, Transfer, as_peers
from megatron_ultralong.context_parallel.kernels.select import Gradients
from megatron_ultralong.context_parallel.zigzag import Starts


def gather_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: PeerGroup,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32); arguments and what is raised as for
    `ring_forward`."""
    peers = as_peers(group)
    s, documents = partial_attention.check(q, k, v, starts, 1 if peers is None else peers.size)
    backend = partial_attention.backend(q, documents)
    if peers is None:
        return partial_attention.forward_own(q, k, v, zigzag.parts(0, 0, s, 1, documents), scale, backend)
    before = zigzag.parts_before(peers.rank, s, peers.size, documents)
    heads = _whole_heads(k, v, peers)
    own, lse = partial_attention.forward_own(
        q, k, v, zigzag.parts_within(peers.rank, s, peers.size, documents), scale, backend
    )
    out = own.to(partial_attention.wide(q))
    del own
    for rows, (k_all, v_all) in zip(_query_heads(q, k), heads, strict=True):
        for part in before:
            partial_attention.merge_part(
                out[:, rows], lse[:, rows], q[:, rows], k_all, v_all, part, scale, backend
            )
    return out.to(q.dtype), lse


def gather_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: PeerGroup,
    *,
    scale: float | None = None,
    starts: Starts | None = None,
) -> Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as `gather_forward` gave them."""
    peers = as_peers(group)
    s, documents = partial_attention.check(q, k, v, starts, 1 if peers is None else peers.size)
    backend = partial_attention.backend(q, documents)
    if peers is None:
        return partial_attention.backward_own(
            dout, q, k, v, out, lse, zigzag.parts(0, 0, s, 1, documents), scale, backend
        )
    before = zigzag.parts_before(peers.rank, s, peers.size, documents)
    heads = _whole_heads(k, v, peers)
    own = partial_attention.backward_own(
        dout, q, k, v, out, lse, zigzag.parts_within(peers.rank, s, peers.size, documents), scale, backend
    )
    dq, dk, dv = (x.to(partial_attention.wide(x)) for x in own)
    del own
    shape = (2, k.shape[0], 1, s, k.shape[3])
    dkv_all = dk.new_empty((*shape[:3], s * peers.size, shape[4]))  # of one head, in order of position
    leaving, home = (
        dk.new_empty((peers.size, *shape)),
        dk.new_empty(shape),
    )  # the same by rank; the sum of what all have of our tokens
    transfer: Transfer | None = None
    for head, (rows, (k_all, v_all)) in enumerate(zip(_query_heads(q, k), heads, strict=True)):
        dkv_all.zero_()
        for part in before:
            dq_share, *dkv_share = partial_attention.part_gradients(
                dout[:, rows], q[:, rows], k_all, v_all, out[:, rows], lse[:, rows], part, scale, backend
            )
            dq[:, rows, part.queries] += dq_share
            for whole, share in zip(dkv_all, dkv_share, strict=True):
                whole[:, :, part.keys] += share
        if transfer is not None:
            _add_head(dk, dv, head - 1, transfer, home)
        for rank, to in enumerate(leaving):
            to.copy_(zigzag.shard(dkv_all, rank, peers.size, 3))
        transfer = peers.reduce_scatter(leaving, home)
    assert transfer is not None
    _add_head(dk, dv, k.shape[1] - 1, transfer, home)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _query_heads(q: Tensor, k: Tensor) -> list[slice]:
    """The query heads of every KV head."""
    r = q.shape[1] // k.shape[1]
    return [slice(first, first + r) for first in range(0, q.shape[1], r)]


def _whole_heads(k: Tensor, v: Tensor, peers: Peers) -> Iterator[Tensor]:
    """KV [2, b, 1, S, d] of one head after the other, in order of position; valid until the next is asked
    for.

    The first is under way when this returns, and each next one while its predecessor is being used.
    """

    def fetch(head: int) -> tuple[Transfer, Tensor]:
        send = torch.stack((k[:, head : head + 1], v[:, head : head + 1]))  # [2, b, 1, s, d]
        return peers.all_gather(send, arriving), send

    def arrive(under_way: tuple[Transfer, Tensor]) -> Iterator[Tensor]:
        for head in range(k.shape[1]):
            under_way[0].wait()
            zigzag.unshard(list(arriving), 3, out=whole)
            if head + 1 < k.shape[1]:
                under_way = fetch(head + 1)
            yield whole

    b, _, s, d = k.shape
    arriving = k.new_empty((peers.size, 2, b, 1, s, d))
    whole = k.new_empty((2, b, 1, peers.size * s, d))
    return arrive(fetch(0))


def _add_head(dk: Tensor, dv: Tensor, head: int, transfer: Transfer, home: Tensor) -> None:
    transfer.wait()
    for whole, share in zip((dk, dv), home, strict=True):
        whole[:, head : head + 1] += share
