"""Context-parallel attention of one layer, all ranks' work on one device, beside one kernel on the whole
sequence.

Every rank is a thread (context_parallel/virtual_ranks.py) and copies inside the device stand for the network:
what is measured is the work that a way of context parallelism adds to the kernel, not how well it hides the
network. The ideal has the same total work.

Shapes: S tokens of the whole sequence, h query heads, g KV heads, d head dimension; b = 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import check_heads
from megatron_ultralong.context_parallel import api, zigzag
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import peers, problems, ring_baselines, timing
from megatron_ultralong.measure import report as reports
from megatron_ultralong.measure.problems import Problem
from megatron_ultralong.measure.report import Column, Report
from megatron_ultralong.measure.virtual_run import Make, Method, Runner, VirtualRunner

METHODS = (
    "ring",
    "all-to-all",
    "hybrid",
    "gather",
    "te-style",
    "naive",
    "torch",
    "ring-flash-attn",
    "yunchang",
)
COLUMNS = (
    Column(key="forward_ms", title="forward ms", show=reports.milliseconds),
    Column(key="backward_ms", title="backward ms", show=reports.milliseconds),
    Column(key="both_ms", title="both ms", show=reports.milliseconds),
    Column(
        key="share_of_ideal",
        title="of ideal",
        show=reports.share,
        meaning="time of one kernel on the whole sequence over this row's, forward and backward; for rows with documents, of the kernel "
        "inside documents. On a CPU it says little: ranks are threads on all cores",
    ),
    Column(
        key="workspace_bytes",
        title="workspace",
        show=reports.bytes_,
        meaning="peak memory of all ranks together above inputs, output and gradients",
    ),
    Column(
        key="sent_forward",
        title="sent fwd B/token",
        show=reports.number,
        meaning="bytes that a rank sends in one layer, over S",
    ),
    Column(key="sent_backward", title="sent bwd B/token", show=reports.number),
    Column(
        key="error_out",
        title="error out",
        show=reports.scientific,
        meaning="relative Frobenius norm against float64, at the error length",
    ),
    Column(
        key="error_gradients",
        title="error grads",
        show=reports.scientific,
        meaning="the largest of dq, dk and dv",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    length: int
    """S."""
    cp: Sequence[int]
    ulysses: Sequence[int]
    """Ranks that exchange heads, for the hybrid rows."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    documents: int | None
    """Documents of random lengths in the packed rows; None = no such rows."""
    error_length: int
    """S of the comparison with float64."""
    kernel: str = "auto"
    """auto, cudnn or flash."""
    methods: Sequence[str] = METHODS
    repeats: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "heads", "kv_heads", "head_dim", "error_length", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}")
        for cp in self.cp:
            if cp < 2:
                raise UserError(f"--cp {cp} must be at least 2: one rank alone is the first row")
            for name, length in (("length", self.length), ("error-length", self.error_length)):
                if length % (2 * cp):
                    raise UserError(f"--{name} {length} is not divisible by 2 x --cp = {2 * cp}")
        if self.documents is not None and not 1 <= self.documents <= min(self.length, self.error_length):
            raise UserError(
                f"--documents {self.documents} must be at least 1 and at most --length and --error-length"
            )
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UserError(f"--methods {unknown[0]}: choose from {', '.join(METHODS)}")


