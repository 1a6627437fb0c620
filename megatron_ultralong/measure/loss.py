"""Output layer and cross entropy of one rank: in our chunks, whole, with chunks recomputed by
torch.utils.checkpoint, and by Liger's kernel.

Shapes: n tokens, H hidden size, V vocabulary; every row goes from hidden states [n, H] and the weight [V, H]
to the summed loss and the gradients of both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import report as reports
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.report import Column, Report
from megatron_ultralong.model.loss import LossSpec, sharded_token_loss

Loss: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""(hidden [n, H], weight [V, H], labels [n]) -> the summed cross entropy."""

COLUMNS = (
    Column(key="ms", title="ms", show=reports.milliseconds, meaning="forward and backward"),
    Column(key="ratio", title="to whole", show=reports.ratio, meaning="time over that of whole logits"),
    Column(
        key="peak_bytes",
        title="peak",
        show=reports.bytes_,
        meaning="memory above hidden states, weight, labels and both gradients",
    ),
    Column(
        key="share_of_logits",
        title="of logits",
        show=reports.share,
        meaning="peak over the bytes of whole logits in the dtype of the weight",
    ),
    Column(
        key="error_loss",
        title="error loss",
        show=reports.scientific,
        meaning="relative, against float64, at the error tokens",
    ),
    Column(
        key="error_gradients",
        title="error grads",
        show=reports.scientific,
        meaning="relative Frobenius norm, the larger of both gradients",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    tokens: int
    hidden: int
    vocab: int
    chunks: Sequence[int]
    """Tokens of a chunk, one row each."""
    dtype: torch.dtype
    error_tokens: int
    """Tokens of the comparison with float64."""
    repeats: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "vocab", "error_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for chunk in self.chunks:
            if chunk < 1:
                raise UserError(f"--chunks {chunk} must be at least 1")


def run(
    settings: Settings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure all rows; `progress` is told each before it starts."""
    dtype = str(settings.dtype).removeprefix("torch.")
    report = Report(
        kind="loss",
        columns=COLUMNS,
        bars=("ms", "peak_bytes"),
        about=reports.about(
            device,
            command,
            kernel="torch matmul",
            dtype=dtype,
            shape=f"{reports.tokens(settings.tokens)} tokens, hidden {settings.hidden}, "
            f"vocabulary {settings.vocab}, {dtype}",
            tokens=settings.tokens,
            error_tokens=settings.error_tokens,
            repeats=settings.repeats,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    inputs, small = (_inputs(settings, n, device) for n in (settings.tokens, settings.error_tokens))
    want = _both(_whole, small[0].double(), small[1].double(), small[2])
    logits = settings.tokens * settings.vocab * inputs[1].element_size()
    whole_ms: float | None = None
    for name, loss, note in _rows(settings, device):
        progress(name)
        row: dict[str, Any] = {"name": name, "ours": name.startswith("ours")}
        if loss is None:
            report.rows.append(row | {"note": note})
            continue
        timing.release()
        try:
            errors = [timing.error(x, y) for x, y in zip(_both(loss, *small), want, strict=True)]
            row |= {"error_loss": errors[0], "error_gradients": max(errors[1:])}
            with timing.peak(device) as peak:
                results = _both(loss, *inputs)
            # The gradients are results; what a row holds of its own beside them is counted.
            row["peak_bytes"] = max(0, peak.bytes - timing.size(*results[1:]))
            del results
            row["ms"] = 1e3 * timing.seconds(partial(_both, loss, *inputs), device, settings.repeats)
        except RuntimeError as error:
            if not timing.is_out_of_memory(error):
                raise
            row["note"] = "out of memory"
        else:
            whole_ms = row["ms"] if loss is _whole else whole_ms
            row |= {
                "ratio": row["ms"] / whole_ms if whole_ms else None,
                "share_of_logits": row["peak_bytes"] / logits,
            }
        report.rows.append(row)
    return report


# ---- rows --------------------------------------------------------------------------------------


def _rows(settings: Settings, device: torch.device) -> Iterator[tuple[str, Loss | None, str]]:
    """(name, loss, why there is none); whole logits first."""
    yield "whole logits", _whole, ""
    for chunk in settings.chunks:
        yield (
            f"ours, chunks of {reports.tokens(chunk)}",
            partial(_ours, chunk=chunk, vocab=settings.vocab),
            "",
        )
    for chunk in settings.chunks:
        yield (
            f"torch.utils.checkpoint, chunks of {reports.tokens(chunk)}",
            partial(_checkpointed, chunk=chunk),
            "",
        )
    name = "Liger fused linear cross entropy"
    if importlib.util.find_spec("liger_kernel") is None:
        yield name, None, "not installed: pip install liger-kernel"
    elif device.type != "cuda":
        yield name, None, "needs a GPU"
    else:
        yield name, _liger, ""


def _whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
    )


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, vocab: int) -> Tensor:
    mask = torch.ones(1, len(labels), device=hidden.device)
    spec = LossSpec(group=_OneRank, vocab_size=vocab, chunk=chunk)
    return sharded_token_loss(hidden.unsqueeze(1), weight, labels.unsqueeze(0), mask, spec)


class _OneRank:
    """A tensor parallel group of one."""

    @staticmethod
    def size() -> int:
        return 1

    @staticmethod
    def rank() -> int:
        return 0


def _checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    parts = [
        checkpoint(_whole, x, weight, y, use_reentrant=False)
        for x, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return found[0] if isinstance(found, tuple) else found


def _both(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, gradient of weight)."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    total = loss(leaves[0], leaves[1], labels)
    grad_hidden, grad_weight = torch.autograd.grad(total, leaves)
    return total.detach(), grad_hidden, grad_weight


def _inputs(settings: Settings, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(settings.seed)
    hidden, weight = (
        torch.randn(rows, settings.hidden, generator=generator, device=device, dtype=settings.dtype)
        for rows in (tokens, settings.vocab)
    )
    weight *= settings.hidden**-0.5  # logits of the size of one
    return hidden, weight, torch.randint(settings.vocab, (tokens,), generator=generator, device=device)
