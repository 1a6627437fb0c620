"""Bytes that the layer at work holds on a GPU beyond what is kept for the backward, for each way through it;
and what its attention sends.

Sums of the tensors that exist at the same time, at the points where that is most (docs/plan.md). With
memory.recompute=all_but_attention they are held to counted tensors by tests/distributed/test_planned_memory.py; what
kernels hold inside is estimated.

Letters as in planning/memory.py, on one rank: n tokens (b s), c of them a chunk; `hidden`, `q`, `kv` elements
a token of the hidden states, the queries, and the keys (or values), by TP. All-to-all over U, a ring or
gather over R = CP/U.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ultralong.config import KEY_BLOCK, Model, Run


class Shape(NamedTuple):
    """Sizes of a layer on one rank."""

    tokens: int
    chunk: int
    e: int
    hidden: int
    q: int
    kv: int
    kv_inside: int
    """As `kv`, a token of the rank, where an all-to-all has sent KV heads more than once."""
    heads: int
    mlp: int
    ring: int
    """R."""

    @classmethod
    def of(cls, run: Run, model: Model) -> Shape:
        p, m = run.parallel, run.memory
        tokens = run.train.micro_batch * run.train.seq_length // p.cp
        kv_heads = model.kv_heads // p.tp
        return cls(
            tokens=tokens,
            chunk=min(m.layer_chunk or tokens, tokens) if m.recompute == "all_but_attention" else tokens,
            e=2 if run.train.precision == "bf16" else 4,
            hidden=model.hidden_size // p.tp,
            q=model.heads // p.tp * model.head_dim,
            kv=kv_heads * model.head_dim,
            kv_inside=max(kv_heads, p.ulysses) * model.head_dim,
            heads=model.heads // p.tp,
            mlp=model.ffn_size // p.tp,
            ring=p.cp // p.ulysses,
        )


def at_work(run: Run, model: Model) -> int:
    """Bytes of the layer at work where most."""
    if run.memory.recompute != "all_but_attention":
        return _whole(run, model)
    return max(phases(run, model).values()) + weight_gradients(run, model)


def weight_gradients(run: Run, model: Model) -> int:
    """Bytes of a layer's weight gradients of one chunk and, where there are several, of their float32 sums."""
    x = Shape.of(run, model)
    weights = x.hidden * (2 * x.q + 2 * x.kv + 3 * x.mlp) * run.parallel.tp
    return weights * (x.e + (4 if x.chunk < x.tokens else 0))


def phases(run: Run, model: Model) -> dict[str, int]:
    """With memory.recompute=all_but_attention, bytes at the points where most is held, weight gradients apart."""
    assert run.memory.offload != "auto", "settle_offload comes first"
    x, p = Shape.of(run, model), run.parallel
    hidden, qkv = x.tokens * x.hidden * x.e, x.tokens * (x.q + 2 * x.kv) * x.e
    # A gradient that a pipeline stage received stays beside that of the layer's input; any other becomes it
    # in place.
    gradients = hidden * (2 if p.pp > 1 else 1)
    # Gate and up, silu, a copy of up, their product, its gradient and one of gate or up; norms and residuals.
    # Gathered over TP: a linear's input, and its gradient before it is scattered.
    mlp = x.chunk * (7 * x.mlp + 6 * x.hidden + (2 * model.hidden_size if p.tp > 1 else 0)) * x.e
    if run.memory.query_chunks:
        kv = x.tokens * 2 * x.kv
        # Two buffers of keys and values go round, and a second one of the sums of their gradients.
        ring = kv * 2 * x.e if x.ring > 1 else 0
        forward = kv * x.e + hidden * (1 if run.memory.offload == "off" else 2)
        backward = kv * (x.e + 4) + gradients
        # A chunk's queries and what came with them, output, its gradient, the queries' gradient twice in e
        # and in float32; its input, and what comes from the host or goes there.
        rows = x.chunk * (3 * x.hidden * x.e + (5 * x.q + 2 * x.kv) * x.e + 4 * x.q)
        shares = 2 * x.kv * (x.tokens if x.ring > 1 else min(KEY_BLOCK, x.tokens)) * x.e
        beside = x.chunk * (2 * x.hidden + x.q) * x.e
        return {
            "forward, attention": forward + ring + rows,
            "forward, MLP": forward + beside + mlp // 2,
            "backward, MLP": backward + beside + mlp,
            "backward, attention": backward
            + rows
            + shares
            + ring
            + (kv * 4 if ring else 0)
            + _kernel(x, x.chunk),
        }
    # Going forward, this layer's own input, output and logsumexp, where the two layers that "layer
    # checkpoints" has are others.
    own = {"off": 0, "layer_inputs": hidden, "all": hidden + x.tokens * (x.q * x.e + 4 * x.heads)}[
        run.memory.offload
    ]
    out = x.tokens * x.q * x.e
    return {
        "forward, attention": own + qkv + _attention_forward(run, model, x),
        "forward, MLP": own + hidden + mlp // 2,
        "backward, MLP": gradients + out + mlp,
        "backward, attention": gradients + out + qkv + _attention_backward(run, model, x),
    }


