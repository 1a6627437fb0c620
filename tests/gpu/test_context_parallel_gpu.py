"""Documents in one call of FlashAttention, and every cp_comm_type with and without Ulysses on virtual ranks
of one GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.context_parallel.api import CommType, attention, split_group
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.comm import Communicator
from megatron_ultralong.context_parallel.kernels import varlen
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from tests.gpu.test_kernels_gpu import near
from tests.packed import held, joined, own_blocks, placed
from tests.unit.test_kernels import reference, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

STARTS = [0, 1, 2, 67, 200, 201, 333, 511, 512, 700, 767]


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, starts: list[int] | None
) -> tuple[list[Tensor], Tensor]:
    """([out, dq, dk, dv], lse) in float64, document by document."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    bounds = [*(starts or [0]), q.shape[2]]
    partial = [
        reference(*(x[:, :, a:b] for x in leaves), True, q.shape[3] ** -0.5)
        for a, b in itertools.pairwise(bounds)
    ]
    out = torch.cat([part[0] for part in partial], 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())], torch.cat(
        [part[1] for part in partial], 2
    ).detach()


@pytest.mark.parametrize("layout_", ["bhsd", "sbhd", "strided rows"])
@pytest.mark.parametrize(("h", "g"), [(8, 8), (9, 3), (5, 1)])
def test_documents_in_one_call(h: int, g: int, layout_: str) -> None:
    for d, starts in itertools.product((64, 128), (STARTS, list(range(768)))):
        q, k, v, dout = tensors(1, h, g, 768, 768, d, torch.bfloat16, layout_, "cuda")
        blocks = own_blocks(starts, 768)
        out, lse = varlen.forward(q, k, v, blocks)
        want, want_lse = expected(q, k, v, dout, starts)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-4)
        for x, y in zip([out, *varlen.backward(dout, q, k, v, out, lse, blocks)], want, strict=True):
            if y.abs().max() > 1e-9:  # dq and dk of one-token documents are zero
                near(x, y, 2e-2, (h, g, d, len(starts)))
            else:
                assert_close(x, torch.zeros_like(x), atol=2e-2, rtol=0)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["not packed", "packed"])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
@pytest.mark.parametrize(("cp", "ulysses"), [(1, 1), (2, 2), (4, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comm_types_on_virtual_ranks(
    dtype: torch.dtype, cp: int, ulysses: int, comm_type: CommType, starts: list[int] | None
) -> None:
    q, k, v, dout = tensors(1, 8, 2, 768, 768, 64, dtype, device="cuda")

    spec = AttentionSpec(placement=placed(starts, 768, cp // ulysses))

    def run(r: Communicator) -> list[Tensor]:
        mine = held(768, r.rank, cp, starts, ulysses).to("cuda")
        leaves = [x[:, :, mine].detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, split_group(r, ulysses, comm_type), spec)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout[:, :, mine])]

    want, _ = expected(q, k, v, dout, starts)
    for name, x, y in zip(
        ("out", "dq", "dk", "dv"), zip(*run_virtual(run, cp), strict=True), want, strict=True
    ):
        near(joined(list(x), starts, ulysses), y, 2e-2 if dtype == torch.bfloat16 else 1e-5, name)
