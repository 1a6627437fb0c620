"""What the ring and the gather share: attention between parts of the tokens (layout.Part), forward and
backward.

A rank begins with its own keys, of which every query sees at least itself, and then merges in what it sees of
others'.

Shapes: b sequences, h query heads, g KV heads, s tokens of this rank, t keys, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.kernels.merge import merge_
from megatron_ultralong.context_parallel.kernels.select import Backend, Gradients
from megatron_ultralong.context_parallel.zigzag import Part, Starts, document_starts
from megatron_ultralong.errors import UserError


def check(
    q: Tensor, k: Tensor, v: Tensor, starts: Starts | None, ranks: int, rows: Sequence[slice] | None = None
) -> tuple[int, tuple[int, ...]]:
    """(s, document starts in plain numbers) of what one of `ranks` was given, or ValueError where the shapes
    do not fit (the kernels check the rest) and UserError where the starts do not, or there are several packed
    rows. rows: those of s that q holds."""
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and k.dtype == v.dtype and k.shape[3] == q.shape[3]
    s = k.shape[2] if fits else 0
    held = [slice(0, s)] if rows is None else rows
    fits = (
        fits
        and all(0 <= run.start <= run.stop <= s for run in held)
        and q.shape[2] == sum(run.stop - run.start for run in held)
    )
    if not fits or (ranks > 1 and s % 2):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        even = "s even and " if ranks > 1 else ""
        raise ValueError(
            f"{shapes} are not [b, h, s, d] and [b, g, s, d] twice, with {even}k, v of one dtype"
        )
    if starts is not None and q.shape[0] != 1:
        raise UserError(
            f"attention inside documents takes one packed row at a time, not {q.shape[0]}: set train.micro_batch to 1"
        )
    return s, document_starts(starts, s * ranks)


def wide(x: Tensor) -> torch.dtype:
    """Dtype to accumulate in: float32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def backend(q: Tensor, starts: tuple[int, ...]) -> Backend | None:
    """The backend for parts of these tokens; None = the kernel's own choice.

    cuDNN builds a plan for every new shape, and the parts of packed rows never stop having new ones:
    FlashAttention there.
    """
    if len(starts) > 1 and kernels.choose(q.device, q.dtype, q.shape[3]) == "cudnn":
        return "flash"
    return None


def forward_own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [b, h, s, d] inside causal parts that cover all of s without a gap -> (out in the dtype
    of q, lse)."""
    if len(parts) == 1:
        return kernels.forward(q, k, v, True, scale, backend=backend)
    if _in_one_call(q, parts, backend):
        return varlen_forward(q, k, v, parts, scale)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide(q), device=q.device)
    for part in parts:
        rows = _rows(part.queries)
        out[rows], lse[rows] = kernels.forward(q[rows], k[rows], v[rows], True, scale, backend=backend)
    return out, lse


def backward_own(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    scale: float | None = None,
    backend: Backend | None = None,
) -> Gradients:
    """Gradients of `forward_own` in the dtypes of q, k, v; out and lse over *all* keys, as `kernels.backward`
    takes them."""
    if len(parts) == 1:
        return kernels.backward(dout, q, k, v, out, lse, True, scale, backend=backend)
    if _in_one_call(q, parts, backend):
        return varlen_backward(dout, q, k, v, out, lse, parts, scale)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part in parts:
        rows = _rows(part.queries)
        shares = kernels.backward(
            dout[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], True, scale, backend=backend
        )
        for gradient, share in zip(gradients, shares, strict=True):
            gradient[rows] = share
    return gradients


def merge_part(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Part,
    scale: float | None = None,
    backend: Backend | None = None,
) -> None:
    """Attention of one part, merged into out [b, h, s, d] and lse [b, h, s] (see `merge_`) in place; other
    rows stay."""
    rows, keys = _rows(part.queries), _rows(part.keys)
    partial, partial_lse = kernels.forward(q[rows], k[keys], v[keys], part.causal, scale, backend=backend)
    merge_(out[rows], lse[rows], partial, partial_lse)


def part_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Part,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Gradients:
    """One part's share of dq (of its queries), dk and dv (of its keys)."""
    rows, keys = _rows(part.queries), _rows(part.keys)
    return kernels.backward(
        dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], part.causal, scale, backend=backend
    )


def _rows(tokens: slice) -> tuple[slice, slice, slice]:
    return (slice(None), slice(None), tokens)


# ---- many documents in one call of FlashAttention, on CUDA -------------------------------------

PADDING = 128
"""Rows by which the backward's float32 workspace grows with each document of a call. So a call takes at most
one document for as many tokens: the workspace is then no more than twice that of one long document."""


def _in_one_call(q: Tensor, parts: Sequence[Part], backend: Backend | None) -> bool:
    chosen = backend or kernels.choose(q.device, q.dtype, q.shape[3])
    return len(parts) > 2 and q.shape[0] == 1 and chosen in ("flash", "cudnn")


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `forward_own`, for b = 1 on CUDA in half precision, by FlashAttention-2 over documents of several
    lengths."""
    bounds, longest = _bounds(parts, q.device)
    out, lse = torch.ops.aten._flash_attention_forward(
        *(_tokens_first(x) for x in (q, k, v)),
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
    )[:2]
    return _heads_first(out), lse.unsqueeze(0)  # lse comes as [h, s]


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    scale: float | None = None,
) -> Gradients:
    """As `backward_own`, under the conditions of `varlen_forward`; in several calls where there are very many
    documents."""
    most = max(q.shape[2] // PADDING, 1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is not
    for first in range(0, len(parts), most):
        some = parts[first : first + most]
        bounds, longest = _bounds(some, q.device)
        rows = _rows(slice(some[0].queries.start, some[-1].queries.stop))
        shares = torch.ops.aten._flash_attention_backward(
            *(_tokens_first(x[rows]) for x in (dout, q, k, v, out)),
            lse[rows].squeeze(0).contiguous(),
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            True,
            unused,
            unused[0],
            scale=scale,
        )
        for gradient, share in zip((dq, dk, dv), shares, strict=True):
            gradient[rows] = _heads_first(share)
    return dq, dk, dv


def _bounds(parts: Sequence[Part], device: torch.device) -> tuple[Tensor, int]:
    """(where documents begin and the last ends, from 0: int32 [documents + 1], tokens of the longest, or
    more)."""
    begin = parts[0].queries.start
    bounds = [part.queries.start - begin for part in parts] + [parts[-1].queries.stop - begin]
    # At least 2: for single queries FlashAttention has a path of its own, meant for decoding.
    return torch.tensor(bounds, dtype=torch.int32, device=device), max(
        2, *(b - a for a, b in pairwise(bounds))
    )


def _tokens_first(x: Tensor) -> Tensor:
    """[1, h, s, d] -> [s, h, d], its last dimension contiguous."""
    x = x.squeeze(0).transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """[s, h, d] -> [1, h, s, d]."""
    return x.transpose(0, 1).unsqueeze(0)
