"""Every cp_comm_type with and without Ulysses, and documents in packed rows, against full attention: over
virtual ranks."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.config import check_heads
from megatron_ultralong.context_parallel import comm, virtual_ranks
from megatron_ultralong.context_parallel.api import (
    CommType,
    ContextGroups,
    attention,
    attention_backward,
    attention_forward,
    split_group,
)
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator, rank_and_size
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.placement import place
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from megatron_ultralong.errors import UserError
from tests.distributed.test_ring import check, sequence, shard
from tests.packed import held, joined, placed

COMM_TYPES: list[CommType] = ["p2p", "all_gather"]
SIZES = [
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 1),
    (3, 3),
    (4, 1),
    (4, 2),
    (4, 4),
    (6, 3),
    (8, 1),
    (8, 2),
    (8, 4),
    (8, 8),
]
"""(CP, ranks that exchange heads)."""
HEADS = [(24, 24), (24, 12), (24, 3), (24, 2), (24, 1), (8, 4), (9, 3), (6, 3), (7, 7)]


def documents(cp: int, chunk: int) -> dict[str, list[int]]:
    """Document starts of a row of 2 cp zigzag chunks."""
    length = 2 * cp * chunk if cp > 1 else chunk
    generator = torch.Generator().manual_seed(length)
    some = (1 + torch.randint(length, (length // 6,), generator=generator)).unique().tolist()
    packings = {
        "one": [0],
        "one-token documents": list(range(length)),
        "a last token alone, a first one too": sorted({0, 1, length - 1}),
        "every chunk a document": list(range(0, length, chunk)),
        "across every border of chunks": [0, *range(chunk // 2 + 1, length, chunk)],
        "short ones, then one over many ranks": [0, 1, 2, 4],
        "any": [0, *some],
    }
    return {name: [start for start in starts if start < length] for name, starts in packings.items()}


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is received starts as NaN, so that nothing is read before it has arrived, or where nothing
    arrives."""
    monkeypatch.setattr(comm, "_allocate", lambda shape, **kind: torch.full(shape, math.nan, **kind))


def spec(
    starts: Sequence[int] | None,
    length: int,
    groups: ContextGroups,
    scale: float | None = None,
    ranks_per_node: int = 1,
) -> AttentionSpec:
    placement = placed(starts, length, rank_and_size(groups.ring)[1], ranks_per_node)
    return AttentionSpec(placement=placement, scale=scale)


def shards(
    inputs: Sequence[Tensor],
    groups: ContextGroups,
    starts: Any,
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int = 1,
) -> list[Tensor]:
    """This rank's tokens of each."""
    size = rank_and_size(groups.ulysses)[1]
    mine = held(inputs[0].shape[2], groups.rank, groups.size, starts, size, ranks_per_node)
    return [shard(x, groups.rank, groups.size, dtype, mine) for x in inputs]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None) -> Tensor:
    """Causal attention inside documents with every score in memory: q [b, h, S, d], k and v [b, g, S, d]."""
    at = torch.arange(q.shape[2])
    number = torch.bucketize(at, torch.tensor([0] if starts is None else starts), right=True)
    hidden = (number[:, None] != number[None, :]) | (at[:, None] < at[None, :])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v


