"""Speed, memory and error of one layer's context parallel attention, all ranks' work on one device.

Compared with one kernel on the whole sequence, which has the same total work. Every rank is a thread
(context_parallel/virtual_ranks.py), and copies inside the device take the place of the network: this measures
the work that a method adds to the kernel, not how well it hides the network.

Shapes: S tokens of the whole sequence, h query heads, g KV heads, d head dimension; b = 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import flash_versions, startup
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.attention_inputs import (
    AttentionShape,
    float64_reference,
    random_inputs,
)
from megatron_ultralong.measure.attention_methods import AttentionSettings, methods
from megatron_ultralong.measure.number_format import (
    byte_count,
    integer,
    percent,
    scientific,
    three_digits,
    token_count,
)
from megatron_ultralong.measure.report import RecordRow, ReportColumn, SpeedReport, about
from megatron_ultralong.measure.virtual_run import (
    AttentionMethod,
    RankRunner,
    VirtualRankRunner,
)

COLUMNS = (
    ReportColumn("forward_ms", "forward ms", three_digits),
    ReportColumn("backward_ms", "backward ms", three_digits),
    ReportColumn("both_ms", "both ms", three_digits),
    ReportColumn(
        "share_of_ideal",
        "of ideal",
        percent,
        "time of one kernel on the whole sequence over the time of this row, forward and backward; for rows with "
        "documents, of the kernel inside documents. On a CPU it says little: ranks are threads on all cores",
        higher_is_better=True,
    ),
    ReportColumn(
        "workspace_bytes",
        "workspace",
        byte_count,
        "peak memory of all ranks together beyond inputs, output and gradients",
        higher_is_better=False,
    ),
    ReportColumn(
        "sent_forward", "sent fwd B/token", integer, "bytes that a rank sends in one layer, divided by S"
    ),
    ReportColumn("sent_backward", "sent bwd B/token", integer),
    ReportColumn(
        "error_out",
        "error out",
        scientific,
        "relative Frobenius norm against float64, at --error-tokens tokens",
        higher_is_better=False,
    ),
    ReportColumn("error_gradients", "error grads", scientific, "the largest one of dq, dk and dv"),
)


def run(
    settings: AttentionSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
    record: RecordRow = lambda row: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each before it starts, `record` with each row
    as soon as it is measured.

    Raises UserError if the kernel is not available.
    """
    with _selected_kernel(settings, device) as (kernel, choices):
        report = SpeedReport(
            kind="attention",
            columns=COLUMNS,
            record=record,
            bars=("share_of_ideal", "workspace_bytes", "error_out"),
            about=about(
                device,
                command,
                kernel=kernel,
                **choices,
                dtype=settings.dtype_name,
                shape=f"S {token_count(settings.length)}, {settings.heads} query and "
                f"{settings.kv_heads} KV heads of {settings.head_dim}, {settings.dtype_name}",
                length=settings.length,
                error_length=settings.error_length,
                documents=settings.documents,
                repeats=settings.repeats,
                memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
            ),
        )
        packings: list[int | None] = [None] if settings.unpacked else []
        for documents in packings if settings.documents is None else [*packings, settings.documents]:
            shape = AttentionShape(
                length=settings.length,
                heads=settings.heads,
                kv_heads=settings.kv_heads,
                head_dim=settings.head_dim,
                dtype=settings.dtype,
                documents=documents,
            )
            measurement = _Measurement(shape, settings, device)
            for method in methods(settings, documents is not None, kernel):
                name = method.name if documents is None else f"{method.name}, {documents} documents"
                progress(name)
                row = {
                    "name": name,
                    "method": method.key,
                    "ours": method.ours,
                    "cp": method.cp,
                    "documents": documents,
                }
                report.add(row | measurement.row(method))
    return report


@contextlib.contextmanager
def _selected_kernel(
    settings: AttentionSettings, device: torch.device
) -> Iterator[tuple[str, dict[str, str]]]:
    """The kernel that all methods use and the choices of `startup.apply`; PyTorch's switches are restored at
    the end."""
    cudnn, flash = torch.backends.cuda.cudnn_sdp_enabled(), flash_versions.active()
    try:
        choices = startup.apply(
            settings.kernel, device, settings.dtype, settings.head_dim, settings.documents is not None
        )
        yield kernels.choose(device, settings.dtype, settings.head_dim), choices
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        flash_versions.activate(flash)


