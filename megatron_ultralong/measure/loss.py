"""Speed and memory of output layer and cross entropy on one rank, in our chunks and in other ways.

Compared with: whole logits, chunks recomputed by torch.utils.checkpoint, and Liger's kernel.

Shapes: n tokens, H hidden size, V vocabulary. Every row goes from hidden states [n, H] and the weight [V, H]
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
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.number_format import (
    byte_count,
    percent,
    ratio,
    scientific,
    three_digits,
    token_count,
)
from megatron_ultralong.measure.report import RecordRow, ReportColumn, SpeedReport, about
from megatron_ultralong.model.loss import LossSpec, sharded_token_loss

LossFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""(hidden [n, H], weight [V, H], labels [n]) -> the summed cross entropy."""

COLUMNS = (
    ReportColumn("ms", "ms", three_digits, "forward and backward", False),
    ReportColumn("ratio", "to whole", ratio, "time relative to that of whole logits"),
    ReportColumn(
        "peak_bytes",
        "peak",
        byte_count,
        "memory beyond hidden states, weight, labels and both gradients",
        higher_is_better=False,
    ),
    ReportColumn(
        "share_of_logits",
        "of logits",
        percent,
        "peak relative to the bytes of whole logits in the dtype of the weight",
    ),
    ReportColumn(
        "error_loss", "error loss", scientific, "relative, against float64, with --error-tokens tokens"
    ),
    ReportColumn(
        "error_gradients",
        "error grads",
        scientific,
        "relative Frobenius norm, the larger one of both gradients",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is measured."""

    tokens: int
    hidden: int
    vocab: int
    chunks: Sequence[int]
    """Tokens per chunk, one row each."""
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
    settings: LossSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
    record: RecordRow = lambda row: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each before it starts, `record` with each row
    as soon as it is measured."""
    dtype = str(settings.dtype).removeprefix("torch.")
    report = SpeedReport(
        kind="loss",
        columns=COLUMNS,
        record=record,
        bars=("ms", "peak_bytes"),
        about=about(
            device,
            command,
            kernel="torch matmul",
            dtype=dtype,
            shape=f"{token_count(settings.tokens)} tokens, hidden {settings.hidden}, "
            f"vocabulary {settings.vocab}, {dtype}",
            tokens=settings.tokens,
            error_tokens=settings.error_tokens,
            repeats=settings.repeats,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    inputs, small = (_random_inputs(settings, n, device) for n in (settings.tokens, settings.error_tokens))
    reference = _loss_and_gradients(_whole_logits, small[0].double(), small[1].double(), small[2])
    logits = settings.tokens * settings.vocab * inputs[1].element_size()
    whole_ms: float | None = None
    for name, loss, note in _rows(settings, device):
        progress(name)
        row: dict[str, Any] = {"name": name, "ours": name.startswith("ours")}
        if loss is None:
            report.add(row | {"note": note})
            continue
        timing.free_memory()
        try:
            pairs = zip(_loss_and_gradients(loss, *small), reference, strict=True)
            errors = [timing.relative_error(x, y) for x, y in pairs]
            row |= {"error_loss": errors[0], "error_gradients": max(errors[1:])}
            with timing.peak_memory(device) as peak:
                results = _loss_and_gradients(loss, *inputs)
            # The gradients are results; everything else that a row holds is counted.
            row["peak_bytes"] = max(0, peak.bytes - timing.tensor_bytes(*results[1:]))
            del results
            work = partial(_loss_and_gradients, loss, *inputs)
            row["ms"] = 1e3 * timing.median_seconds(work, device, settings.repeats)
        except RuntimeError as error:
            if not timing.is_out_of_memory(error):
                raise
            row["note"] = "out of memory"
        else:
            whole_ms = row["ms"] if loss is _whole_logits else whole_ms
            row |= {
                "ratio": row["ms"] / whole_ms if whole_ms else None,
                "share_of_logits": row["peak_bytes"] / logits,
            }
        report.add(row)
    return report


# ---- rows --------------------------------------------------------------------------------------


def _rows(settings: LossSettings, device: torch.device) -> Iterator[tuple[str, LossFunction | None, str]]:
    """(name, loss, why it cannot be run) of every row; whole logits first."""
    yield "whole logits", _whole_logits, ""
    for chunk in settings.chunks:
        loss = partial(_ours, chunk=chunk, vocab=settings.vocab)
        yield f"ours, chunks of {token_count(chunk)}", loss, ""
    for chunk in settings.chunks:
        loss = partial(_checkpointed, chunk=chunk)
        yield f"torch.utils.checkpoint, chunks of {token_count(chunk)}", loss, ""
    name = "Liger fused linear cross entropy"
    if importlib.util.find_spec("liger_kernel") is None:
        yield name, None, "not installed: pip install liger-kernel"
    elif device.type != "cuda":
        yield name, None, "needs a GPU"
    else:
        yield name, _liger, ""


def _whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
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
    losses = [
        checkpoint(_whole_logits, x, weight, y, use_reentrant=False)
        for x, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    result = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return result[0] if isinstance(result, tuple) else result


def _loss_and_gradients(
    loss: LossFunction, hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, gradient of weight)."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    total = loss(leaves[0], leaves[1], labels)
    grad_hidden, grad_weight = torch.autograd.grad(total, leaves)
    return total.detach(), grad_hidden, grad_weight


def _random_inputs(
    settings: LossSettings, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(settings.seed)
    hidden, weight = (
        torch.randn(rows, settings.hidden, generator=generator, device=device, dtype=settings.dtype)
        for rows in (tokens, settings.vocab)
    )
    weight *= settings.hidden**-0.5  # so that logits are of order one
    return hidden, weight, torch.randint(settings.vocab, (tokens,), generator=generator, device=device)
