"""All-to-all around attention: between the ranks of a group, sequence shares are exchanged for heads and
back.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); with a ring outside, as in USP (Fang and Zhao, arXiv
2405.07719). Each of U adjacent ranks gives every other the heads that are that one's, and gets the tokens of
the others for its own heads. Then the group's tokens, put in order, are one zigzag share of a ring of CP/U
ranks (zigzag.py), or the whole sequence. With fewer KV heads than ranks, neighbours get the same KV head; its
gradients are summed in float32 where it came from.

Shapes: S tokens of the whole sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d head
dimension; inside, h/U query heads and n = max(g/U, 1) KV heads over U s tokens. On the wire, a rank and
layer, in the dtype of q unless said: forward (U - 1) b s d (h/U + 2 n) in and (U - 1) b s d h/U out, and the
logsumexp, (U - 1) b s h/U in float32; backward (U - 1) b s d (3 h/U + 2 n) in with the logsumexp again, and
(U - 1) b s d (h/U + 2 n) out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.config import check_heads
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.autograd import Backward, Forward
from megatron_ultralong.context_parallel.comm import PeerGroup, Peers, Transfer, as_peers
from megatron_ultralong.context_parallel.kernels.select import Gradients


def ulysses_forward(
    q: Tensor, k: Tensor, v: Tensor, group: PeerGroup, attend: Forward
) -> tuple[Tensor, Tensor]:
    """(out [b, h, s, d], lse [b, h, s]) of `attend`, which sees its share of the heads over the tokens of all
    of `group`.

    q [b, h, s, d]; k, v [b, g, s, d] of one dtype; None or a group of one rank leaves all to `attend`.
    UserError for heads that cannot be divided (`check_heads`).
    """
    peers = as_peers(group)
    if peers is None:
        return attend(q, k, v)
    _check(q, k, v, peers.size)
    q_inside, k_inside, v_inside = _to_heads([q, k, v], peers)
    out, lse = attend(q_inside, k_inside, v_inside)
    transfers = [_to_sequence([out], peers), _to_sequence([lse.unsqueeze(-1)], peers)]
    out, lse = (_collect(_wait(*transfer), q.shape[1]) for transfer in transfers)
    return out, lse.squeeze(-1)


def ulysses_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: PeerGroup,
    attend_backward: Backward,
) -> Gradients:
    """Gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as `ulysses_forward` gave them."""
    peers = as_peers(group)
    if peers is None:
        return attend_backward(dout, q, k, v, out, lse)
    _check(q, k, v, peers.size)
    inside = *_to_heads([dout, q, k, v, out], peers), _to_heads([lse.unsqueeze(-1)], peers)[0].squeeze(-1)
    gradients = attend_backward(*inside)
    received = _wait(*_to_sequence(gradients, peers)).split([x.shape[1] for x in gradients], dim=2)
    dq, dk, dv = (_collect(x, like.shape[1]) for x, like in zip(received, (q, k, v), strict=True))
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, v: Tensor, ulysses: int) -> None:
    if (
        q.dim() != 4
        or k.shape != v.shape
        or k.shape[2:] != q.shape[2:]
        or q.shape[2] % 2
        or not q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [b, h, s, d] and [b, g, s, d] twice, "
            "with s even and all of one dtype"
        )
    check_heads(q.shape[1], k.shape[1], ulysses)


def _to_heads(tensors: Sequence[Tensor], peers: Peers) -> tuple[Tensor, ...]:
    """[b, heads, s, d] each -> [b, heads/U or 1, U s, d]: this rank's heads, tokens in order of position. One
    message."""
    size = peers.size
    counts = [max(x.shape[1] // size, 1) for x in tensors]
    b, _, s, d = tensors[0].shape
    send = tensors[0].new_empty((size, b, sum(counts), s, d))
    for rank in range(size):
        for place, x, count in zip(send[rank].split(counts, dim=1), tensors, counts, strict=True):
            place.copy_(
                x.narrow(1, rank * x.shape[1] // size, count)
            )  # with fewer heads than ranks: the one it shares
    receive = torch.empty_like(send)
    peers.all_to_all(send, receive).wait()
    return zigzag.unshard(list(receive), 2).split(counts, dim=1)


def _to_sequence(tensors: Sequence[Tensor], peers: Peers) -> tuple[Transfer, Tensor, Tensor]:
    """[b, n, U s, d] each -> [U, b, n of all, s, d]: what each rank's heads have for our tokens. One message,
    under way."""
    counts = [x.shape[1] for x in tensors]
    b, _, tokens, d = tensors[0].shape
    send = tensors[0].new_empty((peers.size, b, sum(counts), tokens // peers.size, d))
    for rank in range(peers.size):
        for place, x in zip(send[rank].split(counts, dim=1), tensors, strict=True):
            place.copy_(zigzag.shard(x, rank, peers.size, 2))
    receive = torch.empty_like(send)
    return peers.all_to_all(send, receive), send, receive


def _wait(transfer: Transfer, send: Tensor, receive: Tensor) -> Tensor:
    transfer.wait()  # `send` lives until here
    return receive


def _collect(x: Tensor, heads: int) -> Tensor:
    """[U, b, n, s, d] -> [b, heads, s, d]; where several ranks had the same head, their sum."""
    if x.shape[0] * x.shape[2] > heads:
        shared = x.unflatten(0, (heads, -1))  # [heads, U/heads, b, 1, s, d]
        x = shared.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return x.movedim(0, 1).flatten(1, 2)