# ---- figures -----------------------------------------------------------------------------------


class _Measurement:
    """Measures methods on the same inputs; the first method measured is the ideal."""

    def __init__(self, shape: AttentionShape, settings: AttentionSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.inputs = random_inputs(shape, device, settings.seed)
        short = dataclasses.replace(shape, length=settings.error_length)
        self.error_inputs = random_inputs(short, device, settings.seed)
        self.reference = float64_reference(self.error_inputs)
        self._ideal: dict[str, Any] | None = None

    def row(self, method: AttentionMethod) -> dict[str, Any]:
        """Return the figures of one method, or a note that says why it has none."""
        row = self._try(method)
        self._ideal = self._ideal or row
        return row

    def _try(self, method: AttentionMethod) -> dict[str, Any]:
        if method.make is None:
            return {"note": method.note}
        timing.free_memory()
        runner: RankRunner | None = None
        try:
            runner = (method.runner or VirtualRankRunner)(method.cp)
            row = self._figures(method, runner)
            if self._ideal is None:
                row["share_of_ideal"] = 1.0
            else:
                both_ms = self._ideal.get("both_ms")
                row["share_of_ideal"] = both_ms / row["both_ms"] if both_ms else None
            row |= self._errors(method, runner)
            return row | ({"note": method.note} if method.note else {})
        except Exception as error:
            if isinstance(error, RuntimeError) and timing.is_out_of_memory(error):
                return {"note": "out of memory"}
            if method.ours:
                raise
            # A failure inside another package must not end the comparison.
            first_line = (str(error).splitlines() or [""])[0]
            return {"note": f"failed: {type(error).__name__}: {first_line}"[:150]}
        finally:
            if runner is not None:
                runner.close()

    def _figures(self, method: AttentionMethod, runner: RankRunner) -> dict[str, Any]:
        shards, make = self.inputs.shards(method.cp, method.ulysses), method.make
        placement = self.inputs.placement(method.cp // method.ulysses)
        assert make is not None

        def forward(group: Any, rank: int) -> tuple[Any, Any]:
            return make(group, placement)[0](*shards[rank][1:])

        def backward(group: Any, rank: int) -> Any:
            return make(group, placement)[1](*shards[rank], *outputs[rank])

        def both(group: Any, rank: int) -> Any:
            attention_forward, attention_backward = make(group, placement)
            out, lse = attention_forward(*shards[rank][1:])
            return out, attention_backward(*shards[rank], out, lse)

        outputs = runner.run(forward)
        sent_forward = runner.sent
        runner.run(backward)
        sent_backward = runner.sent
        with timing.peak_memory(self.device) as peak:
            results = runner.run(both, context=peak.thread_context)
        result_bytes = sum(timing.tensor_bytes(out, *gradients) for out, gradients in results)
        del results
        row: dict[str, Any] = {"workspace_bytes": max(0, peak.bytes - result_bytes)}
        for key, work in (("forward_ms", forward), ("backward_ms", backward), ("both_ms", both)):
            seconds = timing.median_seconds(
                partial(runner.run, work), self.device, self.settings.repeats, self.settings.warm_up
            )
            row[key] = 1e3 * seconds
        if sent_forward is not None and sent_backward is not None:
            tokens = self.inputs.q.shape[2] * method.cp
            row |= {"sent_forward": sent_forward / tokens, "sent_backward": sent_backward / tokens}
        return row

    def _errors(self, method: AttentionMethod, runner: RankRunner) -> dict[str, Any]:
        shards, make = self.error_inputs.shards(method.cp, method.ulysses), method.make
        placement = self.error_inputs.placement(method.cp // method.ulysses)
        positions = self.error_inputs.positions(method.cp, method.ulysses)
        assert make is not None

        def both(group: Any, rank: int) -> list[Tensor]:
            attention_forward, attention_backward = make(group, placement)
            out, lse = attention_forward(*shards[rank][1:])
            return [out, *attention_backward(*shards[rank], out, lse)]

        results = [torch.empty_like(x) for x in self.reference]
        for held, of_rank in zip(positions, runner.run(both), strict=True):
            for result, x in zip(results, of_rank, strict=True):
                result[:, :, held.to(x.device)] = x.to(result.dtype)
        errors = [timing.relative_error(x, y) for x, y in zip(results, self.reference, strict=True)]
        return {"error_out": errors[0], "error_gradients": max(errors[1:])}
