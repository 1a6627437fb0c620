"""Every way of context parallelism, and documents in packed rows, against full attention: over virtual ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.context_parallel import api, partial_attention, zigzag
from megatron_ultralong.context_parallel.api import (
    ContextGroups,
    attention,
    attention_backward,
    attention_forward,
    split,
)
from megatron_ultralong.context_parallel.comm import Peers
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.ring import ring_attention
from megatron_ultralong.context_parallel.ulysses import check_heads
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from megatron_ultralong.errors import UserError
from tests.distributed.test_ring import check, share, whole

WAYS: list[api.CommType] = ["p2p", "all_gather"]
SIZES = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (6, 3), (8, 1), (8, 2), (8, 4), (8, 8)]
"""(CP, ranks that exchange heads)."""
HEADS = [(24, 24), (24, 12), (24, 3), (24, 2), (24, 1), (8, 4), (9, 3), (6, 3), (7, 7)]


def documents(cp: int, piece: int) -> dict[str, list[int]]:
    """Document starts of a row of 2 cp pieces."""
    length = 2 * cp * piece if cp > 1 else piece
    generator = torch.Generator().manual_seed(length)
    some = (1 + torch.randint(length, (length // 6,), generator=generator)).unique().tolist()
    found = {
        "one": [0],
        "one-token documents": list(range(length)),
        "a last token alone, a first one too": sorted({0, 1, length - 1}),
        "every piece a document": list(range(0, length, piece)),
        "across every border of pieces": [0, *range(piece // 2 + 1, length, piece)],
        "short ones, then one over many ranks": [0, 1, 2, 4],
        "any": [0, *some],
    }
    return {name: [start for start in starts if start < length] for name, starts in found.items()}


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | None) -> Tensor:
    """Causal attention inside documents with every score in memory: q [b, h, S, d], k and v [b, g, S, d]."""
    at = torch.arange(q.shape[2])
    number = torch.bucketize(at, torch.tensor([0] if starts is None else starts), right=True)
    hidden = (number[:, None] != number[None, :]) | (at[:, None] < at[None, :])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v


def expected(inputs: list[Tensor], starts: Sequence[int] | None) -> list[Tensor]:
    """[out, dq, dk, dv] of the whole sequence in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = packed_attention(*leaves, starts)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def compute(
    inputs: list[Tensor], groups: ContextGroups, starts: Any = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """[out, dq, dk, dv] of this rank, through autograd."""
    q, k, v, dout = (share(x, groups.rank, groups.size, dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, groups, starts=starts)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def fits(h: int, g: int, ulysses: int) -> bool:
    try:
        check_heads(h, g, ulysses)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cp", "ulysses"), SIZES)
def test_equal_to_full_attention(cp: int, ulysses: int, way: api.CommType) -> None:
    """All head counts that fit, one of the packings for each, in turn; also not packed, with two sequences."""
    packings = itertools.cycle(documents(cp, 5).items())
    for number, (h, g) in enumerate((h, g) for h, g in HEADS if fits(h, g, ulysses)):
        for b, (name, starts) in ((2, ("not packed", None)), (1, next(packings)), (1, next(packings))):
            inputs = whole((b, h, g, 5, 8), cp, seed=number)
            want = expected(inputs, starts)
            got = run_virtual(lambda r, x=inputs, t=starts: compute(x, split(r, ulysses, way), t), cp)
            for rank in range(cp):
                check(got[rank], want, rank, cp, what=(way, ulysses, h, g, name))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cp", "ulysses"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 4)])
@pytest.mark.parametrize("piece", [1, 2, 7])
def test_every_packing(cp: int, ulysses: int, piece: int, way: api.CommType) -> None:
    """In float64, so that a missing or doubled key shows; starts as a tensor."""
    inputs = whole((1, 4, 2, piece, 8), cp, seed=cp)
    for name, starts in documents(cp, piece).items():
        want, tensor = expected(inputs, starts), torch.tensor(starts)
        got = run_virtual(lambda r, t=tensor: compute(inputs, split(r, ulysses, way), t, torch.float64), cp)
        for rank in range(cp):
            check(got[rank], want, rank, cp, 1e-11, what=(way, ulysses, piece, name))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cp", "ulysses"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_bf16(cp: int, ulysses: int, way: api.CommType) -> None:
    inputs = [x.bfloat16().double() for x in whole((1, 8, 2, 9, 16), cp, seed=4)]
    for starts in (None, documents(cp, 9)["any"]):
        want = expected(inputs, starts)
        shards = run_virtual(
            lambda r, t=starts: compute(inputs, split(r, ulysses, way), t, torch.bfloat16), cp
        )
        for name, got, y in zip(("out", "dq", "dk", "dv"), zip(*shards, strict=True), want, strict=True):
            assert all(x.dtype == torch.bfloat16 for x in got)
            x = zigzag.unshard(list(got), 2).double()
            assert (x - y).norm() / y.norm() < 0.02, f"{name}, {cp} ranks, {ulysses} exchange heads"


def test_scale_and_no_groups() -> None:
    q, k, v, _ = (x.float() for x in whole((1, 4, 2, 9, 8), 1, seed=2))
    scaled = packed_attention(q * 0.3 * 8**0.5, k, v, [0, 4])
    assert_close(attention(q, k, v, ContextGroups(), scale=0.3, starts=[0, 4]), scaled, atol=1e-5, rtol=1e-5)
    assert_close(ring_attention(q, k, v, None, scale=0.3, starts=[0, 4]), scaled, atol=1e-5, rtol=1e-5)
    for way, ulysses in itertools.product(WAYS, (1, 2)):
        inputs = whole((1, 4, 2, 3, 8), 4, seed=2)
        want = packed_attention(inputs[0] * 0.3 * 8**0.5, *inputs[1:3], [0, 4])

        def run(r: Peers, u: int = ulysses, w: api.CommType = way, x: list[Tensor] = inputs) -> Tensor:
            return attention(*(share(y, r.rank, 4) for y in x[:3]), split(r, u, w), scale=0.3, starts=[0, 4])

        assert_close(zigzag.unshard(run_virtual(run, 4), 2).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cp", "ulysses"), [(2, 2), (4, 2), (4, 1)])
def test_logsumexp_is_in_the_callers_order(cp: int, ulysses: int, way: api.CommType) -> None:
    """What a layer keeps between forward and backward is this rank's share, whatever the heads did inside."""
    inputs = whole((1, 4, 2, 3, 8), cp, seed=6)
    starts = [0, 5]
    number = torch.bucketize(torch.arange(inputs[0].shape[2]), torch.tensor(starts), right=True)
    hidden = (number[:, None] != number) | torch.ones(len(number), len(number), dtype=torch.bool).triu(1)
    scores = (inputs[0] @ inputs[1].repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(hidden, -math.inf)
    want = expected(inputs, starts)

    def run(r: Peers) -> list[Tensor]:
        groups = split(r, ulysses, way)
        q, k, v, dout = (share(x, r.rank, cp) for x in inputs)
        out, lse = attention_forward(q, k, v, groups, starts=starts)
        assert lse.dtype == torch.float32 and lse.shape == q.shape[:3] and out.shape == q.shape
        out, lse = (x.contiguous().clone() for x in (out, lse))  # to host memory and back, say
        return [lse, out, *attention_backward(dout, q, k, v, out, lse, groups, starts=starts)]

    for rank, (lse, *got) in enumerate(run_virtual(run, cp)):
        check(got, want, rank, cp)
        assert_close(lse.double(), zigzag.shard(scores.logsumexp(-1), rank, cp, 2), atol=1e-5, rtol=1e-5)


# ---- what goes over the wire -------------------------------------------------------------------


class Counted:
    """A group that counts the bytes it sends to other ranks, by (operation, dtype)."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rank, self.size, self.sent = inner, inner.rank, inner.size, {}

    def _count(self, what: str, send: Tensor, copies: float) -> None:
        key = (what, send.dtype)
        self.sent[key] = self.sent.get(key, 0) + int(send.numel() * send.element_size() * copies)

    def start(self, send: Tensor, receive: Tensor) -> Any:
        self._count("hop", send, 1)
        return self.inner.start(send, receive)

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
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cp", "ulysses", "g"), [(4, 1, 2), (4, 2, 4), (4, 2, 1), (4, 4, 2), (2, 2, 2), (8, 2, 2)]
)
def test_bytes_on_the_wire(
    cp: int, ulysses: int, g: int, way: api.CommType, starts: list[int] | None
) -> None:
    """The formulas of docs/context_parallel.md, packed or not."""
    h, d, s = 8, 8, 6
    inputs = whole((1, h, g, s // 2, d), cp, seed=1)

    def run(r: Peers) -> list[dict[Any, int]]:
        groups = split(r, ulysses, way)
        counted = [Counted(x) for x in (groups.ring, groups.ulysses) if x is not None]
        groups = ContextGroups(
            ring=counted[0] if groups.ring else None,
            ulysses=counted[-1] if groups.ulysses else None,
            cp_comm_type=way,
        )
        q, k, v, dout = (share(x, r.rank, cp, torch.bfloat16) for x in inputs)
        out, lse = attention_forward(q, k, v, groups, starts=starts)
        forward = {key: count for c in counted for key, count in c.sent.items()}
        for c in counted:
            c.sent.clear()
        attention_backward(dout, q, k, v, out, lse, groups, starts=starts)
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
    if ring > 1 and way == "p2p":
        forward["hop", half] = backward["hop", half] = 2 * (ring - 1) * kv
        backward["hop", full] = 4 * ring * kv
    if ring > 1 and way == "all_gather":
        forward["all-gather", half] = backward["all-gather", half] = 2 * (ring - 1) * kv
        backward["reduce-scatter", full] = 4 * (ring - 1) * kv
    assert run_virtual(run, cp) == [[forward, backward]] * cp


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
    inputs = whole((1, 2, 1, 5, 8), 4, seed=1)
    for (name, starts), way in itertools.product(documents(4, 5).items(), WAYS):
        pairs[0] = 0
        run_virtual(
            lambda r, t=starts, w=way: attention_forward(
                *(share(x, r.rank, 4) for x in inputs[:3]), split(r, 1, w), starts=t
            ),
            4,
        )
        lengths = [b - a for a, b in itertools.pairwise([*starts, 40])]
        assert pairs[0] == sum(n * (n + 1) // 2 for n in lengths), (name, way)


# ---- documents in one call, on CUDA ------------------------------------------------------------


def test_varlen_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of FlashAttention over documents, with a stand-in that does on the CPU what PyTorch says of
    its operator."""

    def slices(bounds: Tensor) -> list[slice]:
        assert bounds.dtype == torch.int32
        return [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]

    def heads_first(x: Tensor, rows: slice) -> Tensor:
        return x[rows].transpose(0, 1).unsqueeze(0)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cum_q: Tensor,
        cum_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float | None,
    ) -> tuple[Any, ...]:
        assert q.dim() == 3 and torch.equal(cum_q, cum_k) and causal and dropout == 0.0 and not debug
        assert max_q == max_k == max(int(cum_q.diff().max()), 2)
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        for rows in slices(cum_q):
            part, part_lse = kernels.forward(*(heads_first(x, rows) for x in (q, k, v)), True, scale)
            out[rows], lse[:, rows] = part[0].transpose(0, 1), part_lse[0]
        return out, lse, None, None, None

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cum_q: Tensor,
        cum_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        seed: Tensor,
        offset: Tensor,
        *,
        scale: float | None,
    ) -> tuple[Tensor, ...]:
        assert (
            lse.shape == (q.shape[1], q.shape[0])
            and lse.is_contiguous()
            and cum_q[0] == 0
            and cum_q[-1] == q.shape[0]
        )
        documents_a_call.append(len(cum_q) - 1)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in slices(cum_q):
            shares = kernels.backward(
                *(heads_first(x, rows) for x in (dout, q, k, v, out)), lse[None, :, rows], True, scale
            )
            for gradient, part in zip(gradients, shares, strict=True):
                gradient[rows] = part[0].transpose(0, 1)
        return gradients

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(partial_attention, "_in_one_call", lambda q, parts, backend: len(parts) > 2)
    documents_a_call: list[int] = []
    inputs = whole((1, 6, 2, 7, 8), 2, seed=3)
    for padding, most in ((1, 14), (4, 3), (128, 1)):
        monkeypatch.setattr(partial_attention, "PADDING", padding)
        documents_a_call.clear()
        for way, name in itertools.product(WAYS, ("any", "one-token documents")):
            starts = documents(2, 7)[name]
            for rank, got in enumerate(
                run_virtual(lambda r, w=way, t=starts: compute(inputs, split(r, 1, w), t), 2)
            ):
                check(got, expected(inputs, starts), rank, 2, what=(way, name, padding))
        assert max(documents_a_call) == most


def test_varlen_arguments_are_what_pytorch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: against PyTorch's shape functions. The numbers are tested in tests/gpu."""
    q, k = (torch.empty(1, heads, 9, 16, dtype=torch.bfloat16, device="meta") for heads in (6, 2))
    monkeypatch.setattr(
        partial_attention,
        "_bounds",
        lambda parts, device: (torch.empty(4, dtype=torch.int32, device=device), 5),
    )
    parts = zigzag.parts(0, 0, 9, 1, [0, 5, 6])
    out, lse = partial_attention.varlen_forward(q, k, k, parts, 0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert [x.shape for x in partial_attention.varlen_backward(out, q, k, k, out, lse, parts, 0.3)] == [
        q.shape,
        k.shape,
        k.shape,
    ]


@pytest.mark.parametrize(
    ("count", "b", "backend", "one_call"),
    [
        (3, 1, "flash", True),
        (2, 1, "flash", False),
        (3, 2, "flash", False),
        (3, 1, "eager", False),
        (3, 1, None, False),
    ],
)
def test_when_documents_go_in_one_call(
    count: int, b: int, backend: kernels.Backend | None, one_call: bool
) -> None:
    parts = zigzag.parts(0, 0, 8, 1, range(count))
    assert partial_attention._in_one_call(torch.empty(b, 2, 8, 16), parts, backend) is one_call


def test_packed_rows_do_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 2, 8, 16)
    assert partial_attention.backend(q, (0,)) is None and partial_attention.backend(q, (0, 3)) is None
    monkeypatch.setattr(kernels, "choose", lambda *kind: "cudnn")
    assert partial_attention.backend(q, (0,)) is None and partial_attention.backend(q, (0, 3)) == "flash"


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
        run_virtual(lambda r: attention(q, k, k, split(r, 2)), 2)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match="4 context parallel ranks are not divisible by 3 ranks of all-to-all"
    ):
        run_virtual(lambda r: split(r, 3), 4)


@pytest.mark.parametrize("way", WAYS)
def test_wrong_shapes_and_rows_are_refused(way: api.CommType) -> None:
    q, odd, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    for cp, ulysses in ((1, 1), (2, 1), (2, 2)):
        with pytest.raises(UserError, match=r"one packed row at a time, not 2: set train\.micro_batch to 1"):
            run_virtual(lambda r, n=(cp, ulysses): attention(q, k, k, split(r, n[1], way), starts=[0, 2]), cp)
        for starts in ([], [1], [0, 3, 3], [0, 4, 2], [0, 6 * cp]):
            with pytest.raises(UserError, match="document starts .* are not 0 and then ascending"):
                run_virtual(
                    lambda r, n=(cp, ulysses), t=starts: attention(
                        q[:1], k[:1], k[:1], split(r, n[1], way), starts=t
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
                    run_virtual(lambda r, n=(cp, ulysses), x=wrong: attention(*x, split(r, n[1], way)), cp)
