"""Attention with logsumexp: chooses the kernel, runs it forward and backward, alone and by blocks.

The backward takes the *final* output and logsumexp, over all keys of the sequence, with any part of the keys:
its gradients are then those of that part. So a ring needs no second forward.

Shapes: q, out, dout [b, h, s, d]; k, v [b, g, t, d], h a multiple of g (KV heads are never expanded here);
lse [b, h, s]. Any strides. The backends:

    cpu     flash attention of the CPU
    flash   FlashAttention-2 of PyTorch on CUDA
    flash3  FlashAttention-3 in its place, flash4 FlashAttention-4 (flash_versions.py)
    cudnn   cuDNN on Hopper and later; backward not bit-reproducible
    eager   eager.py, for what the others do not support
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.attention_spec import AttentionSpec, Backend
from megatron_ultralong.context_parallel.kernels import (
    aten,
    deterministic,
    eager,
    flash_versions,
    varlen,
)
from megatron_ultralong.context_parallel.kernels.aten import QKVGradients
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype, merge_
from megatron_ultralong.context_parallel.zigzag import AttentionBlock

_HALF = (torch.bfloat16, torch.float16)
_OLDEST_CUDNN = 90501
"""Older versions require dout in the strides of out."""
_FORWARD = {
    "cpu": aten.cpu_forward,
    **dict.fromkeys(("flash", "flash3", "flash4"), aten.flash_forward),
    "cudnn": aten.cudnn_forward,
    "eager": eager.forward,
}
_BACKWARD = {
    "cpu": aten.cpu_backward,
    **dict.fromkeys(("flash", "flash3", "flash4"), aten.flash_backward),
    "cudnn": aten.cudnn_backward,
    "eager": eager.backward,
}


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Return the backend for tensors of this kind. Startup.py applies a run's setting before."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or dtype not in _HALF or head_dim % 8 or head_dim > 256:
        return "eager"
    flash = flash_versions.active()
    # FlashAttention-3 is the faster one on Hopper (docs/context_parallel.md).
    return flash if flash == "flash3" or why_not_cudnn(device, head_dim) else "cudnn"


def why_not_cudnn(device: torch.device, head_dim: int) -> str | None:
    """Return in a few words why cuDNN cannot be used for half precision on a GPU, or None.

    `torch.backends.cuda.enable_cudnn_sdp(False)` excludes it.
    """
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "it is switched off"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if head_dim > 128:
        return "the head dimension is above 128"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU is older than Hopper"
    version, problem = cudnn_version()
    if version < _OLDEST_CUDNN:
        return problem or f"version {version} is older than {_OLDEST_CUDNN}"
    return None


def cudnn_version() -> tuple[int, str | None]:
    """Return (the version of the cuDNN that is loaded, 0 if none can be used; why not)."""
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:  # one that PyTorch was not built for
        return 0, str(error).partition("\n")[0]
    return version or 0, None if version else "this PyTorch has none"


def without_cudnn(q: Tensor) -> Backend | None:
    """Return FlashAttention where cuDNN would be chosen, otherwise None.

    cuDNN builds a plan for every new shape, which does not pay off where shapes keep changing.
    """
    return flash_versions.active() if choose(q.device, q.dtype, q.shape[3]) == "cudnn" else None


# ---- one kernel ---------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of q over k and v -> (out in the dtype of q, lse in float32; float64 if q is).

    causal: query i sees keys 0..i (s must equal t). scale: of the logits, default d ** -0.5. backend: default
    `choose`. Without any key, out is zero and lse -inf. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, causal)
    if q.numel() == 0 or k.numel() == 0:  # the CPU kernel would divide by zero
        lse = torch.full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q), device=q.device)
        return torch.zeros_like(q), lse
    run = _FORWARD[backend or _choose(q, k)]
    return run(_dense_rows(q), _dense_rows(k), _dense_rows(v), causal, _scale(q, scale))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None = None,
    *,
    backend: Backend | None = None,
) -> QKVGradients:
    """Compute gradients (dq, dk, dv) in the dtypes of q, k, v, of attention whose output and logsumexp over
    *all* keys are given."""
    _check(q, k, v, causal)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"{_shapes(dout=dout, out=out, lse=lse)} do not fit {_shapes(q=q)}")
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = _BACKWARD[backend or _choose(q, k)]
    # CUDA kernels read lse as if it were contiguous.
    dout, q, k, v, out = (_dense_rows(x) for x in (dout, q, k, v, out))
    return run(dout, q, k, v, out, lse.contiguous(), causal, _scale(q, scale))


# ---- blocks of attention ------------------------------------------------------------------------


def forward_diagonal(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[AttentionBlock], spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Compute attention inside diagonal blocks that cover all of s without a gap -> (out in the dtype of q,
    lse)."""
    if len(blocks) == 1:
        return forward(q, k, v, True, spec.scale, backend=spec.backend)
    if _in_one_call(q, blocks, spec):
        return varlen.forward(q, k, v, blocks, spec.scale)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=accumulation_dtype(q), device=q.device)
    for block in blocks:
        rows = _tokens(block.queries)
        out[rows], lse[rows] = forward(q[rows], k[rows], v[rows], True, spec.scale, backend=spec.backend)
    return out, lse


