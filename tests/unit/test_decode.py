"""Attention over cached keys, of which every rank has a share, against full attention; bytes sent; the cache
itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.context_parallel import decode
from megatron_ultralong.context_parallel.kernels.merge import merge_all
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from megatron_ultralong.model.inference.kv_cache import KVCache, kv_bytes
from tests.unit.test_context_parallel import Counted

H, G, D = 6, 2, 8


def draw(n: int, heads: int, seed: int) -> Tensor:
    """[1, heads, n, D], large enough that a key counts more than another."""
    return 2 * torch.randn(1, heads, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
    """Query i sees the keys up to `before` + i."""
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(D)
    seen = torch.arange(k.shape[2])[None] <= before + torch.arange(q.shape[2])[:, None]
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def shares(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x.split(sizes, dim=2))


@pytest.mark.parametrize(
    "cp, c, cached",
    [
        (1, 5, ([7], [])),
        (1, 1, ()),
        (3, 2, ([4, 0, 1],)),
        (4, 1, ([3, 3, 2, 0], [0, 1, 0, 0])),
        (4, 3, ([0, 0, 0, 0],)),
    ],
)
def test_a_chunk_sees_the_cache_and_itself(cp: int, c: int, cached: tuple[list[int], ...]) -> None:
    """Uneven shares, ranks that cache nothing, a cache in two pieces, nothing cached at all."""
    cached = tuple(sizes or [0] * cp for sizes in cached)
    before = sum(map(sum, cached))
    q, k, v = draw(cp * c, H, 1), draw(before + cp * c, G, 2), draw(before + cp * c, G, 3)
    pieces, at = [], 0
    for sizes in cached:
        pieces.append([list(zip(shares(x[:, :, at : at + sum(sizes)], sizes))) for x in (k, v)])
        at += sum(sizes)

    def run(peers: object) -> Tensor:
        rank = peers.rank  # type: ignore[attr-defined]
        mine = [(keys[rank][0].float(), values[rank][0].float()) for keys, values in pieces]
        own = slice(before + rank * c, before + (rank + 1) * c)
        return decode.prefill_attention(
            q[:, :, rank * c : (rank + 1) * c].float(),
            k[:, :, own].float(),
            v[:, :, own].float(),
            mine,
            peers,
        )  # type: ignore[arg-type]

    assert_close(torch.cat(run_virtual(run, cp), dim=2).double(), full(q, k, v, before), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "cp, shared, own",
    [(1, [9], [[1], [4]]), (3, [4, 0, 2], [[0, 1, 0], [2, 1, 3], [1, 0, 0]]), (4, None, [[0, 0, 1, 0]])],
)
def test_tokens_of_several_sequences(cp: int, shared: list[int] | None, own: list[list[int]]) -> None:
    n, context = len(own), sum(shared or [0])
    q, keys, values = draw(n, H, 1), draw(context, G, 2), draw(context, G, 3)
    tails = [(draw(sum(sizes), G, 10 + i), draw(sum(sizes), G, 20 + i)) for i, sizes in enumerate(own)]

    def run(peers: object) -> Tensor:
        rank = peers.rank  # type: ignore[attr-defined]
        common = (
            [(shares(keys, shared)[rank].float(), shares(values, shared)[rank].float())] if shared else []
        )
        mine = [
            (shares(k, sizes)[rank].float(), shares(v, sizes)[rank].float())
            for (k, v), sizes in zip(tails, own, strict=True)
        ]
        return decode.decode_attention(q.float(), common, mine, peers)  # type: ignore[arg-type]

    want = torch.cat(
        [
            full(
                q[:, :, i : i + 1],
                torch.cat([keys, k], dim=2),
                torch.cat([values, v], dim=2),
                context + k.shape[2],
            )
            for i, (k, v) in enumerate(tails)
        ],
        dim=2,
    )
    got = run_virtual(run, cp)
    assert_close(got[0].double(), want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, got[0]) for x in got), "every rank continues with the same numbers"


@pytest.mark.parametrize("t", [0, 50])
def test_what_is_sent_does_not_grow_with_the_cache(t: int) -> None:
    cp, c, e = 4, 3, 2

    def run(peers: object) -> list[int]:
        counted = Counted(peers)
        x = [draw(n, heads, 1).bfloat16() for n, heads in ((c, H), (c, G), (t, G))]
        decode.prefill_attention(x[0], x[1], x[1], [(x[2], x[2])], counted)
        chunk = sum(counted.sent.values())
        counted.sent.clear()
        decode.decode_attention(x[0], [(x[2], x[2])], [(x[1], x[1])] * c, counted)
        return [chunk, sum(counted.sent.values())]

    assert (
        run_virtual(run, cp)
        == [[(cp - 1) * c * H * (D * e + 4 * (D + 1)), (cp - 1) * c * H * 4 * (D + 1)]] * cp
    )


def test_merging_parts_of_which_some_are_empty() -> None:
    outs, lses = torch.randn(3, 2, 5, 4), torch.tensor([1e4, -math.inf, 3.0]).view(3, 1, 1).repeat(1, 2, 5)
    lses[:, 0, 0] = -math.inf
    lses[:, 1, 1] = torch.tensor([0.5, 0.5, 0.5])
    out, lse = merge_all(outs, lses)
    assert torch.equal(out[0, 0], torch.zeros(4)) and lse[0, 0] == -math.inf
    for got, want in (
        (out[0, 1], outs[0, 0, 1]),
        (lse[0, 1], torch.tensor(1e4)),
        (out[1, 1], outs[:, 1, 1].mean(0)),
        (lse[1, 1], torch.tensor(0.5 + math.log(3))),
    ):
        assert_close(got, want)


def test_cache() -> None:
    """Positions 0-5 on this rank, 6-11 elsewhere, 12-14 here; cut at 13, then at 4; grown; a second one
    behind it."""
    context = KVCache(2, G, D, 9, dtype=torch.float32)
    pieces = [draw(n, G, n).float() for n in (6, 3)]
    for piece, (tokens, first) in zip(pieces, ((12, 0), (6, 12)), strict=True):
        for layer in range(2):
            context.put(layer, piece + layer, -piece)
        assert torch.equal(context.kept(1, piece.shape[2])[0][:, :, -piece.shape[2] :], piece + 1)
        context.advance(tokens, first, piece.shape[2])
    assert (context.end, context.held, context.capacity) == (18, 9, 9)
    assert torch.equal(context.kept(1)[0], torch.cat(pieces, dim=2) + 1) and torch.equal(
        context.kept(0)[1], -torch.cat(pieces, dim=2)
    )
    context.truncate(13)
    assert (context.end, context.held) == (13, 7)
    context.reserve(20)
    assert context.capacity == 20 and torch.equal(context.kept(0)[0], torch.cat(pieces, dim=2)[:, :, :7])
    question = KVCache(2, G, D, 4, context)
    assert (question.start, question.end, question.held) == (13, 13, 0) and question.chain == [
        context,
        question,
    ]
    context.truncate(8)
    assert context.held == 6
    context.truncate(4)
    assert (context.end, context.held) == (4, 4)
    assert kv_bytes(2, G, D, 20, 4) == sum(x.numel() * 4 for x in context._kv)


def test_cudnn_reads_whole_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds and keeps a plan for each shape: every prompt ends in a chunk of another length."""
    monkeypatch.setattr(decode.kernels, "choose", lambda *kind: "cudnn")
    for queries, keys, few in (
        (4096, 4096, True),
        (4096, 1024 * 77, True),
        (1024, 4096, False),
        (4095, 4096, False),
        (4096, 4097, False),
        (1, 8192, False),
    ):
        q, k = torch.empty(1, 4, queries, 8, device="meta"), torch.empty(1, 1, keys, 8, device="meta")
        assert decode._backend(q, k) == (None if few else "flash")