def run(
    settings: Settings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure all rows; `progress` is told each before it starts. UserError where the kernel is not there."""
    with _kernel(settings, device) as chosen:
        shape = (
            f"S {reports.tokens(settings.length)}, {settings.heads} query and {settings.kv_heads} KV heads of {settings.head_dim}, "
            f"{str(settings.dtype).removeprefix('torch.')}"
        )
        report = Report(
            kind="attention",
            columns=COLUMNS,
            bars=("share_of_ideal", "workspace_bytes", "error_out"),
            about=reports.about(
                device,
                command,
                kernel=chosen,
                dtype=str(settings.dtype).removeprefix("torch."),
                shape=shape,
                length=settings.length,
                error_length=settings.error_length,
                documents=settings.documents,
                repeats=settings.repeats,
                memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
            ),
        )
        for packed in (False, True) if settings.documents is not None else (False,):
            problem, small = (
                problems.draw(
                    length,
                    settings.heads,
                    settings.kv_heads,
                    settings.head_dim,
                    settings.dtype,
                    device,
                    documents=settings.documents if packed else None,
                    seed=settings.seed,
                )
                for length in (settings.length, settings.error_length)
            )
            want = problems.reference(small)
            ideal: dict[str, Any] | None = None
            for method in _methods(settings, packed, chosen):
                name = f"{method.name}, {settings.documents} documents" if packed else method.name
                progress(name)
                row = {
                    "name": name,
                    "ours": method.ours,
                    "cp": method.cp,
                    "documents": settings.documents if packed else None,
                }
                report.rows.append(row | _measured(method, problem, small, want, settings, device, ideal))
                ideal = ideal or report.rows[-1]
    return report


# ---- rows --------------------------------------------------------------------------------------


def _methods(settings: Settings, packed: bool, chosen: str) -> Iterator[Method]:
    """The rows in order; the first is the ideal."""
    within = "inside documents" if packed else "on the whole sequence"
    yield Method(name=f"one kernel ({chosen}) {within}", cp=1, make=_ours(1, "p2p"), ours=False)
    have = set(settings.methods)
    for cp in settings.cp:
        if "ring" in have:
            yield Method(name=f"ours: ring, CP {cp}", cp=cp, make=_ours(1, "p2p"))
        for ulysses in [
            *([cp] if "all-to-all" in have else []),
            *(u for u in settings.ulysses if "hybrid" in have and 1 < u < cp and cp % u == 0),
        ]:
            name = (
                f"ours: all-to-all, CP {cp}"
                if ulysses == cp
                else f"ours: all-to-all {ulysses} x ring {cp // ulysses}, CP {cp}"
            )
            try:
                check_heads(settings.heads, settings.kv_heads, ulysses)
                yield Method(name=name, cp=cp, make=_ours(ulysses, "p2p"))
            except UserError as error:
                yield Method(name=name, cp=cp, make=None, note=str(error))
        if "gather" in have:
            yield Method(name=f"ours: gather, CP {cp}", cp=cp, make=_ours(1, "all_gather"))
    if packed:
        return  # the others are for whole sequences
    for cp in settings.cp:
        if "te-style" in have:
            yield Method(
                name=f"TE-style schedule (written here), CP {cp}",
                cp=cp,
                make=ring_baselines.te_style,
                ours=False,
            )
        if "naive" in have:
            yield Method(
                name=f"naive ring, sums in {str(settings.dtype).removeprefix('torch.')}, CP {cp}",
                cp=cp,
                make=ring_baselines.naive,
                ours=False,
            )
        yield from (method for key, method in peers.methods(cp, settings.dtype) if key in have)


def _ours(ulysses: int, cp_comm_type: api.CommType) -> Make:
    def make(group: Any, starts: Sequence[int] | None) -> tuple[Any, Any]:
        groups = api.ContextGroups() if group is None else api.split_group(group, ulysses, cp_comm_type)
        spec = AttentionSpec(document_starts=(0,) if starts is None else starts)
        return (
            partial(api.attention_forward, groups=groups, spec=spec),
            partial(api.attention_backward, groups=groups, spec=spec),
        )

    return make


def _measured(
    method: Method,
    problem: Problem,
    small: Problem,
    want: list[Tensor],
    settings: Settings,
    device: torch.device,
    ideal: dict[str, Any] | None,
) -> dict[str, Any]:
    """The figures of one row, or why there are none."""
    if method.make is None:
        return {"note": method.note}
    timing.release()
    runner: Runner | None = None
    try:
        runner = (method.runner or VirtualRunner)(method.cp)
        row = _figures(method, runner, problem, settings, device)
        row["share_of_ideal"] = (
            1.0 if ideal is None else ideal["both_ms"] / row["both_ms"] if ideal.get("both_ms") else None
        )
        row |= _errors(method, runner, small, want)
        return row | ({"note": method.note} if method.note else {})
    except Exception as error:
        if isinstance(error, RuntimeError) and timing.is_out_of_memory(error):
            return {"note": "out of memory"}
        if method.ours:
            raise
        # What another package does here must not end the comparison.
        return {
            "note": f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                :150
            ]
        }
    finally:
        if runner is not None:
            runner.close()


def _figures(
    method: Method, runner: Runner, problem: Problem, settings: Settings, device: torch.device
) -> dict[str, Any]:
    shards, starts, make = problem.shards(method.cp), problem.starts, method.make
    assert make is not None

    def forward(group: Any, rank: int) -> tuple[Any, Any]:
        return make(group, starts)[0](*shards[rank][1:])

    def backward(group: Any, rank: int) -> Any:
        return make(group, starts)[1](*shards[rank], *kept[rank])

    def both(group: Any, rank: int) -> Any:
        go, back = make(group, starts)
        out, lse = go(*shards[rank][1:])
        return out, back(*shards[rank], out, lse)

    kept = runner.run(forward)
    sent_forward = runner.sent
    runner.run(backward)
    sent_backward = runner.sent
    with timing.peak(device) as peak:
        results = runner.run(both, inside=peak.threads)
    results_size = sum(timing.size(out, *gradients) for out, gradients in results)
    del results
    row: dict[str, Any] = {"workspace_bytes": max(0, peak.bytes - results_size)}
    for key, work in (("forward_ms", forward), ("backward_ms", backward), ("both_ms", both)):
        row[key] = 1e3 * timing.seconds(lambda work=work: runner.run(work), device, settings.repeats)  # type: ignore[misc]
    if sent_forward is not None and sent_backward is not None:
        tokens = problem.q.shape[2] * method.cp
        row |= {"sent_forward": sent_forward / tokens, "sent_backward": sent_backward / tokens}
    return row


def _errors(method: Method, runner: Runner, small: Problem, want: list[Tensor]) -> dict[str, Any]:
    shards, make = small.shards(method.cp), method.make
    assert make is not None

    def both(group: Any, rank: int) -> list[Tensor]:
        go, back = make(group, small.starts)
        out, lse = go(*shards[rank][1:])
        return [out, *back(*shards[rank], out, lse)]

    found = [zigzag.unshard(list(parts), 2) for parts in zip(*runner.run(both), strict=True)]
    errors = [timing.error(x, y) for x, y in zip(found, want, strict=True)]
    return {"error_out": errors[0], "error_gradients": max(errors[1:])}


@contextlib.contextmanager
def _kernel(settings: Settings, device: torch.device) -> Iterator[str]:
    """The kernel that is used inside: --kernel flash rules cuDNN out, as
    torch.backends.cuda.enable_cudnn_sdp(False) does."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        if settings.kernel == "flash":
            torch.backends.cuda.enable_cudnn_sdp(False)
        chosen = kernels.choose(device, settings.dtype, settings.head_dim)
        if settings.kernel not in ("auto", chosen):
            raise UserError(
                f"--kernel {settings.kernel}, but {device.type} with {settings.dtype} and --head-dim {settings.head_dim} takes {chosen}; "
                "use --kernel auto"
            )
        yield chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
