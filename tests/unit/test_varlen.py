"""Many documents in one call of FlashAttention: what is called, and when. The numbers on CUDA are tested in
tests/gpu."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ultralong.context_parallel.api import ContextGroups, attention_forward, split_group
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec, Backend
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels import varlen
from megatron_ultralong.context_parallel.placement import place
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from tests.distributed.test_ring import check, sequence
from tests.packed import held, own_blocks
from tests.unit.test_context_parallel import COMM_TYPES, compute, documents, expected


def test_varlen_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of FlashAttention over documents, with a stand-in that does on the CPU what PyTorch documents
    for its operator."""

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
            partial, partial_lse = kernels.forward(*(heads_first(x, rows) for x in (q, k, v)), True, scale)
            out[rows], lse[:, rows] = partial[0].transpose(0, 1), partial_lse[0]
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
        documents_per_call.append(len(cum_q) - 1)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in slices(cum_q):
            shares = kernels.backward(
                *(heads_first(x, rows) for x in (dout, q, k, v, out)), lse[None, :, rows], True, scale
            )
            for gradient, x in zip(gradients, shares, strict=True):
                gradient[rows] = x[0].transpose(0, 1)
        return gradients

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(kernels, "_in_one_call", lambda q, blocks, spec: len(blocks) > 2)
    documents_per_call: list[int] = []
    inputs = sequence((1, 6, 2, 7, 8), 2, seed=3)
    for tokens, most in ((1, 14), (4, 3), (128, 1)):
        monkeypatch.setattr(varlen, "TOKENS_PER_DOCUMENT", tokens)
        documents_per_call.clear()
        for comm_type, name in itertools.product(COMM_TYPES, ("any", "one-token documents")):
            starts = documents(2, 7)[name]
            for rank, got in enumerate(
                run_virtual(lambda r, w=comm_type, t=starts: compute(inputs, split_group(r, 1, w), t), 2)
            ):
                mine = held(28, rank, 2, starts)
                check(got, expected(inputs, starts), rank, 2, what=(comm_type, name, tokens), held=mine)
        assert max(documents_per_call) == most


def test_varlen_arguments_are_what_pytorch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: against PyTorch's shape functions. The numbers are tested in tests/gpu."""
    q, k = (torch.empty(1, heads, 9, 16, dtype=torch.bfloat16, device="meta") for heads in (6, 2))
    monkeypatch.setattr(
        varlen,
        "_cu_seqlens",
        lambda blocks, device: (torch.empty(4, dtype=torch.int32, device=device), 5),
    )
    blocks = own_blocks([0, 5, 6], 9)
    out, lse = varlen.forward(q, k, k, blocks, 0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert [x.shape for x in varlen.backward(out, q, k, k, out, lse, blocks, 0.3)] == [
        q.shape,
        k.shape,
        k.shape,
    ]


@pytest.mark.parametrize(
    ("count", "b", "backend", "one_call"),
    [
        (3, 1, "flash", True),
        (2, 1, "flash", True),
        (2, 1, "cudnn", False),
        (3, 1, "cudnn", True),
        (3, 2, "flash", False),
        (3, 1, "eager", False),
        (3, 1, None, False),
    ],
)
def test_when_documents_go_in_one_call(count: int, b: int, backend: Backend | None, one_call: bool) -> None:
    blocks = own_blocks(range(count), 8)
    q = torch.empty(b, 2, 8, 16)
    assert kernels._in_one_call(q, blocks, AttentionSpec(backend=backend)) is one_call


def test_packed_rows_do_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[Backend | None] = []

    def forward_diagonal(q: Tensor, k: Tensor, v: Tensor, blocks: Any, spec: AttentionSpec) -> Any:
        backends.append(spec.backend)

    monkeypatch.setattr(kernels, "forward_diagonal", forward_diagonal)
    q = torch.empty(1, 2, 8, 16)
    for _ in range(2):
        for placement in (None, place([0, 3], 8, 1)):
            attention_forward(q, q, q, ContextGroups(), AttentionSpec(placement=placement))
        monkeypatch.setattr(kernels, "choose", lambda *kind: "cudnn")
    assert backends == [None, None, None, "flash"]
