"""CUDA kernels against float64, and the ring on virtual ranks of one GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.api import ContextGroups, attention
from megatron_ultralong.context_parallel.comm import Communicator
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import merge_
from megatron_ultralong.context_parallel.virtual_ranks import run_virtual
from tests.unit import test_elementwise, test_merge
from tests.unit.test_kernels import reference, reference_gradients, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BACKENDS = ["flash", "cudnn"]
SHAPES = [(256, 256, True), (77, 77, True), (96, 250, False), (250, 96, False), (2, 2, True)]  # s, t, causal


def skip_without(backend: str) -> None:
    if backend == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen on Hopper and later only")


def near(x: Tensor, y: Tensor, tolerance: float, what: object = "") -> None:
    """Largest error against the largest value."""
    error = ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
    assert error < tolerance, f"{what}: {error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout_", ["bhsd", "sbhd", "half", "strided rows"])
@pytest.mark.parametrize(("h", "g"), [(8, 8), (9, 3), (5, 1), (32, 8)])
def test_equal_to_softmax_in_float64(h: int, g: int, layout_: str, backend: kernels.Backend) -> None:
    skip_without(backend)
    for s, t, causal in SHAPES:
        for d in (64, 128):
            q, k, v, dout = tensors(2, h, g, s, t, d, torch.bfloat16, layout_, "cuda")
            out, lse = kernels.forward(q, k, v, causal, 0.1, backend=backend)
            assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and lse.shape == q.shape[:3]
            expected, expected_lse = reference(q, k, v, causal, 0.1)
            near(out, expected, 1e-2, (s, t, d))
            assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-4)
            got = kernels.backward(dout, q, k, v, out, lse, causal, 0.1, backend=backend)
            for x, y in zip(got, reference_gradients(dout, q, k, v, causal, 0.1), strict=True):
                assert x.dtype == torch.bfloat16
                near(x, y, 2e-2, (s, t, d))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_parts_of_the_keys_add_up(backend: kernels.Backend) -> None:
    skip_without(backend)
    q, k, v, dout = tensors(1, 8, 2, 128, 256, 64, torch.bfloat16, device="cuda")
    out, lse = reference(q, k, v, False, 0.125)
    out, lse = out.bfloat16(), lse.float()
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    for part in (slice(0, 64), slice(64, 256)):
        share = kernels.backward(
            dout, q, k[:, :, part], v[:, :, part], out, lse, False, 0.125, backend=backend
        )
        dq += share[0]
        dk[:, :, part], dv[:, :, part] = share[1:]
    for x, y in zip((dq, dk, dv), reference_gradients(dout, q, k, v, False, 0.125), strict=True):
        near(x, y, 2e-2)


def test_strides_of_gradients_may_change_between_calls() -> None:
    """PyTorch keeps cuDNN's graph by the strides of q, k, v: those of out and dout must not be taken from an
    earlier call."""
    skip_without("cudnn")
    q, k, v, dout = tensors(2, 8, 2, 128, 128, 64, torch.bfloat16, device="cuda")
    out, lse = kernels.forward(q, k, v, True, backend="cudnn")
    expected = reference_gradients(dout, q, k, v, True, 0.125)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, out, q)]
    mixtures = [
        (dout, out, q),
        (other[0], out, q),
        (dout, other[1], q),
        (*other[:2], q),
        (*other,),
        (dout, out, other[2]),
    ]
    for dout_, out_, q_ in (*mixtures, *reversed(mixtures)):
        for x, y in zip(
            kernels.backward(dout_, q_, k, v, out_, lse, True, backend="cudnn"), expected, strict=True
        ):
            near(x, y, 2e-2)


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_ring_on_virtual_ranks(backend: str, cp: int) -> None:
    skip_without(backend)
    dtype, tolerance = (torch.float32, 1e-5) if backend == "eager" else (torch.bfloat16, 2e-2)
    q, k, v, dout = tensors(2, 9, 3, 96 * cp, 96 * cp, 64, dtype, device="cuda")

    def run(r: Communicator) -> list[Tensor]:
        leaves = [zigzag.shard(x, r.rank, cp, 2).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, ContextGroups(ring=r))
        return [out.detach(), *torch.autograd.grad(out, leaves, zigzag.shard(dout, r.rank, cp, 2))]

    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")
    try:
        assert kernels.choose(q.device, dtype, 64) == backend
        shards = run_virtual(run, cp)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    expected = [reference(q, k, v, True, 0.125)[0], *reference_gradients(dout, q, k, v, True, 0.125)]
    for name, x, y in zip(("out", "dq", "dk", "dv"), zip(*shards, strict=True), expected, strict=True):
        near(zigzag.unshard(list(x), 2), y, tolerance, name)


def test_merge_kernel() -> None:
    pytest.importorskip("triton")
    test_merge.check(merge_, device="cuda")


def test_elementwise_kernels() -> None:
    pytest.importorskip("triton")
    test_elementwise.check_triton_kernels(device="cuda")