def _kernel(x: Shape, rows: int) -> int:
    """Inside a backward kernel of `rows` queries: their gradient in float32. An estimate: what is inside
    kernels is not seen by counting tensors."""
    return rows * x.q * 4


def _attention_forward(run: Run, model: Model, x: Shape) -> int:
    """Bytes of attention going forward beside its q, k and v, and beside its output where that is kept."""
    inside, received = x.tokens * (x.q + 2 * x.kv_inside) * x.e, x.tokens * x.q * x.e
    u = run.parallel.ulysses
    if x.ring == 1:
        most = 0
    elif (
        run.parallel.cp_comm_type == "all_gather"
    ):  # the output in float32, and a part of it; a KV head of the whole sequence, twice
        most = x.tokens * x.q * (4 + x.e) + 2 * _head(run, model, x.e)
    else:  # the same, and two KV buffers
        most = x.tokens * (x.q * (4 + x.e) + 4 * x.kv_inside * x.e)
    if u == 1:
        return most
    # Sent, received and put in order; then what is inside, its output, and that sent and received.
    return max(
        3 * inside, inside + max(most + (received if x.ring > 1 else 0), received), inside + 3 * received
    )


def _attention_backward(run: Run, model: Model, x: Shape) -> int:
    """Bytes of its backward beside q, k, v, output and its gradient."""
    gradients = x.tokens * (x.q + 2 * x.kv_inside) * x.e
    u = run.parallel.ulysses
    most = gradients
    if x.ring > 1:
        # Of the own part first in e, then summed in float32.
        wide = x.tokens * (x.q + 2 * x.kv_inside) * 4
        if (
            run.parallel.cp_comm_type == "all_gather"
        ):  # keys and values of a head twice, their float32 gradients twice, and a part's in e
            most = wide + max(
                gradients + 2 * _head(run, model, 4),
                gradients + 2 * _head(run, model, x.e),
                x.tokens * x.q // (x.kv_inside // model.head_dim) * x.e
                + 3 * _head(run, model, x.e)
                + 2 * _head(run, model, 4),
            )
        else:  # two buffers of keys and values, a second of their gradients, and a hop's shares
            most = gradients + wide + x.tokens * (4 * x.kv_inside * x.e + 2 * x.kv_inside * 4)
    most += _kernel(x, x.tokens)
    if u == 1:
        return most
    inside = x.tokens * (3 * x.q + 2 * x.kv_inside) * x.e
    return max(3 * inside, inside + most, inside + 3 * gradients)


def _head(run: Run, model: Model, size: int) -> int:
    """Bytes of one KV head of the whole sequence."""
    return 2 * run.train.micro_batch * run.train.seq_length * model.head_dim * size


