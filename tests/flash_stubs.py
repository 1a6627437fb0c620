"""Stand-ins for the packages flash_attn_3 and flash-attn-4 on a CPU: their published interfaces over
attention in plain operations, behind PyTorch's own adapters (torch.nn.attention).

The interfaces are those of Dao-AILab/flash-attention at 0251105 (15 August 2026): the operators that
hopper/flash_api.cpp registers, and the functions of flash_attn/cute/interface.py, whose forward returned a
pair up to 4.0.0b19 and four values from 4.0.0b20 on.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import eager

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Calls(list[dict[str, Any]]):
    """What the package was asked for, call by call."""


def _documents(cu_seqlens: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, list[Tensor]]]:
    """(index of its tokens, its tensors as [b, h, s, d]) of every document; of all rows without documents."""
    if cu_seqlens is None:
        yield slice(None), [x.transpose(1, 2) for x in tensors]
        return
    for start, stop in pairwise(cu_seqlens.tolist()):
        yield slice(start, stop), [x[start:stop].transpose(0, 1).unsqueeze(0) for x in tensors]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Fill `out` [b, s, h, d] or [s, h, d]; return the logsumexp, [b, h, s] or [h, s]."""
    assert all(x.stride(-1) == 1 for x in (q, k, v, out))
    lses = []
    for at, (q_, k_, v_) in _documents(cu, q, k, v):
        part, lse = eager.forward(q_.float(), k_.float(), v_.float(), causal, scale)
        out[at].copy_(part.transpose(1, 2) if cu is None else part[0].transpose(0, 1))
        lses.append(lse if cu is None else lse[0])
    return torch.cat(lses, -1)


def _backward(
    tensors: list[Tensor], lse: Tensor, grads: list[Tensor], cu: Tensor | None, causal: bool, scale: float
) -> None:
    """Fill `grads` (dq, dk, dv) from (dout, q, k, v, out)."""
    assert lse.is_contiguous() and lse.dtype == torch.float32
    for at, (dout, q, k, v, out) in _documents(cu, *tensors):
        lse_ = lse if cu is None else lse[:, at].unsqueeze(0)
        parts = eager.backward(*(x.float() for x in (dout, q, k, v, out)), lse_, causal, scale)
        for grad, part in zip(grads, parts, strict=True):
            grad[at].copy_(part.transpose(1, 2) if cu is None else part[0].transpose(0, 1))


class _OnCpu(torch.library.Library):
    """Registers for the CPU what PyTorch's adapters register for CUDA."""

    def __init__(self, namespace: str, kind: str, key: str) -> None:
        super().__init__(namespace, kind, "CPU")

    def impl(self, name: str, function: Any, key: str) -> None:
        super().impl(name, function, "CPU")


def _by_name(operator: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a call; PyTorch leaves out trailing ones that have their defaults."""
    declared = operator._schema.arguments
    return {a.name: a.default_value for a in declared} | {
        a.name: x for a, x in zip(declared, args, strict=False)
    }


@contextmanager
def flash3() -> Iterator[Calls]:
    """Inside, flash_attn_3 is installed."""
    adapter = pytest.importorskip("torch.nn.attention._fa3", reason="PyTorch 2.13 has an adapter")
    calls = Calls()

    def fwd(*args: Any) -> Any:
        given = _by_name(torch.ops.flash_attn_3.fwd.default, args)
        calls.append({"op": "fwd", **given})
        q, k, v, out = (given[name] for name in ("q", "k", "v", "out"))
        out = torch.empty_like(q) if out is None else out
        lse = _forward(q, k, v, out, given["cu_seqlens_q"], given["is_causal"], given["softmax_scale"])
        return out, lse, q.new_empty(0), q.new_empty(0)

    def bwd(*args: Any) -> Any:
        given = _by_name(torch.ops.flash_attn_3.bwd.default, args)
        calls.append({"op": "bwd", **given})
        tensors = [given[name] for name in ("dout", "q", "k", "v", "out")]
        grads = [given[name] for name in ("dq", "dk", "dv")]
        cu, causal, scale = given["cu_seqlens_q"], given["is_causal"], given["softmax_scale"]
        _backward(tensors, given["softmax_lse"], grads, cu, causal, scale)
        return tuple(given["q"].new_empty(0) for _ in range(5))

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("flash_attn_3", "DEF") as package,
    ):
        package.define(FORWARD)
        package.define(BACKWARD)
        package.impl("fwd", fwd, "CPU")
        package.impl("bwd", bwd, "CPU")
        module = types.ModuleType("flash_attn_interface")
        module.__spec__ = types.SimpleNamespace(name="flash_attn_interface")  # type: ignore[assignment]
        patch.setitem(sys.modules, "flash_attn_interface", module)
        patch.setattr(adapter, "Library", _OnCpu)
        patch.setattr(adapter, "_fa3_common_support_error", lambda *args, **more: None)
        yield calls


@contextmanager
def flash4(returned: int = 2) -> Iterator[Calls]:
    """Inside, flash-attn-4 is installed, whose forward returns 2 or 4 values."""
    adapter = pytest.importorskip("torch.nn.attention._fa4", reason="PyTorch 2.13 has an adapter")
    calls = Calls()

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        min_seqlen_k: int | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        *,
        num_splits: int = 1,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Any:
        calls.append({"op": "fwd", "max_seqlen_q": max_seqlen_q})
        assert return_lse and softmax_scale is not None
        out = torch.empty_like(q) if out is None else out
        lse = _forward(q, k, v, out, cu_seqlens_q, causal, softmax_scale)
        return (out, lse, None, None)[:returned]

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        deterministic: bool = False,
    ) -> Any:
        calls.append({"op": "bwd", "deterministic": deterministic})
        assert softmax_scale is not None
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _backward([dout, q, k, v, out], lse, grads, cu_seqlens_q, causal, softmax_scale)
        return tuple(grads)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            module = types.ModuleType(name)
            module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
            patch.setitem(sys.modules, name, module)
        module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd  # type: ignore[attr-defined]
        patch.setattr(adapter, "Library", _OnCpu)
        patch.setattr(adapter, "_fa4_common_support_error", lambda *args, **more: None)
        patch.setattr(adapter, "_get_device_major", lambda device: 10)
        adapter._fa4_import_module.cache_clear()
        yield calls
    adapter._fa4_import_module.cache_clear()
