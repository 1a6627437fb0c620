"""Attention kernels and the merge against softmax written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_ultralong.context_parallel.kernels import aten, deterministic
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import merge_

HEADS = [(4, 4), (9, 3), (5, 1), (6, 2)]
# s, t, causal
SHAPES = [
    (1, 1, True),
    (1, 1, False),
    (7, 7, True),
    (13, 6, False),
    (6, 13, False),
    (1, 70, False),
    (130, 130, True),
]
GRADIENTS = ("dq", "dk", "dv")


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and logsumexp in float64, KV heads repeated, every score in memory."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * scale
    if causal:
        future = (
            torch.arange(k.shape[2], device=q.device)[None, :]
            > torch.arange(q.shape[2], device=q.device)[:, None]
        )
        scores = scores.masked_fill(future, -math.inf)
    return torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v), scores.logsumexp(-1)


def reference_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(reference(*leaves, causal, scale)[0], leaves, dout.double())


def tensors(
    b: int,
    h: int,
    g: int,
    s: int,
    t: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, dout) in one of the layouts they come in."""
    generator = torch.Generator().manual_seed(b + 10 * h + 100 * s + 1000 * t + d)

    def make(heads: int, length: int) -> Tensor:
        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        if layout == "sbhd":
            return rand(length, b, heads, d).permute(1, 2, 0, 3)
        if layout == "half":  # the second half of a longer sequence
            return rand(b, heads, 2 * length, d)[:, :, length:]
        if layout == "strided rows":  # the last dimension is not contiguous
            return rand(b, heads, d, length).transpose(2, 3)
        return rand(b, heads, length, d)

    return make(h, s), make(g, t), make(g, t), make(h, s)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "half", "strided rows"])