def _whole(run: Run, model: Model) -> int:
    """Recompute, or what there is of it, and backward of a layer through autograd, all tokens at once."""
    x = Shape.of(run, model)
    attention = (x.q + 2 * x.kv) * x.e  # q, k, v out of the projection
    attention += (x.q + x.kv) * x.e + 2 * x.q * x.e  # q and k rotated; the output and its gradient
    attention += (x.q + 2 * x.kv) * 4  # dq, dk, dv, float32
    # Two buffers each of k, v in e and of dk, dv in float32; or a KV head of the whole sequence twice, and
    # its gradients.
    ring = 2 * 2 * x.kv_inside * (x.e + 4) * x.tokens if x.ring > 1 else 0
    if ring and run.parallel.cp_comm_type == "all_gather":
        ring = 2 * _head(run, model, x.e + 4)
    # What is sent and received of five tensors in the backward, and what is inside.
    exchange = 3 * (3 * x.q + 2 * x.kv_inside) * x.e if run.parallel.ulysses > 1 else 0
    mlp = 5 * x.mlp * x.e  # gate, up and their product; the gradients of gate and up
    # With sequence parallelism a linear's input is gathered over TP, and so is its gradient before it is
    # scattered.
    gathered = 2 * model.hidden_size * x.e if run.parallel.tp > 1 else 0
    residual = 4 * x.hidden * x.e  # the layer's input, both norms' outputs, the gradient
    return (attention + mlp + gathered + residual + exchange) * x.tokens + ring


# ---- what attention sends ----------------------------------------------------------------------


class Sent(NamedTuple):
    """Of a rank for one layer and micro-batch, each time that attention goes forward, or backward."""

    exchange: float
    """Bytes of all-to-all."""
    ring: float
    """Bytes of keys and values (and backward their gradients) round the ring, or gathered and scattered."""
    hops: int
    """Messages of the ring or gather."""
    merge: float
    """Bytes read and written in the GPU's memory to add up parts."""


def chunks(run: Run, model: Model) -> int:
    """Times that keys go round in a pass through attention: once for each chunk of queries."""
    x = Shape.of(run, model)
    return -(-x.tokens // x.chunk) if run.memory.query_chunks else 1


def sent(run: Run, model: Model) -> tuple[Sent, Sent]:
    """(forward, backward)."""
    x, u = Shape.of(run, model), run.parallel.ulysses
    q, kv = x.tokens * x.q, x.tokens * 2 * x.kv_inside  # elements
    forward = backward = 0.0
    if u > 1:
        share, lse = (u - 1) / u * x.e, (u - 1) / u * 4 * x.tokens * x.heads
        forward, backward = share * (2 * q + kv) + lse, share * (4 * q + 2 * kv) + lse
    others = x.ring - 1
    if run.parallel.cp_comm_type == "all_gather":
        heads = x.kv_inside // model.head_dim // u
        # Queries meet all keys before them at once; the gradients of keys are as many as the whole
        # sequence's.
        return (
            Sent(forward, others * kv * x.e, heads if others else 0, (q * (x.e + 16)) if others else 0.0),
            Sent(
                backward,
                others * kv * (x.e + 4),
                2 * heads if others else 0,
                (q * (x.e + 8) + x.ring * kv * (x.e + 8)) if others else 0.0,
            ),
        )
    times = chunks(run, model)
    # Each hop but the first sees all queries and half of the keys, or half of the queries and all keys: three
    # quarters of the rows on average. A partial output is cast to float32 and interpolated with the sum; a
    # partial gradient is added to the sum.
    rows, hops = 0.75 * others, times * x.ring if others else 0
    return (
        Sent(forward, times * others * kv * x.e, hops, rows * q * (x.e + 16)),
        Sent(
            backward,
            times * (others * kv * x.e + (x.ring * kv * 4 if others else 0)),
            hops,
            rows * (q + times * kv) * (x.e + 8),
        ),
    )
