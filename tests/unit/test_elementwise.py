"""SwiGLU, RMSNorm and the split of the projection, against plain torch operations and autograd."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ultralong import model
from megatron_ultralong.model import elementwise, rotary_embedding
from megatron_ultralong.model.elementwise import rms_norm, row_blocks, swiglu
from megatron_ultralong.model.rotary_embedding import (
    HeadNorm,
    _by_token,
    _rotate,
    apply_rope,
    cos_sin,
    split_and_rotate,
)
from megatron_ultralong.rope.methods import Unscaled
from tests.triton_tools import interpret

ROWS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Tolerance relative to the norm of the result."""


def check(results: list[Tensor | None], references: list[Tensor], tolerance: float) -> None:
    for result, reference in zip(results, references, strict=True):
        assert result is not None and result.shape == reference.shape and result.dtype == reference.dtype
        difference, size = (result - reference).detach().norm(), reference.detach().norm()
        assert float(difference) <= tolerance * float(size)


def test_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CPU_BLOCK", 20)
    assert list(row_blocks(torch.zeros(7, 6))) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(row_blocks(torch.zeros(3, 6), 7)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(row_blocks(torch.zeros(2, 60))) == [slice(0, 1), slice(1, 2)]
    assert list(row_blocks(torch.zeros(5, 2, 3))) == [slice(0, 3), slice(3, 5)]
    assert list(row_blocks(torch.zeros(0, 6))) == [] and list(row_blocks(torch.zeros(2, 0))) == [slice(0, 2)]
    meta = torch.zeros(7, 6, device="meta")
    assert list(row_blocks(meta)) == [slice(0, 7)] and next(row_blocks(meta, 30)) == slice(0, 5)


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("block", [1, 50, 2**19])
def test_swiglu(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CPU_BLOCK", block)
    torch.manual_seed(0)
    x = torch.randn(9, 2, 12, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(9, 2, 6, dtype=torch.float64).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = swiglu(x)
    assert kept == [x.data_ptr()], "nothing but its input is kept"
    gate, up = x.chunk(2, dim=-1)
    reference = F.silu(gate) * up
    check([out], [reference], ROWS[dtype])
    check([*torch.autograd.grad(out, x, grad)], [*torch.autograd.grad(reference, x, grad)], ROWS[dtype])
    assert not torch.no_grad()(swiglu)(x).requires_grad


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("block", [1, 50, 2**19])
def test_rms_norm(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CPU_BLOCK", block)
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 9, 12)).to(dtype).transpose(0, 1).requires_grad_()  # rows not in order
    weight = torch.randn(12).to(dtype).requires_grad_()
    grad = torch.randn(9, 2, 12).to(dtype)
    out, reference = rms_norm(x, weight, 0.1), F.rms_norm(x, (12,), weight, 0.1)
    check([out], [reference], ROWS[dtype])
    check(
        [*torch.autograd.grad(out, [x, weight], grad)],
        [*torch.autograd.grad(reference, [x, weight], grad)],
        ROWS[dtype],
    )
    frozen = weight.detach()
    [dx] = torch.autograd.grad(rms_norm(x, frozen, 0.1), x, grad)
    check([dx], [*torch.autograd.grad(F.rms_norm(x, (12,), frozen, 0.1), x, grad)], ROWS[dtype])


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1, 2)])  # with query chunks not all have a gradient
def test_split_and_rotate(dtype: torch.dtype, used: tuple[int, ...]) -> None:
    s, b, g, r, d = 5, 2, 3, 2, 8
    torch.manual_seed(0)
    cos, sin = cos_sin(torch.arange(s) * 7, *Unscaled().inverse_frequencies(d))
    qkv = torch.randn(s, b, g * (r + 2) * d, dtype=torch.float64).to(dtype).requires_grad_()
    heads = qkv.view(s, b, g, (r + 2) * d)  # as Megatron splits it
    q, k, v = (x.reshape(s, b, -1, d).permute(1, 2, 0, 3) for x in heads.split([r * d, d, d], dim=3))
    references = [apply_rope(q, cos, sin), apply_rope(k, cos, sin), v]
    results = split_and_rotate(qkv, g, cos, sin)
    assert [x.shape for x in results] == [(b, g * r, s, d), (b, g, s, d), (b, g, s, d)]
    assert all(x.stride(-1) == 1 for x in results) and results[2].data_ptr() == v.data_ptr()
    check([*results], [*references], ROWS[dtype])
    grads = [torch.randn(x.shape).to(dtype) for x in results]
    [dqkv] = torch.autograd.grad([results[i] for i in used], qkv, [grads[i] for i in used])
    [reference] = torch.autograd.grad([references[i] for i in used], qkv, [grads[i] for i in used])
    check([dqkv], [reference], ROWS[dtype])


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize(("used", "block"), [((0, 1, 2), 2**19), ((0,), 50), ((1, 2), 1)])
def test_norm_of_queries_and_keys(
    dtype: torch.dtype, used: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's rms_norm of each head before RoPE; only the projection and a number a head are kept."""
    monkeypatch.setattr(elementwise, "CPU_BLOCK", block)
    s, b, g, r, d = 5, 2, 3, 2, 8
    torch.manual_seed(0)
    cos, sin = cos_sin(torch.arange(s) * 7, *Unscaled().inverse_frequencies(d))
    qkv = (3 * torch.randn(s, b, g * (r + 2) * d, dtype=torch.float64)).to(dtype).requires_grad_()
    weights = [(1 + torch.randn(d, dtype=torch.float64) / 4).to(dtype).requires_grad_() for _ in "qk"]
    heads = qkv.view(s, b, g, (r + 2) * d)
    q, k, v = (x.reshape(s, b, -1, d).permute(1, 2, 0, 3) for x in heads.split([r * d, d, d], dim=3))
    q, k = (F.rms_norm(x, (d,), weight, 0.1) for x, weight in zip((q, k), weights, strict=True))
    references = [apply_rope(q, cos, sin), apply_rope(k, cos, sin), v]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    ):
        results = split_and_rotate(qkv, g, cos, sin, norm=HeadNorm(*weights, 0.1))
    assert sum(kept.values()) == qkv.numel() + 2 * d + s * b * g * (r + 1) + cos.numel() + sin.numel()
    check([*results], [*references], ROWS[dtype])
    grads = [torch.randn(x.shape).to(dtype) for x in results]
    found, wanted = (
        torch.autograd.grad(
            [xs[i] for i in used], [qkv, *weights], [grads[i] for i in used], allow_unused=True
        )
        for xs in (results, references)
    )
    with_gradient = [True, 0 in used, 1 in used]
    assert [x is not None for x in found] == with_gradient == [x is not None for x in wanted]
    check([x for x in found if x is not None], [x for x in wanted if x is not None], ROWS[dtype])


def test_a_projection_that_does_not_fit() -> None:
    table = torch.zeros(5, 4)
    for shape, kv_heads in (((5, 1, 96), 5), ((4, 1, 96), 3)):
        with pytest.raises(ValueError, match="does not fit"):
            split_and_rotate(torch.zeros(shape), kv_heads, table, table)


# ---- the Triton kernels --------------------------------------------------------------------------


def check_triton_kernels(device: str = "cpu") -> None:
    """Against float64: odd sizes, rows and heads that are views of longer ones, all of a dtype's accuracy."""
    from megatron_ultralong.model import elementwise_triton

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        for n, f in ((3, 7), (2, 1025), (1, 1), (0, 8)):
            gate_up = torch.randn(n, 2 * f + 1, device=device).mul_(4).to(dtype)[:, : 2 * f]
            dout = torch.randn(f, n, device=device).to(dtype).t()
            x = gate_up.double().requires_grad_()
            reference = F.silu(x[:, :f]) * x[:, f:]
            out, dx = torch.empty(n, f, dtype=dtype, device=device), torch.full_like(gate_up, torch.nan)
            elementwise_triton.swiglu(gate_up, out)
            elementwise_triton.swiglu_backward(gate_up, dout, dx)
            [wanted] = torch.autograd.grad(reference, x, dout.double())
            check([out.double(), dx.double()], [reference, wanted], tolerance)
        for s, b, g, r, d in ((5, 2, 3, 2, 8), (3, 1, 5, 4, 20), (1, 1, 1, 1, 2), (0, 1, 1, 1, 8)):
            heads = torch.randn(s, b, g, r + 2, d, device=device).to(dtype)
            cos, sin = (
                x.to(device) for x in cos_sin(torch.arange(s) * 7, *Unscaled().inverse_frequencies(d))
            )
            for x in (heads[:, :, :, :-2], heads[:, :, :, -2:-1]):
                for direction in (1, -1):
                    out = torch.full_like(heads, torch.nan)[:, :, :, : x.shape[3]]
                    elementwise_triton.rotate(x, *_by_token(cos, sin), direction, out)
                    wanted = torch.empty(x.shape, dtype=torch.float64, device=device)
                    _rotate(x.double(), *_by_token(cos.double(), sin.double()), direction, wanted)
                    check([out.double()], [wanted], tolerance)


def test_triton_kernels_in_the_interpreter() -> None:
    interpret("from tests.unit.test_elementwise import check_triton_kernels; check_triton_kernels()")


def test_triton_kernels_are_used_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called for tensors of a GPU, forward and backward, and never for others."""
    calls: list[str] = []
    names = ("swiglu", "swiglu_backward", "rotate")
    kernels = SimpleNamespace(**{name: lambda *given, name=name: calls.append(name) for name in names})
    monkeypatch.setitem(sys.modules, f"{model.__name__}.elementwise_triton", kernels)
    monkeypatch.setattr(model, "elementwise_triton", kernels, raising=False)
    s, g, d = 5, 3, 8
    cos, sin = cos_sin(torch.arange(s), *Unscaled().inverse_frequencies(d))

    def run() -> None:
        x, qkv = (torch.randn(s, 1, g * 4 * d, requires_grad=True) for _ in range(2))
        swiglu(x).sum().backward()
        sum(y.sum() for y in split_and_rotate(qkv, g, cos, sin)).backward()

    run()
    assert calls == []
    for module in (elementwise, rotary_embedding):
        monkeypatch.setattr(module, "in_triton", lambda x: True)
    run()
    assert calls == ["swiglu", "swiglu_backward", *["rotate"] * 4]
    monkeypatch.undo()
    for dtype in (torch.float32, torch.float64):
        assert not elementwise.in_triton(torch.zeros(2, dtype=dtype))


def test_chosen_operations() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    chosen = {
        (device, dtype, te): elementwise.chosen_operations(device, dtype, te)["norm"]
        for device in (cpu, meta)
        for dtype in (torch.float32, torch.bfloat16)
        for te in (False, True)
    }
    own = {key for key, what in chosen.items() if "blocks" in what}
    assert own == {(cpu, torch.float32, False)}
    assert {key for key, what in chosen.items() if "TransformerEngine" in what} == {k for k in chosen if k[2]}
    # What is said is what runs.
    for device, dtype, te in chosen:
        x = torch.ones(2, 4, dtype=dtype, device=device, requires_grad=True)
        name = rms_norm(x, torch.ones(4, dtype=dtype, device=device), 1e-5).grad_fn.name()
        assert te or ("_RMSNorm" in name) == ((device, dtype, te) in own)