@pytest.mark.parametrize(("h", "g"), HEADS)
def test_equal_to_softmax_in_float64(h: int, g: int, layout: str, backend: kernels.Backend) -> None:
    for s, t, causal in SHAPES:
        for d in (8, 13, 20, 64):
            scale = 1.25 * d**-0.5
            q, k, v, dout = tensors(2, h, g, s, t, d, layout=layout)
            out, lse = kernels.forward(q, k, v, causal, scale, backend=backend)
            assert out.dtype == lse.dtype == torch.float32 and lse.shape == q.shape[:3]
            expected, expected_lse = reference(q, k, v, causal, scale)
            assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
            assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
            got = kernels.backward(dout, q, k, v, out, lse, causal, scale, backend=backend)
            for name, x, y in zip(
                GRADIENTS, got, reference_gradients(dout, q, k, v, causal, scale), strict=True
            ):
                assert_close(
                    x, y.float(), atol=1e-5, rtol=1e-5, msg=lambda m, at=(name, s, t, d): f"{at}: {m}"
                )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_bf16_and_default_scale(backend: kernels.Backend) -> None:
    q, k, v, dout = tensors(2, 6, 2, 33, 33, 16, torch.bfloat16, "sbhd")
    out, lse = kernels.forward(q, k, v, True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected, expected_lse = reference(q, k, v, True, 0.25)
    assert_close(out.double(), expected, atol=2e-2, rtol=0)
    assert_close(lse.double(), expected_lse, atol=2e-3, rtol=0)
    got = kernels.backward(dout, q, k, v, out, lse, True, backend=backend)
    for x, y in zip(got, reference_gradients(dout, q, k, v, True, 0.25), strict=True):
        assert x.dtype == torch.bfloat16
        assert_close(x.double(), y, atol=4e-2 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_gradients_of_parts_of_the_keys_add_up(backend: kernels.Backend) -> None:
    """The backward of a part, given the final output and logsumexp, is that part's share of the gradient."""
    q, k, v, dout = tensors(2, 6, 3, 9, 17, 16)
    out, lse = (x.float() for x in reference(q, k, v, False, 0.25))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in (slice(0, 5), slice(5, 6), slice(6, 17)):
        share = kernels.backward(
            dout, q, k[:, :, part], v[:, :, part], out, lse, False, 0.25, backend=backend
        )
        dq += share[0]
        dk[:, :, part], dv[:, :, part] = share[1:]
    for x, y in zip((dq, dk, dv), reference_gradients(dout, q, k, v, False, 0.25), strict=True):
        assert_close(x, y.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize(("s", "t", "causal"), [(64, 64, True), (70, 70, True), (50, 33, False)])
def test_backward_by_rows(s: int, t: int, causal: bool, rows: int) -> None:
    """FlashAttention's deterministic backward for some queries at a time, here with the kernel of the CPU."""
    q, k, v, dout = tensors(2, 6, 2, s, t, 16, torch.float32)
    out, lse = kernels.forward(q, k, v, causal, 0.3)
    calls: list[int] = []

    def run(dout_: Tensor, q_: Tensor, *more: Any) -> Any:
        calls.append(q_.shape[2])
        return aten.cpu_backward(dout_, q_, *more)

    got = deterministic.backward_by_rows(run, rows, dout, q, k, v, out, lse, causal, 0.3)
    assert max(calls) <= rows
    for x, y in zip(got, reference_gradients(dout, q, k, v, causal, 0.3), strict=True):
        assert x.dtype == torch.float32
        assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


def test_splits_of_the_deterministic_backward() -> None:
    assert deterministic.splits(torch.empty(1, 4, 8, 16)) == 1, "not on a CPU"
    assert deterministic.rows_at_a_time(262_144, 33) == 7944
    assert deterministic.rows_at_a_time(8192, 33) == 1024


def test_eager_takes_long_queries_in_blocks() -> None:
    q, k, v, dout = tensors(1, 2, 1, 1100, 1100, 8)
    out, lse = kernels.forward(q, k, v, True, backend="eager")
    expected, expected_lse = kernels.forward(q, k, v, True, backend="cpu")
    assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    for x, y in zip(
        *(kernels.backward(dout, q, k, v, out, lse, True, backend=b) for b in ("eager", "cpu")), strict=True
    ):
        assert_close(x, y, atol=2e-5, rtol=1e-5)


def test_nothing_to_attend_to() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8)
    out, lse = kernels.forward(q, k, k, False)
    assert torch.equal(out, torch.zeros_like(q)) and (lse == -math.inf).all()
    dq, dk, dv = kernels.backward(q, q, k, k, out, lse, False)
    assert torch.equal(dq, torch.zeros_like(q)) and dk.shape == dv.shape == k.shape
    none = torch.randn(2, 4, 0, 8)
    assert kernels.forward(none, k, k, True)[0].shape == none.shape
    assert torch.equal(
        kernels.backward(none, none, q[:, :2], q[:, :2], none, none[..., 0], False)[1],
        torch.zeros(2, 2, 3, 8),
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 4, 4, 8)
    for bad in (k, k[:, :0], k[:, :3, :, :4], k[:0, :3]):
        with pytest.raises(ValueError, match="h a multiple of g"):
            kernels.forward(q, bad, bad, False)
    with pytest.raises(ValueError, match="as many keys as queries"):
        kernels.forward(q, k[:, :3, :2], k[:, :3, :2], True)
    with pytest.raises(ValueError, match="do not fit q"):
        kernels.backward(q, q, k[:, :3], k[:, :3], q, q[..., :1].squeeze(0).squeeze(-1), False)


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_cuda_kernels_are_called_with_arguments_they_take(
    backend: kernels.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: the calls against PyTorch's shape functions. The numbers are tested in tests/gpu."""
    q, k = (torch.empty(2, heads, 9, 16, dtype=torch.bfloat16, device="meta") for heads in (6, 2))
    for dims in (3, 4):  # both forms of cuDNN's logsumexp
        monkeypatch.setattr(aten, "cudnn_lse_dims", lambda device, dims=dims: dims)
        out, lse = kernels.forward(q, k, k, True, 0.3, backend=backend)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        shapes = [x.shape for x in kernels.backward(out, q, k, k, out, lse, True, 0.3, backend=backend)]
        assert shapes == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "cudnn", "deterministic", "expected"),
    [
        (torch.bfloat16, 128, (9, 0), 91002, False, "cudnn"),
        (torch.float16, 64, (10, 0), 91002, False, "cudnn"),
        (torch.bfloat16, 128, (8, 0), 91002, False, "flash"),
        (torch.bfloat16, 128, (9, 0), 90100, False, "flash"),
        (torch.bfloat16, 256, (9, 0), 91002, False, "flash"),
        (torch.bfloat16, 128, (9, 0), 91002, True, "flash"),
        (torch.bfloat16, 20, (9, 0), 91002, False, "eager"),
        (torch.float32, 128, (9, 0), 91002, False, "eager"),
    ],
)
def test_choice_on_cuda(
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    cudnn: int,
    deterministic: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert kernels.choose(torch.device("cuda", 0), dtype, head_dim) == expected


def test_choice_elsewhere() -> None:
    assert kernels.choose(torch.device("cpu"), torch.float32, 64) == "cpu"
    assert kernels.choose(torch.device("meta"), torch.bfloat16, 64) == "eager"


@pytest.mark.parametrize("shift", [0.0, 3000.0, -3000.0])
def test_merge_equals_attention_over_both(shift: float) -> None:
    """Logits near `shift`, where exp would be inf or 0."""
    q, k, v, _ = tensors(2, 3, 3, 5, 12, 8)
    q, k = (
        torch.cat((q, torch.full_like(q[..., :1], shift)), -1),
        torch.cat((k, torch.ones_like(k[..., :1])), -1),
    )
    expected, expected_lse = reference(q, k, v, False, 1.0)
    first, second = (
        reference(q, k[:, :, part], v[:, :, part], False, 1.0) for part in (slice(0, 5), slice(5, 12))
    )
    out, lse = first[0].float(), first[1].float()
    merge_(out, lse, second[0].float(), second[1].float())
    tolerance = 1e-6 if shift == 0 else 5e-4  # float32 keeps 3000 to 2.4e-4
    assert_close(out, expected.float(), atol=tolerance, rtol=tolerance)
    assert_close(lse, expected_lse.float(), atol=tolerance, rtol=1e-6)


def test_merge_where_one_side_is_nothing() -> None:
    out, lse = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[0.5]]])
    merge_(out, lse, torch.tensor([[[[7.0, 7.0]]]], dtype=torch.bfloat16), torch.tensor([[[-math.inf]]]))
    assert out.tolist() == [[[[1.0, 2.0]]]] and lse.tolist() == [[[0.5]]]
    merge_(out, lse, torch.tensor([[[[7.0, 8.0]]]]), torch.tensor([[[900.0]]]))
    assert out.tolist() == [[[[7.0, 8.0]]]] and lse.tolist() == [[[900.0]]]


def test_merge_writes_into_views() -> None:
    out, lse = torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4)
    merge_(out[:, :, 2:], lse[:, :, 2:], torch.full((1, 2, 2, 3), 4.0), torch.zeros(1, 2, 2))
    assert out[0, 1, :, 0].tolist() == [0.0, 0.0, 2.0, 2.0]
    assert_close(lse[0, 1], torch.tensor([0.0, 0.0, math.log(2), math.log(2)]))