def expected(inputs: list[Tensor], starts: Sequence[int] | None) -> list[Tensor]:
    """[out, dq, dk, dv] of the complete sequence in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = packed_attention(*leaves, starts)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def compute(
    inputs: list[Tensor],
    groups: ContextGroups,
    starts: Any = None,
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int = 1,
) -> list[Tensor]:
    """[out, dq, dk, dv] of this rank, through autograd."""
    q, k, v, dout = shards(inputs, groups, starts, dtype, ranks_per_node)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    packed = spec(starts, inputs[0].shape[2], groups, ranks_per_node=ranks_per_node)
    out = attention(*leaves, groups, packed)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def fits(h: int, g: int, ulysses: int) -> bool:
    try:
        check_heads(h, g, ulysses)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(("cp", "ulysses"), SIZES)
def test_equal_to_full_attention(cp: int, ulysses: int, comm_type: CommType) -> None:
    """All head counts that fit, one of the packings for each, in turn; also not packed, with two
    sequences."""
    packings = itertools.cycle(documents(cp, 5).items())
    for number, (h, g) in enumerate((h, g) for h, g in HEADS if fits(h, g, ulysses)):
        for b, (name, starts) in ((2, ("not packed", None)), (1, next(packings)), (1, next(packings))):
            inputs = sequence((b, h, g, 5, 8), cp, seed=number)
            want = expected(inputs, starts)
            got = run_virtual(
                lambda r, x=inputs, t=starts: compute(x, split_group(r, ulysses, comm_type), t), cp
            )
            for rank in range(cp):
                mine = held(inputs[0].shape[2], rank, cp, starts, ulysses)
                check(got[rank], want, rank, cp, what=(comm_type, ulysses, h, g, name), held=mine)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(("cp", "ulysses"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 4)])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_every_packing(cp: int, ulysses: int, chunk: int, comm_type: CommType) -> None:
    """In float64, so that a missing or doubled key shows."""
    inputs = sequence((1, 4, 2, chunk, 8), cp, seed=cp)
    for name, starts in documents(cp, chunk).items():
        want = expected(inputs, starts)
        got = run_virtual(
            lambda r, t=starts: compute(inputs, split_group(r, ulysses, comm_type), t, torch.float64), cp
        )
        for rank in range(cp):
            mine = held(inputs[0].shape[2], rank, cp, starts, ulysses)
            check(got[rank], want, rank, cp, 1e-11, what=(comm_type, ulysses, chunk, name), held=mine)


@pytest.mark.parametrize(
    ("cp", "ulysses", "ranks_per_node"),
    [(4, 1, 2), (6, 1, 2), (8, 1, 2), (8, 1, 3), (8, 1, 4), (12, 1, 4), (8, 2, 2)],
)
def test_keys_are_forwarded_inside_nodes(cp: int, ulysses: int, ranks_per_node: int) -> None:
    """As `test_every_packing`, with relays between nodes."""
    inputs = sequence((1, 4, 2, 7, 8), cp, seed=cp)
    relayed = 0
    for name, starts in documents(cp, 7).items():
        want = expected(inputs, starts)
        got = run_virtual(
            lambda r, t=starts: compute(
                inputs, split_group(r, ulysses, "p2p"), t, torch.float64, ranks_per_node
            ),
            cp,
        )
        for rank in range(cp):
            mine = held(inputs[0].shape[2], rank, cp, starts, ulysses, ranks_per_node)
            check(got[rank], want, rank, cp, 1e-11, what=(ulysses, ranks_per_node, name), held=mine)
        placement = placed(starts, inputs[0].shape[2], cp // ulysses, ranks_per_node)
        if placement is not None:
            relayed += sum(one.kind == "relayed" for one in placement.schedules[0].rounds)
    assert relayed > 1


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(("cp", "ulysses"), [(3, 1), (4, 2), (8, 1)])
def test_the_same_bits_whichever_rank_is_late(
    cp: int, ulysses: int, comm_type: CommType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank in turn sends and waits late, then all at random: float32 sums must not depend on it."""
    inputs = sequence((1, 4, 2, 40, 8), cp, seed=7)
    length = inputs[0].shape[2]
    launch, wait = virtual_ranks.VirtualCommunicator._launch, virtual_ranks._Copies.wait
    delay: dict[str, Any] = {"of": lambda rank: 0.0}

    def late_launch(self: Any, *arguments: Any) -> Any:
        time.sleep(delay["of"](self.members[self.rank]))
        copies = launch(self, *arguments)
        copies.rank = self.members[self.rank]
        return copies

    def late_wait(self: Any) -> None:
        time.sleep(delay["of"](self.rank))
        wait(self)

    monkeypatch.setattr(virtual_ranks.VirtualCommunicator, "_launch", late_launch)
    monkeypatch.setattr(virtual_ranks._Copies, "wait", late_wait)
    chance = random.Random(cp)
    delays = [
        *(lambda rank, slow=slow: 0.002 * (rank == slow) for slow in range(cp)),
        lambda rank: chance.uniform(0, 0.002),
    ]
    # The second: a few keys of one document on many ranks, sent to several of them in one round.
    # With nodes of two ranks: gradients of forwarded keys.
    for starts, nodes in ((None, 1), ([0, *range(length // 16, length)], 1), (documents(cp, 40)["any"], 2)):

        def run(r: Communicator, t: Any = starts, n: int = nodes) -> list[Tensor]:
            return compute(inputs, split_group(r, ulysses, comm_type), t, ranks_per_node=n)

        delay["of"] = lambda rank: 0.0
        want = run_virtual(run, cp)
        for number, late in enumerate(delays):
            delay["of"] = late
            for rank, got in enumerate(run_virtual(run, cp)):
                assert all(map(torch.equal, got, want[rank])), (number, rank)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(("cp", "ulysses"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_bf16(cp: int, ulysses: int, comm_type: CommType) -> None:
    inputs = [x.bfloat16().double() for x in sequence((1, 8, 2, 9, 16), cp, seed=4)]
    for starts in (None, documents(cp, 9)["any"]):
        want = expected(inputs, starts)
        results = run_virtual(
            lambda r, t=starts: compute(inputs, split_group(r, ulysses, comm_type), t, torch.bfloat16), cp
        )
        for name, got, y in zip(("out", "dq", "dk", "dv"), zip(*results, strict=True), want, strict=True):
            assert all(x.dtype == torch.bfloat16 for x in got)
            x = joined(got, starts, ulysses).double()
            assert (x - y).norm() / y.norm() < 0.02, f"{name}, {cp} ranks, {ulysses} exchange heads"


def test_scale_and_no_groups() -> None:
    q, k, v, _ = (x.float() for x in sequence((1, 4, 2, 9, 8), 1, seed=2))
    scaled = packed_attention(q * 0.3 * 8**0.5, k, v, [0, 4])
    alone = ContextGroups()
    assert_close(attention(q, k, v, alone, spec([0, 4], 9, alone, 0.3)), scaled, atol=1e-5, rtol=1e-5)
    for comm_type, ulysses in itertools.product(COMM_TYPES, (1, 2)):
        inputs = sequence((1, 4, 2, 3, 8), 4, seed=2)
        want = packed_attention(inputs[0] * 0.3 * 8**0.5, *inputs[1:3], [0, 4])

        def run(
            r: Communicator, u: int = ulysses, w: CommType = comm_type, x: list[Tensor] = inputs
        ) -> Tensor:
            groups = split_group(r, u, w)
            return attention(*shards(x[:3], groups, [0, 4]), groups, spec([0, 4], 24, groups, 0.3))

        found = joined(run_virtual(run, 4), [0, 4], ulysses).double()
        assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(("cp", "ulysses"), [(2, 2), (4, 2), (4, 1)])
def test_logsumexp_is_in_the_callers_order(cp: int, ulysses: int, comm_type: CommType) -> None:
    """What a layer keeps between forward and backward is this rank's shard, whatever the heads did inside."""
    inputs = sequence((1, 4, 2, 3, 8), cp, seed=6)
    starts = [0, 5]
    number = torch.bucketize(torch.arange(inputs[0].shape[2]), torch.tensor(starts), right=True)
    hidden = (number[:, None] != number) | torch.ones(len(number), len(number), dtype=torch.bool).triu(1)
    scores = (inputs[0] @ inputs[1].repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(hidden, -math.inf)
    want = expected(inputs, starts)

    def run(r: Communicator) -> list[Tensor]:
        groups = split_group(r, ulysses, comm_type)
        q, k, v, dout = shards(inputs, groups, starts)
        packed = spec(starts, inputs[0].shape[2], groups)
        out, lse = attention_forward(q, k, v, groups, packed)
        assert lse.dtype == torch.float32 and lse.shape == q.shape[:3] and out.shape == q.shape
        out, lse = (x.contiguous().clone() for x in (out, lse))  # to host memory and back, say
        return [lse, out, *attention_backward(dout, q, k, v, out, lse, groups, packed)]

    for rank, (lse, *got) in enumerate(run_virtual(run, cp)):
        mine = held(inputs[0].shape[2], rank, cp, starts, ulysses)
        check(got, want, rank, cp, held=mine)
        assert_close(lse.double(), scores.logsumexp(-1)[:, :, mine], atol=1e-5, rtol=1e-5)


# ---- bytes sent -----------------------------------------------------------------------------


class Counted:
    """A communicator that counts the bytes it sends to other ranks, by (operation, dtype)."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rank, self.size, self.sent = inner, inner.rank, inner.size, {}

    def _count(self, what: str, send: Tensor, copies: float) -> None:
        key = (what, send.dtype)
        self.sent[key] = self.sent.get(key, 0) + int(send.numel() * send.element_size() * copies)

    def exchange(self, sends: Any, receives: Any) -> Any:
        for rank, message in sends:
            assert message.is_contiguous() and rank != self.rank
            self._count("message", message, 1)
        return self.inner.exchange(sends, receives)

    def send_recv(self, send: Tensor, receive: Tensor) -> Any:
        self._count("hop", send, 1)
        return self.inner.send_recv(send, receive)

    def all_to_all(self, send: Tensor, receive: Tensor) -> Any:
        assert send.is_contiguous() and receive.is_contiguous() and send.shape == receive.shape
        self._count("all-to-all", send, (self.size - 1) / self.size)
        return self.inner.all_to_all(send, receive)

    def all_gather(self, send: Tensor, receive: Tensor) -> Any:
        assert send.is_contiguous() and receive.is_contiguous() and receive.shape == (self.size, *send.shape)
        self._count("all-gather", send, self.size - 1)
        return self.inner.all_gather(send, receive)

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> Any:
        assert send.is_contiguous() and receive.is_contiguous() and send.shape == (self.size, *receive.shape)
        self._count("reduce-scatter", send, (self.size - 1) / self.size)
        return self.inner.reduce_scatter(send, receive)


@pytest.mark.parametrize("starts", [None, [0, 3, 4]])
@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize(
    ("cp", "ulysses", "g"), [(4, 1, 2), (4, 2, 4), (4, 2, 1), (4, 4, 2), (2, 2, 2), (8, 2, 2)]
)
def test_bytes_sent(cp: int, ulysses: int, g: int, comm_type: CommType, starts: list[int] | None) -> None:
    """The formulas of docs/context_parallel.md, packed or not."""
    h, d, s = 8, 8, 6
    inputs = sequence((1, h, g, s // 2, d), cp, seed=1)

    def run(r: Communicator) -> list[dict[Any, int]]:
        groups = split_group(r, ulysses, comm_type)
        counted = [Counted(x) for x in (groups.ring, groups.ulysses) if x is not None]
        groups = ContextGroups(
            ring=counted[0] if groups.ring else None,
            ulysses=counted[-1] if groups.ulysses else None,
            cp_comm_type=comm_type,
        )
        q, k, v, dout = shards(inputs, groups, starts, torch.bfloat16)
        packed = spec(starts, cp * s, groups)
        out, lse = attention_forward(q, k, v, groups, packed)
        forward = {key: count for c in counted for key, count in c.sent.items()}
        for c in counted:
            c.sent.clear()
        attention_backward(dout, q, k, v, out, lse, groups, packed)
        return [forward, {key: count for c in counted for key, count in c.sent.items()}]

    ring, n = cp // ulysses, max(g // ulysses, 1)
    heads = h // ulysses
    row = s * d  # elements of one head over this rank's tokens
    kv = 2 * n * ulysses * row  # elements that a rank of the ring holds
    half, full = torch.bfloat16, torch.float32
    forward, backward = {}, {}
    if ulysses > 1:
        forward |= {
            ("all-to-all", half): 2 * (ulysses - 1) * row * (2 * heads + 2 * n),
            ("all-to-all", full): 4 * (ulysses - 1) * s * heads,
        }
        backward |= {
            ("all-to-all", half): 2 * (ulysses - 1) * row * (4 * heads + 4 * n),
            ("all-to-all", full): 4 * (ulysses - 1) * s * heads,
        }
    if starts is not None and ring > 1:
        passed = tokens_passed(starts, cp * s, ring)
        want = []
        for rank in range(cp):
            sent, received = (passed.sum(dim)[rank // ulysses].item() for dim in (1, 0))
            here = [dict(forward), dict(backward)]
            if sent:
                here[0]["message", half] = here[1]["message", half] = 2 * 2 * n * d * sent
            if received:
                here[1]["message", full] = 4 * 2 * n * d * received
            want.append(here)
        assert run_virtual(run, cp) == want
        return
    if ring > 1 and comm_type == "p2p":
        forward["hop", half] = backward["hop", half] = 2 * (ring - 1) * kv
        backward["hop", full] = 4 * ring * kv
    if ring > 1 and comm_type == "all_gather":
        forward["all-gather", half] = backward["all-gather", half] = 2 * (ring - 1) * kv
        backward["reduce-scatter", full] = 4 * (ring - 1) * kv
    assert run_virtual(run, cp) == [[forward, backward]] * cp


def tokens_passed(starts: Sequence[int], length: int, ranks: int) -> Tensor:
    """[ranks, ranks]: tokens of the first rank that are in a document of which the second has later ones."""
    document = torch.bucketize(torch.arange(length), torch.tensor(starts), right=True)
    mine = [held(length, rank, ranks, starts) for rank in range(ranks)]
    needed = torch.zeros(ranks, ranks, dtype=torch.int64)
    for a, b in itertools.permutations(range(ranks), 2):
        for number in document.unique():
            keys, queries = (x[document[x] == number] for x in (mine[a], mine[b]))
            if len(keys) and len(queries):
                needed[a, b] += (keys < queries.max()).sum()
    return needed


def test_no_kernel_runs_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed: of the pairs of query and key no more are computed than the documents' causal triangles and
    rectangles have."""
    pairs = [0]
    run = kernels.forward

    def counted(q: Tensor, k: Tensor, v: Tensor, causal: bool, *rest: Any, **settings: Any) -> Any:
        s, t = q.shape[2], k.shape[2]
        pairs[0] += s * (s + 1) // 2 if causal else s * t
        return run(q, k, v, causal, *rest, **settings)

    monkeypatch.setattr(kernels, "forward", counted)
    inputs = sequence((1, 2, 1, 5, 8), 4, seed=1)
    for (name, starts), comm_type in itertools.product(documents(4, 5).items(), COMM_TYPES):
        pairs[0] = 0
        run_virtual(
            lambda r, t=starts, w=comm_type: attention_forward(
                *shards(inputs[:3], split_group(r, 1, w), t),
                split_group(r, 1, w),
                spec(t, 40, split_group(r, 1, w)),
            ),
            4,
        )
        lengths = [b - a for a, b in itertools.pairwise([*starts, 40])]
        assert pairs[0] == sum(n * (n + 1) // 2 for n in lengths), (name, comm_type)


# ---- refusals ----------------------------------------------------------------------------------


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError) as error:
        check_heads(32, 8, 5)
    assert str(error.value) == (
        "32 query heads and 8 KV heads per tensor parallel rank cannot be divided over parallel.ulysses=5 ranks; "
        "set parallel.ulysses to one of 1, 2, 4, 8, 16, 32"
    )
    for h, g, ulysses in ((6, 3, 2), (12, 4, 6), (9, 9, 2)):
        with pytest.raises(UserError, match=f"{h} query heads and {g} KV heads"):
            check_heads(h, g, ulysses)
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 3, 4, 8)
    with pytest.raises(UserError, match="set parallel.ulysses to one of 1, 3, 6"):
        run_virtual(lambda r: attention(q, k, k, split_group(r, 2)), 2)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match="4 context parallel ranks are not divisible by 3 ranks of all-to-all"
    ):
        run_virtual(lambda r: split_group(r, 3), 4)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_wrong_shapes_and_rows_are_refused(comm_type: CommType) -> None:
    q, odd, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    for cp, ulysses in ((1, 1), (2, 1), (2, 2)):
        with pytest.raises(UserError, match=r"one packed row at a time, not 2: set train\.micro_batch to 1"):
            run_virtual(
                lambda r, n=(cp, ulysses): attention(
                    q,
                    k,
                    k,
                    split_group(r, n[1], comm_type),
                    AttentionSpec(placement=place([0, 2], 6 * n[0], n[0] // n[1])),
                ),
                cp,
            )
        for length, ranks in ((6 * cp, 2 * cp // ulysses), (12 * cp, cp // ulysses)):
            wrong_row = AttentionSpec(placement=place([0, 2], length, ranks))
            with pytest.raises(ValueError, match=f"the row of {length} tokens is placed on {ranks} ranks"):
                run_virtual(
                    lambda r, u=ulysses, w=wrong_row: attention(
                        q[:1], k[:1], k[:1], split_group(r, u, comm_type), w
                    ),
                    cp,
                )
        if cp > 1:
            for wrong in (
                (odd, odd, odd),
                (q, k, k[:, :1]),
                (q, k, k.double()),
                (q, k[:, :, :4], k[:, :, :4]),
            ):
                with pytest.raises(
                    ValueError, match=r"are not \[b, h, s, d\] and \[b, g, s, d\] twice, with s even and"
                ):
                    run_virtual(
                        lambda r, n=(cp, ulysses), x=wrong: attention(*x, split_group(r, n[1], comm_type)), cp
                    )
