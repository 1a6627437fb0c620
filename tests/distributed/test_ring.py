"""Ring attention against full attention: over gloo ranks, and over virtual ranks in one process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.api import (
    ContextGroups,
    attention,
    attention_backward,
    attention_forward,
)
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator, ProcessGroupCommunicator
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from tests.spawn import run_ranks

# b, query heads, KV heads, tokens per zigzag chunk, head dimension
CASES = [(1, 4, 2, 8, 16), (2, 9, 3, 5, 20), (3, 5, 1, 1, 8), (1, 3, 3, 7, 13)]


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention with every score in memory: q [b, h, S, d], k and v [b, g, S, d]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def sequence(case: tuple[int, ...], cp: int, seed: int) -> list[Tensor]:
    """(q, k, v, dout) of the complete sequence in float64; size and mean differ from token to token, so on
    every rank."""
    b, h, g, chunk, d = case
    length = chunk * 2 * cp if cp > 1 else chunk
    generator = torch.Generator().manual_seed(seed)
    trend = torch.linspace(0.3, 0.8, length, dtype=torch.float64)[:, None]
    # Rounded to float32, so that the reference sees the same numbers.
    return [
        (trend * (0.5 + torch.randn(b, heads, length, d, generator=generator))).float().double()
        for heads in (h, g, g, h)
    ]


def expected(inputs: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """[out, dq, dk, dv] of the complete sequence in float64."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = full_attention(q, k, v, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def shard(
    x: Tensor, rank: int, cp: int, dtype: torch.dtype = torch.float32, held: Tensor | None = None
) -> Tensor:
    """This rank's shard, or its tokens `held`, a view of [s, b, h, d] as Megatron passes it."""
    x = zigzag.shard(x, rank, cp, 2) if held is None else x[:, :, held]
    return x.to(dtype).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def compute(
    inputs: list[Tensor],
    rank: int,
    cp: int,
    group: Any,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
) -> list[Tensor]:
    """[out, dq, dk, dv] of this rank, through autograd."""
    q, k, v, dout = (shard(x, rank, cp, dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, ContextGroups(ring=group), AttentionSpec(scale=scale))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(
    got: list[Tensor],
    want: list[Tensor],
    rank: int,
    cp: int,
    tolerance: float = 1e-5,
    what: Any = "",
    held: Tensor | None = None,
) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        y = zigzag.shard(y, rank, cp, 2) if held is None else y[:, :, held]
        assert_close(
            x.double(),
            y,
            atol=tolerance,
            rtol=tolerance,
            msg=lambda m, n=name: f"{n}, rank {rank} of {cp}, {what}: {m}",
        )


# ---- over gloo ---------------------------------------------------------------------------------


def test_over_gloo() -> None:
    run_ranks(_over_gloo, 8)


def _over_gloo(rank: int, world_size: int) -> None:
    for cp in (1, 2, 4, 8):
        groups = [
            dist.new_group(list(range(first, 8, 8 // cp))) for first in range(8 // cp)
        ]  # ranks apart, as with TP inside
        index = rank % (8 // cp)
        group, place = groups[index], rank // (8 // cp)
        for number, case in enumerate(CASES):
            inputs = sequence(case, cp, seed=100 * number + index)
            check(compute(inputs, place, cp, group), expected(inputs), place, cp, what=case)
        inputs = sequence(CASES[1], cp, seed=7 + index)
        check(compute(inputs, place, cp, group, scale=0.4), expected(inputs, 0.4), place, cp, what="scale")
        half = [x.bfloat16().double() for x in inputs]
        got, want = compute(half, place, cp, group, torch.bfloat16), expected(half)
        assert all(x.dtype == torch.bfloat16 for x in got)
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            y = zigzag.shard(y, place, cp, 2)
            assert (x.double() - y).norm() / y.norm() < 0.02, f"{name}, rank {place} of {cp}, bf16"
        _layers(group, place, cp, index)
        if cp == 1:
            check(compute(inputs, 0, 1, None), expected(inputs), 0, 1, what="no group")


def _layers(group: dist.ProcessGroup, rank: int, cp: int, index: int) -> None:
    """Three layers, one of them recomputed, on ranks that are out of step; the backward on another thread."""
    inputs = sequence((2, 6, 2, 3, 8), cp, seed=11 + index)

    def stack(
        q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor], recompute: Callable[..., Tensor]
    ) -> Tensor:
        x = attend(q, k, v)
        x = recompute(attend, x, k + x[:, :2], v)
        return attend(x + q, k, v - x[:, 2:4])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, ContextGroups(ring=OutOfStep(ProcessGroupCommunicator(group))))

    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = stack(*leaves, full_attention, lambda f, *x: f(*x))
    want = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    for reentrant in (False, True):
        q, k, v, dout = (shard(x, rank, cp) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = stack(*leaves, attend, lambda f, *x, r=reentrant: checkpoint(f, *x, use_reentrant=r))
        thread = threading.Thread(target=out.backward, args=(dout,))
        thread.start()
        thread.join()
        check(
            [out.detach(), *(x.grad for x in leaves)], want, rank, cp, what=f"layers, reentrant={reentrant}"
        )


class OutOfStep:
    """A communicator whose ranks start and wait at different moments."""

    def __init__(self, inner: Communicator) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.delay = 0.0005 * ((5 * inner.rank) % 3)

    def send_recv(self, send: Tensor, receive: Tensor) -> Any:
        time.sleep(self.delay)
        transfer = self.inner.send_recv(send, receive)
        time.sleep(0.001 - self.delay)
        return transfer


# ---- over virtual ranks ------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_over_virtual_ranks(cp: int) -> None:
    for number, case in enumerate(CASES):
        inputs = sequence(case, cp, seed=number)
        want = expected(inputs)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
            got = run_virtual(lambda r, x=inputs, t=dtype: compute(x, r.rank, cp, r, t), cp)
            for rank in range(cp):
                check(got[rank], want, rank, cp, tolerance, what=(case, dtype))


def test_any_strides() -> None:
    inputs = sequence((2, 6, 3, 3, 8), 2, seed=5)
    want = expected(inputs)

    def strided(r: Communicator) -> list[Tensor]:
        q, k, v, dout = (shard(x, r.rank, 2) for x in inputs)
        q, dout = (
            x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, dout)
        )  # last dimension not contiguous
        k = torch.cat((k, v), 3)[..., :8]
        groups = ContextGroups(ring=r)
        out, lse = attention_forward(q, k, v.contiguous(), groups)
        return [out, *attention_backward(dout, q, k, v, out, lse, groups)]

    for rank, got in enumerate(run_virtual(strided, 2)):
        check(got, want, rank, 2)


def test_large_logits_do_not_overflow() -> None:
    inputs = sequence((1, 2, 1, 4, 8), 4, seed=3)
    inputs[0] *= 256  # logits of thousands: exp of them is inf
    want = expected(inputs, 8.0)
    for rank, got in enumerate(run_virtual(lambda r: compute(inputs, r.rank, 4, r, torch.float64, 8.0), 4)):
        check(got, want, rank, 4, tolerance=1e-8)
    for got in run_virtual(lambda r: compute(inputs, r.rank, 4, r, scale=8.0), 4):
        assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize(
    ("cp", "length", "heads", "kv_heads", "d", "bound"), [(8, 512, 4, 2, 16, 1.2), (32, 4096, 2, 1, 64, 1.15)]
)
def test_error_does_not_grow_with_ranks_in_bf16(
    cp: int, length: int, heads: int, kv_heads: int, d: int, bound: float
) -> None:
    """Accumulated in float32: many ranks stay within 15% of one kernel over the complete sequence, and within
    8% of two ranks."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, n, length, d, generator=generator).bfloat16().double()
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    want = expected(inputs)
    errors = {}
    for ranks in (1, 2, cp):
        shards = run_virtual(lambda r, n=ranks: compute(inputs, r.rank, n, r, torch.bfloat16), ranks)
        got = [zigzag.unshard(list(x), 2).double() for x in zip(*shards, strict=True)]
        errors[ranks] = [(x - y).norm() / y.norm() for x, y in zip(got, want, strict=True)]
    for name, one, two, many in zip(("out", "dq", "dk", "dv"), *errors.values(), strict=True):
        assert many < 1.08 * two and many < (1.15 if name == "out" else bound) * one, (
            f"{name}: {one:.2e} {two:.2e} {many:.2e}"
        )


class Recorded:
    """A communicator that records what happens, in order."""

    def __init__(self, inner: Communicator, events: list[tuple[Any, ...]]) -> None:
        self.inner, self.rank, self.size, self.events = inner, inner.rank, inner.size, events

    def send_recv(self, send: Tensor, receive: Tensor) -> Any:
        assert send.is_contiguous() and receive.is_contiguous() and send.dtype == receive.dtype
        self.events.append(
            ("send", send.dtype, send.numel() * send.element_size(), send.data_ptr(), receive.data_ptr())
        )
        transfer = self.inner.send_recv(send, receive)
        events = self.events

        class Wait:
            def wait(self) -> None:
                events.append(("wait", send.dtype))
                transfer.wait()

        return Wait()


def test_bytes_buffers_and_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes sent are the minimum for grouped heads, two buffers per ring, and every hop is in flight before
    its kernel."""
    cp, b, h, g, s, d = 4, 2, 6, 2, 10, 8
    inputs = sequence((b, h, g, s // 2, d), cp, seed=1)
    events: dict[int, list[tuple[Any, ...]]] = {rank: [] for rank in range(cp)}
    mine = threading.local()

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*arguments: Any, **settings: Any) -> Any:
            mine.events.append(("kernel",))
            return run(*arguments, **settings)

        return kernel

    monkeypatch.setattr(kernels, "forward", watched(kernels.forward))
    monkeypatch.setattr(kernels, "backward", watched(kernels.backward))

    def run(r: Communicator) -> None:
        mine.events = events[r.rank]
        groups = ContextGroups(ring=Recorded(r, mine.events))
        q, k, v, dout = (shard(x, r.rank, cp, torch.bfloat16) for x in inputs)
        out, lse = attention_forward(q, k, v, groups)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert lse.shape == (b, h, s)
        mine.events.append(("backward",))
        attention_backward(dout, q, k, v, out, lse, groups)

    run_virtual(run, cp)
    kv = 2 * b * g * s * d  # elements
    hop = [("send", torch.bfloat16), ("kernel",), ("wait", torch.bfloat16)]
    for rank in range(cp):
        split = events[rank].index(("backward",))
        forward, backward = events[rank][:split], events[rank][split + 1 :]
        assert [e[:2] for e in forward] == hop * 3 + [("kernel",)]
        assert sum(e[2] for e in forward if e[0] == "send") == 3 * kv * 2
        assert len({p for e in forward if e[0] == "send" for p in e[3:]}) == 2
        sent = {t: [e for e in backward if e[:2] == ("send", t)] for t in (torch.bfloat16, torch.float32)}
        assert sum(e[2] for e in sent[torch.bfloat16]) == 3 * kv * 2
        assert sum(e[2] for e in sent[torch.float32]) == 4 * kv * 4
        assert all(len({p for e in sends for p in e[3:]}) == 2 for sends in sent.values())
        names = [e[:2] for e in backward]
        assert names == [
            ("send", torch.bfloat16),
            ("kernel",),
            ("send", torch.float32),
            ("wait", torch.bfloat16),
            *[
                ("send", torch.bfloat16),
                ("kernel",),
                ("wait", torch.float32),
                ("send", torch.float32),
                ("wait", torch.bfloat16),
            ]
            * 2,
            ("kernel",),
            ("wait", torch.float32),
            ("send", torch.float32),
            ("wait", torch.float32),
        ]


def test_what_is_kept_for_the_backward() -> None:
    q, k, v = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):

        def forward(r: Communicator) -> Tensor:
            return attention(q, k, v, ContextGroups(ring=r))

        assert all(out.grad_fn is None for out in run_virtual(forward, 2)) and kept == []
        assert attention(q, k, v, ContextGroups()).grad_fn is None and kept == []
        q.requires_grad_()
        attention(q, k, v, ContextGroups())
    assert kept == [(1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), (1, 4, 6, 8), (1, 4, 6)]


def test_gradient_of_one_input_only() -> None:
    inputs = sequence((1, 4, 2, 3, 8), 2, seed=9)
    want = expected(inputs)

    def only_k(r: Communicator) -> Tensor:
        q, k, v, dout = (shard(x, r.rank, 2) for x in inputs)
        k.requires_grad_()
        return torch.autograd.grad(attention(q, k, v, ContextGroups(ring=r)), k, dout)[0]

    for rank, dk in enumerate(run_virtual(only_k, 2)):
        assert_close(dk.double(), zigzag.shard(want[2], rank, 2, 2), atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused_by_every_rank() -> None:
    q, odd, other = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 5, 8), torch.randn(1, 2, 4, 8)
    for q_, k, v in ((odd, odd, odd), (q, other, other), (q, q, q[:, :2]), (q, q, q.double())):
        with pytest.raises(ValueError, match=r"\[b, h, s, d\] and \[b, g, s, d\] twice, with s even"):
            run_virtual(lambda r, x=(q_, k, v): attention(*x, ContextGroups(ring=r)), 2)


def test_a_failing_virtual_rank_ends_the_others() -> None:
    def one_fails(r: Communicator) -> None:
        if r.rank == 1:
            raise KeyError("rank 1")
        attention(*[torch.randn(1, 1, 2, 8)] * 3, ContextGroups(ring=r))

    with pytest.raises(KeyError, match="rank 1"):
        run_virtual(one_fails, 3)
    with pytest.raises(TimeoutError, match="waited more than"):
        run_virtual(
            lambda r: r.rank == 1 or attention(*[torch.randn(1, 1, 2, 8)] * 3, ContextGroups(ring=r)),
            2,
            timeout=0.2,
        )
