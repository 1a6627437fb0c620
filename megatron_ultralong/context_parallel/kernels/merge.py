"""Merges attention over one set of keys with attention over another, each given by output and logsumexp."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from megatron_ultralong.errors import first_line


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which partial results of x are summed: float32, or wider if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def merge_(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """Merge `partial` into `out`, in place.

    out [b, h, s, d] and lse [b, h, s] are float32 (or wider), any strides; partial [b, h, s, d] in any dtype,
    partial_lse [b, h, s]. lse must be finite (a query sees at least itself, so own keys come first);
    partial_lse may be -inf.

    out <- out + w (partial - out) with w = sigmoid(partial_lse - lse). Only the difference of the logsumexps
    is exponentiated, so nothing overflows however large the logits are. On CUDA this is one Triton kernel
    (merge_triton.py) where Triton can be used.
    """
    if out.is_cuda and out.dtype == torch.float32 and why_not_triton(out.device) is None:
        from megatron_ultralong.context_parallel.kernels import merge_triton

        return merge_triton.merge_(out, lse, partial, partial_lse)
    weight = torch.sigmoid(partial_lse - lse).unsqueeze(-1)
    out.lerp_(partial.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, partial_lse))
    return None


def merge_all(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge n partial results at once: outs [n, ..., d] and lses [n, ...] -> (out [..., d], lse [...]),
    float32 or wider.

    A logsumexp of -inf stands for no keys; if all are -inf, out is 0 and lse -inf.
    """
    if len(outs) == 1:
        return outs[0].to(lses.dtype), lses[0]
    peak = lses.amax(dim=0)
    weights = torch.exp(lses - torch.where(peak == -torch.inf, 0.0, peak))  # 1 at the peak: nothing overflows
    total = weights.sum(dim=0)
    out = torch.einsum("n...d,n...->...d", outs.to(lses.dtype), weights) / torch.where(
        total > 0, total, 1.0
    ).unsqueeze(-1)
    return out, peak + total.log()


def why_not_triton(device: torch.device) -> str | None:
    """Return in one line why the Triton kernel cannot be used on a GPU, or None; tried out once per device.

    Triton compiles a launcher with the C compiler of the machine, and the kernel for the GPU at hand.
    """
    with _trying:  # the backward runs in a thread of its own
        return _try_triton(device)


@functools.cache
def _try_triton(device: torch.device) -> str | None:
    try:
        from megatron_ultralong.context_parallel.kernels import merge_triton
    except ImportError:
        return "Triton is not installed"
    out, lse = torch.zeros(1, 1, 64, 64, device=device), torch.zeros(1, 1, 64, device=device)
    try:
        merge_triton.merge_(out, lse, out.bfloat16(), lse.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compilers, the driver, the file system
        return f"Triton failed: {first_line(error)}"
    return None


_trying = threading.Lock()
