"""FlashAttention-3 and 4 in place of FlashAttention-2: through PyTorch's operators and adapters down to the
published interfaces of their packages, with numbers, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import flash_versions, select, startup, varlen
from tests import flash_stubs
from tests.packed import own_blocks
from tests.unit.test_kernels import reference, reference_gradients, tensors

BF16 = torch.bfloat16
CPU = torch.device("cpu")
VERSIONS = {"flash3": flash_stubs.flash3, "flash4": flash_stubs.flash4}


def near(x: Tensor, y: Tensor, tolerance: float) -> None:
    """Largest error against the largest value."""
    assert x.shape == y.shape
    assert (x.double() - y.double()).abs().max() <= tolerance * y.double().abs().max()


@pytest.fixture(params=["flash3", "flash4"])
def version(request: pytest.FixtureRequest) -> Iterator[tuple[Any, flash_stubs.Calls]]:
    with VERSIONS[request.param]() as calls:
        flash_versions.activate(request.param)
        assert flash_versions.active() == request.param and flash_versions.installed(request.param)
        yield request.param, calls
        flash_versions.activate("flash")
    assert flash_versions.active() == "flash"


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "half"])
@pytest.mark.parametrize(("h", "g", "s", "t", "causal"), [(6, 2, 70, 70, True), (4, 4, 33, 90, False)])
def test_rows(version: Any, layout: str, h: int, g: int, s: int, t: int, causal: bool) -> None:
    name, calls = version
    q, k, v, dout = tensors(2, h, g, s, t, 32, BF16, layout)
    out, lse = select.forward(q, k, v, causal, 0.2, backend=name)
    expected, expected_lse = reference(q, k, v, causal, 0.2)
    near(out, expected, 1e-2)
    near(lse, expected_lse, 1e-5)
    assert out.dtype == BF16 and lse.dtype == torch.float32
    grads = select.backward(dout, q, k, v, out, lse, causal, 0.2, backend=name)
    for x, y in zip(grads, reference_gradients(dout, q, k, v, causal, 0.2), strict=True):
        near(x, y, 2e-2)
    assert [call["op"] for call in calls] == ["fwd", "bwd"]


def test_documents_in_one_call(version: Any) -> None:
    _, calls = version
    q, k, v, dout = tensors(1, 4, 2, 60, 60, 16, BF16, "sbhd")
    blocks = own_blocks((0, 1, 20, 21, 48), 60)
    out, lse = varlen.forward(q, k, v, blocks, 0.3)
    assert len(calls) == 1 and calls[0]["max_seqlen_q"] == 27
    # So many short documents would be several calls of the backward; their number is not tested here.
    grads = varlen._backward(dout, q, k, v, out, lse, blocks, 0.3)
    assert len(calls) == 2
    for block in blocks:
        rows = (slice(None), slice(None), block.queries)
        q_, k_, v_, dout_ = q[rows], k[rows], v[rows], dout[rows]
        expected, expected_lse = reference(q_, k_, v_, True, 0.3)
        near(out[rows], expected, 1e-2)
        near(lse[rows], expected_lse, 1e-5)
        for x, y in zip(grads, reference_gradients(dout_, q_, k_, v_, True, 0.3), strict=True):
            near(x[rows], y, 2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic(version: Any, deterministic: bool) -> None:
    name, calls = version
    q, k, v, dout = tensors(1, 2, 1, 16, 16, 16, BF16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        out, lse = select.forward(q, k, v, True, backend=name)
        select.backward(dout, q, k, v, out, lse, True, backend=name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[-1]["deterministic"] is deterministic


@pytest.mark.parametrize("name", VERSIONS)
def test_tried_out_before_it_is_used(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with VERSIONS[name]() as calls:
        assert startup._activate(name, CPU, BF16, 64) is None
        assert [call["op"] for call in calls] == ["fwd", "bwd"]
        assert flash_versions.active() == name
        assert startup._activate("flash", CPU, BF16, 64) is None
    assert flash_versions.active() == "flash"


def test_a_package_that_does_not_fit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with flash_stubs.flash4(returned=4):
        reason = startup._activate("flash4", CPU, BF16, 64)
    assert reason == "it failed: too many values to unpack (expected 2)"
    assert flash_versions.active() == "flash"
    assert "flash_attn" in str(startup._activate("flash3", CPU, BF16, 64)), "not installed"
    assert flash_versions.active() == "flash"
