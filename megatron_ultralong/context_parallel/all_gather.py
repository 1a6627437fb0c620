"""All-gather attention: a rank gathers the keys and values of the complete sequence, one KV head at a time.

Queries stay, as in the ring, but the keys of all ranks arrive in one all-gather per head, so that no hop
waits for another, and the backward returns dKV by one reduce-scatter per head, in float32 (the all-gather of
Llama 3's training, arXiv 2407.21783, done head by head). The next head is gathered while this one is
computed.

Shapes: S tokens of the complete sequence, s = S/CP of this rank, b sequences, h query heads in g KV heads of
r = h/g, d head dimension. Memory beyond inputs and outputs: KV of one head over all tokens twice (as
received, and in order of position), 2 x [2, b, 1, S, d], and the float32 output; in the backward also dQ and
dKV in float32, and twice the float32 dKV of one head over all tokens. Sent per rank and layer: forward (CP -
1) x KV, as the ring; backward (CP - 1) x KV and (CP - 1) x float32 dKV.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, stack

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator, Transfer, receive_buffer
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype


def all_gather_forward(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return (out [b, h, s, d] in the dtype of q, lse [b, h, s] in float32) of `api.attention`."""
    past = zigzag.past_blocks(comm.rank, k.shape[2], comm.size)
    kv_heads = _gather_heads(k, v, comm)
    own, lse = kernels.forward_diagonal(q, k, v, zigzag.diagonal_blocks(k.shape[2]), spec)
    out = own.to(accumulation_dtype(q))
    del own
    for heads, (k_all, v_all) in zip(_query_heads(q, k), kv_heads, strict=True):
        for block in past:
            kernels.merge_past(out[:, heads], lse[:, heads], q[:, heads], k_all, v_all, block, spec)
    return out.to(q.dtype), lse


def all_gather_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    comm: Communicator,
    spec: AttentionSpec,
) -> QKVGradients:
    """Return gradients (dq, dk, dv) in the dtypes of q, k, v; out and lse as returned by
    `all_gather_forward`."""
    past = zigzag.past_blocks(comm.rank, k.shape[2], comm.size)
    kv_heads = _gather_heads(k, v, comm)
    own = kernels.backward_diagonal(dout, q, k, v, out, lse, zigzag.diagonal_blocks(k.shape[2]), spec)
    dq, dk, dv = (x.to(accumulation_dtype(x)) for x in own)
    del own
    s = k.shape[2]
    shape = (2, k.shape[0], 1, s, k.shape[3])
    dkv_all = dk.new_empty((*shape[:3], s * comm.size, shape[4]))  # of one head, in order of position
    send = dk.new_empty((comm.size, *shape))  # the same by rank
    receive = receive_buffer(shape, dk.dtype, dk.device)  # the sum over ranks for our tokens
    transfer: Transfer | None = None
    for head, (heads, (k_all, v_all)) in enumerate(zip(_query_heads(q, k), kv_heads, strict=True)):
        dkv_all.zero_()
        for block in past:
            dout_h, q_h, out_h, lse_h = (x[:, heads] for x in (dout, q, out, lse))
            dq_block, *dkv_block = kernels.backward_past(dout_h, q_h, k_all, v_all, out_h, lse_h, block, spec)
            dq[:, heads, block.queries] += dq_block
            for total, share in zip(dkv_all, dkv_block, strict=True):
                total[:, :, block.keys] += share
        if transfer is not None:
            _add_head(dk, dv, head - 1, transfer, receive)
        for rank, buffer in enumerate(send):
            buffer.copy_(zigzag.shard(dkv_all, rank, comm.size, 3))
        transfer = comm.reduce_scatter(send, receive)
    assert transfer is not None
    _add_head(dk, dv, k.shape[1] - 1, transfer, receive)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _query_heads(q: Tensor, k: Tensor) -> list[slice]:
    """The query heads of every KV head."""
    r = q.shape[1] // k.shape[1]
    return [slice(first, first + r) for first in range(0, q.shape[1], r)]


def _gather_heads(k: Tensor, v: Tensor, comm: Communicator) -> Iterator[Tensor]:
    """Iterate over the KV heads: KV [2, b, 1, S, d] in order of position, valid until the next one.

    The first is in flight when this returns, and each following one while its predecessor is being used.
    """

    def start(head: int) -> tuple[Transfer, Tensor]:
        send = stack((k[:, head : head + 1], v[:, head : head + 1]))  # [2, b, 1, s, d]
        return comm.all_gather(send, received), send

    def heads(in_flight: tuple[Transfer, Tensor]) -> Iterator[Tensor]:
        for head in range(k.shape[1]):
            in_flight[0].wait()
            zigzag.unshard(list(received), 3, out=in_order)
            if head + 1 < k.shape[1]:
                in_flight = start(head + 1)
            yield in_order

    b, _, s, d = k.shape
    received = receive_buffer((comm.size, 2, b, 1, s, d), k.dtype, k.device)
    in_order = k.new_empty((2, b, 1, comm.size * s, d))
    return heads(start(0))


def _add_head(dk: Tensor, dv: Tensor, head: int, transfer: Transfer, received: Tensor) -> None:
    transfer.wait()
    for total, share in zip((dk, dv), received, strict=True):
        total[:, head : head + 1] += share