def backward_diagonal(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Sequence[AttentionBlock],
    spec: AttentionSpec,
) -> QKVGradients:
    """Compute gradients of `forward_diagonal` in the dtypes of q, k, v; out and lse over *all* keys, as in
    `backward`."""
    if len(blocks) == 1:
        return backward(dout, q, k, v, out, lse, True, spec.scale, backend=spec.backend)
    # Deterministic calls would allocate dQ several times.
    if _in_one_call(q, blocks, spec) and deterministic.splits(q, len(blocks)) == 1:
        return varlen.backward(dout, q, k, v, out, lse, blocks, spec.scale)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for block in blocks:
        rows = _tokens(block.queries)
        dout_, q_, k_, v_, out_, lse_ = (x[rows] for x in (dout, q, k, v, out, lse))
        partial = backward(dout_, q_, k_, v_, out_, lse_, True, spec.scale, backend=spec.backend)
        for gradient, x in zip(gradients, partial, strict=True):
            gradient[rows] = x
    return gradients


def merge_past(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: AttentionBlock, spec: AttentionSpec
) -> None:
    """Compute attention of a past block and merge it into out [b, h, s, d] and lse [b, h, s] in place (see
    `merge_`); other rows stay."""
    rows, keys = _tokens(block.queries), _tokens(block.keys)
    partial, partial_lse = forward(q[rows], k[keys], v[keys], False, spec.scale, backend=spec.backend)
    merge_(out[rows], lse[rows], partial, partial_lse)


def backward_past(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: AttentionBlock,
    spec: AttentionSpec,
) -> QKVGradients:
    """Compute a past block's share of dq (of its queries), dk and dv (of its keys)."""
    rows, keys = _tokens(block.queries), _tokens(block.keys)
    dout, q, out, lse = (x[rows] for x in (dout, q, out, lse))
    return backward(dout, q, k[keys], v[keys], out, lse, False, spec.scale, backend=spec.backend)


def _in_one_call(q: Tensor, blocks: Sequence[AttentionBlock], spec: AttentionSpec) -> bool:
    chosen = spec.backend or choose(q.device, q.dtype, q.shape[3])
    # Two blocks are also two ranges of a whole row's queries, for which cuDNN is faster.
    least = {"flash": 2, "flash3": 2, "flash4": 2, "cudnn": 3}.get(chosen)
    return least is not None and len(blocks) >= least and q.shape[0] == 1


def _tokens(rows: slice) -> tuple[slice, slice, slice]:
    return (slice(None), slice(None), rows)


def _choose(q: Tensor, k: Tensor) -> Backend:
    one_token = min(q.shape[2], k.shape[2]) == 1  # cuDNN requires at least two
    return (without_cudnn(q) if one_token else None) or choose(q.device, q.dtype, q.shape[3])


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape
    fits = fits and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:  # the CPU kernel would read past the end
        raise ValueError(
            f"{_shapes(q=q, k=k, v=v)} are not [b, h, s, d], [b, g, t, d] twice, h a multiple of g"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal attention requires as many keys as queries, not {k.shape[2]} and {q.shape[2]}"
        )


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())


def _dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: the CPU kernel silently gives wrong results otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale
