"""All-to-all around attention: the ranks of a group exchange sequence shards for heads, and back.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); with a ring outside, as in USP (Fang and Zhao, arXiv
2405.07719). Each of U adjacent ranks sends every other rank that rank's heads, and receives the tokens of the
others for its own heads. Then the group's tokens, put in order, are one zigzag shard of a ring of CP/U ranks
(zigzag.py), or the complete sequence. With fewer KV heads than ranks, neighbours receive the same KV head;
its gradients are summed in float32 on the rank it came from.

Shapes: S tokens of the complete sequence, s = S/CP of this rank, b sequences, h query heads, g KV heads, d
head dimension; inside, h/U query heads and n = max(g/U, 1) KV heads over U s tokens. Sent per rank and layer,
in the dtype of q unless noted: forward (U - 1) b s d (h/U + 2 n) in and (U - 1) b s d h/U out, and the
logsumexp, (U - 1) b s h/U in float32; backward (U - 1) b s d (3 h/U + 2 n) in with the logsumexp again, and
(U - 1) b s d (h/U + 2 n) out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_ultralong.config import check_heads
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.comm import Communicator, Transfer, receive_buffer
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients

AttentionForward: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (out, lse)."""
AttentionBackward: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], QKVGradients]
"""(dout, q, k, v, out, lse) -> (dq, dk, dv)."""


def ulysses_forward(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, attend: AttentionForward
) -> tuple[Tensor, Tensor]:
    """Return (out [b, h, s, d], lse [b, h, s]) of `attend`, which sees this rank's share of the heads over
    the tokens of all ranks of `comm`.

    q [b, h, s, d]; k, v [b, g, s, d] of one dtype. Raises UserError if the heads cannot be divided
    (`check_heads`).
    """
    check_heads(q.shape[1], k.shape[1], comm.size)
    q_inside, k_inside, v_inside = _to_heads([q, k, v], comm)
    out, lse = attend(q_inside, k_inside, v_inside)
    transfers = [_to_sequence([out], comm), _to_sequence([lse.unsqueeze(-1)], comm)]
    out, lse = (_join_heads(_wait(*transfer), q.shape[1]) for transfer in transfers)
    return out, lse.squeeze(-1)


def ulysses_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    comm: Communicator,
    attend_backward: AttentionBackward,
) -> QKVGradients:
    """Return gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as returned by
    `ulysses_forward`."""
    check_heads(q.shape[1], k.shape[1], comm.size)
    inside = *_to_heads([dout, q, k, v, out], comm), _to_heads([lse.unsqueeze(-1)], comm)[0].squeeze(-1)
    gradients = attend_backward(*inside)
    received = _wait(*_to_sequence(gradients, comm)).split([x.shape[1] for x in gradients], dim=2)
    dq, dk, dv = (_join_heads(x, like.shape[1]) for x, like in zip(received, (q, k, v), strict=True))
    return dq, dk, dv


def _to_heads(tensors: Sequence[Tensor], comm: Communicator) -> tuple[Tensor, ...]:
    """[b, heads, s, d] each -> [b, heads/U or 1, U s, d]: this rank's heads, tokens in order of position. One
    message."""
    size = comm.size
    counts = [max(x.shape[1] // size, 1) for x in tensors]
    b, _, s, d = tensors[0].shape
    send = tensors[0].new_empty((size, b, sum(counts), s, d))
    for rank in range(size):
        for buffer, x, count in zip(send[rank].split(counts, dim=1), tensors, counts, strict=True):
            first = rank * x.shape[1] // size  # with fewer heads than ranks: the head that ranks share
            buffer.copy_(x.narrow(1, first, count))
    receive = receive_buffer(send.shape, send.dtype, send.device)
    comm.all_to_all(send, receive).wait()
    return zigzag.unshard(list(receive), 2).split(counts, dim=1)


def _to_sequence(tensors: Sequence[Tensor], comm: Communicator) -> tuple[Transfer, Tensor, Tensor]:
    """[b, n, U s, d] each -> [U, b, n of all, s, d]: what each rank's heads give for our tokens. One message,
    in flight."""
    counts = [x.shape[1] for x in tensors]
    b, _, tokens, d = tensors[0].shape
    send = tensors[0].new_empty((comm.size, b, sum(counts), tokens // comm.size, d))
    for rank in range(comm.size):
        for buffer, x in zip(send[rank].split(counts, dim=1), tensors, strict=True):
            buffer.copy_(zigzag.shard(x, rank, comm.size, 2))
    receive = receive_buffer(send.shape, send.dtype, send.device)
    return comm.all_to_all(send, receive), send, receive


def _wait(transfer: Transfer, send: Tensor, receive: Tensor) -> Tensor:
    transfer.wait()  # `send` lives until here
    return receive


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """[U, b, n, s, d] -> [b, heads, s, d]; heads that several ranks had in common are summed."""
    if x.shape[0] * x.shape[2] > heads:
        shared = x.unflatten(0, (heads, -1))  # [heads, U/heads, b, 1, s, d]
        x = shared.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return x.movedim(0, 1).flatten(1, 2)
