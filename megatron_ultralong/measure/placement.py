"""Documents of packed rows on context-parallel ranks, counted: work of the largest rank, keys sent, messages,
beside what other ways of cutting a row need.

Nothing is timed but the placement itself. The share of ideal is an estimate (planning/time.py).
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_ultralong.config import Parallel
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.placement import place
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import report
from megatron_ultralong.measure.report import ReportColumn, SpeedReport
from megatron_ultralong.planning import packing_report
from megatron_ultralong.planning import time as estimates
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.hardware import GPUS_PER_NODE
from megatron_ultralong.planning.packing_report import MODEL

COLUMNS = (
    ReportColumn("imbalance", "work of the largest rank", "{:.3f}".format, "over the mean of all ranks"),
    ReportColumn(
        "sent",
        "keys sent",
        "{:.3f}".format,
        "tokens whose K and V the rank that sends most sends or forwards in a forward, per token that it holds",
    ),
    ReportColumn("far", "of these to another node", "{:.3f}".format, "of the ring, on nodes of eight"),
    ReportColumn(
        "bound",
        "zigzag ring a document",
        "{:.3f}".format,
        "the same where each cut document made a round of its k ranks in equal parts",
    ),
    ReportColumn("messages", "messages", "{:.0f}".format, "that the rank with most sends in a forward"),
    ReportColumn(
        "rounds", "rounds", "{:.0f}".format, "of messages that are sent together, one after the other"
    ),
    ReportColumn(
        "share",
        "share of ideal, estimated",
        "{:.2f}".format,
        "seconds of equal work and nothing to send over those estimated for H100s, forward and backward of "
        "Llama-3.1-8B's attention without tensor parallelism",
        higher_is_better=True,
    ),
    ReportColumn("milliseconds", "placing a row, ms", "{:.0f}".format, "measured here"),
)


@dataclass(frozen=True, kw_only=True)
class PlacementSettings:
    """What is counted."""

    length: int
    """S."""
    cp: Sequence[int]
    lengths: Path | None = None
    """Documents of the user's own (`planning.documents.read`), in place of the distributions here."""
    tokenizer: Path | None = None
    """For the documents that are measured; None = without them."""
    seed: int = 0

    def __post_init__(self) -> None:
        for cp in self.cp:
            if cp < 2 or self.length % (2 * cp):
                raise UserError(
                    f"--cp {cp} must be at least 2, and --seq-length {self.length} a multiple of 2 x --cp"
                )


def run(
    settings: PlacementSettings, device: torch.device, command: str, progress: Callable[[str], None]
) -> SpeedReport:
    """Count for every distribution, number of ranks and method."""
    found = SpeedReport(
        kind="placement",
        about=report.about(torch.device("cpu"), command, length=settings.length),
        columns=COLUMNS,
        bars=("share",),
    )
    for name, documents in distributions(settings):
        for cp in settings.cp:
            progress(f"{name}, CP {cp}")
            for method, row in _rows(documents, settings.length, cp):
                found.add(
                    {"name": f"{name}, CP {cp}: {method}", "ours": method.startswith(PLACED), "cp": cp, **row}
                )
    return found


# ---- documents ---------------------------------------------------------------------------------


def distributions(settings: PlacementSettings) -> Iterator[tuple[str, DocumentLengths]]:
    """Yield (name, lengths). All but those of files are modelled: drawn from a distribution with a published
    mean; its form is this project's choice."""
    from megatron_ultralong.planning import documents

    if settings.lengths is not None:
        yield str(settings.lengths), documents.read(settings.lengths)
        return
    draw = numpy.random.default_rng(settings.seed)
    if settings.tokenizer is not None:
        yield "Python's source files (measured)", _python_files(settings.tokenizer, draw)
    yield "a training set (published histogram)", _lengths(_of_histogram(draw, settings.length // 4))
    # 115,482 documents in 100M tokens of FineWeb-Edu (the sample codelion/fineweb-edu-100M).
    web = _lognormal(draw, mean=866, sigma=1.1, count=20_000)
    yield "web text (modelled)", _lengths(web)
    # About 250k tokens a book on average (huggingface.co/blog/ulysses-sp).
    yield "books (modelled)", _lengths(_lognormal(draw, mean=250_000, sigma=0.6, count=60))
    # Examples under 8K tokens (arXiv 2504.06214); their mean is not published.
    instructions = _lognormal(draw, mean=1_000, sigma=1.0, count=20_000).clip(max=8192)
    yield "instruction data (modelled)", _lengths(instructions)
    # ProLong's second stage (arXiv 2410.02660): a fifth of the tokens in documents of 512K, two fifths in
    # documents from 64K, the others short.
    middle = _lognormal(draw, mean=90_000, sigma=0.3, count=200).clip(65_536, 524_288)
    yield (
        "ProLong's 512K mix (modelled)",
        _lengths(_mixed(draw, [(0.2, numpy.full(9, 524_288)), (0.4, middle), (0.4, web)])),
    )
    yield "256 documents of 4K", DocumentLengths((4096,))


_EDGES = (1, 11, 51, 101, 201, 501, *(2**k + 1 for k in range(10, 18)), 196_609)
_COUNTS = (
    *(30254, 391188, 699596, 1377757, 3794735, 3316785, 2106566),
    *(988525, 410002, 173574, 115007, 18428, 22513, 18284),
)
"""Documents between two edges in the training set of MagiAttention's benchmark
(exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv at 2c64135)."""


def _of_histogram(draw: numpy.random.Generator, longest: int) -> Any:
    """Documents of that histogram, log-uniform between two edges; as there none is longer than a quarter of a
    row."""
    edges, shares = numpy.log(_EDGES), numpy.array(_COUNTS) / sum(_COUNTS)
    which = draw.choice(len(shares), 20_000, p=shares)
    lengths = numpy.exp(draw.uniform(edges[which], edges[which + 1]))
    return lengths[lengths <= longest]


def _python_files(tokenizer: Path, draw: numpy.random.Generator) -> DocumentLengths:
    """Every file of Python's standard library in random order."""
    from megatron_ultralong.data.tokenizer import load_tokenizer

    encode = load_tokenizer(tokenizer).ids
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    found = [len(encode(path.read_text(encoding="utf-8", errors="ignore"))) for path in files]
    return _lengths(draw.permutation(numpy.array([length for length in found if length])))


def _lognormal(draw: numpy.random.Generator, *, mean: float, sigma: float, count: int) -> Any:
    return draw.lognormal(numpy.log(mean) - sigma**2 / 2, sigma, count)


def _mixed(draw: numpy.random.Generator, parts: Sequence[tuple[float, Any]]) -> Any:
    """Documents of several kinds in random order, each kind with its share of the tokens."""
    tokens = min(kind.sum() / share for share, kind in parts)
    taken = [kind[: max(1, int(numpy.searchsorted(kind.cumsum(), share * tokens)))] for share, kind in parts]
    return draw.permutation(numpy.concatenate(taken))


def _lengths(drawn: Any) -> DocumentLengths:
    return DocumentLengths(tuple(int(length) for length in numpy.maximum(drawn, 1)))


# ---- methods -----------------------------------------------------------------------------------

PLACED = "placed documents"


def _rows(documents: DocumentLengths, length: int, cp: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, its figures)."""
    machine = packing_report.machine(documents, cp)
    planned = packing_report.run_of(length, Parallel(cp=cp))
    rows, kv_bytes = documents.rows(length), length // cp * 2 * MODEL.kv_heads * MODEL.head_dim * 2
    for ulysses in (1, 2, 4, GPUS_PER_NODE):
        if ulysses > 1 and (cp <= GPUS_PER_NODE or cp % ulysses):
            continue
        ring = cp // ulysses
        layout = replace(planned, parallel=Parallel(cp=cp, ulysses=ulysses))
        nodes = layout.parallel.ring_ranks_per_node(GPUS_PER_NODE)
        work = documents.work(length, ring, nodes)
        start = time.perf_counter()
        for starts in rows:
            place(starts, length, ring, nodes)
        seconds = (time.perf_counter() - start) / len(rows)
        exchanged = estimates.attention_traffic(layout, MODEL, documents)[0].exchange / kv_bytes
        yield (
            PLACED if ulysses == 1 else f"{PLACED}, all-to-all of {ulysses}",
            {
                "imbalance": work.imbalance,
                "sent": work.most_sent + exchanged,
                "far": work.most_sent_far,
                "bound": work.sent_in_rings + exchanged,
                "messages": work.messages,
                "rounds": work.rounds,
                "share": estimates.share_of_ideal(layout, MODEL, machine),
                "milliseconds": 1e3 * seconds,
            },
        )
    cut = float(numpy.mean([zigzag_imbalance(starts, length, cp) for starts in rows]))
    for name, kind, messages in (("ring", "p2p", cp - 1), ("all-gather", "all_gather", MODEL.kv_heads)):
        other = replace(planned, parallel=Parallel(cp=cp, cp_comm_type=kind))  # type: ignore[arg-type]
        share = estimates.share_of_ideal(other, MODEL, machine, imbalance=cut)
        yield (
            f"{name}, row cut zigzag",
            {
                "imbalance": cut,
                "sent": cp - 1,
                "messages": messages,
                "rounds": messages,
                "share": share,
            },
        )
    if cp > MODEL.heads:
        yield "all-to-all", {"note": f"{MODEL.heads} heads"}
        return
    exchange = replace(planned, parallel=Parallel(cp=cp, ulysses=cp))
    forward, _ = estimates.attention_traffic(exchange, MODEL)
    share = estimates.share_of_ideal(exchange, MODEL, machine)
    yield (
        "all-to-all",
        {
            "imbalance": 1.0,
            "sent": forward.exchange / kv_bytes,
            "messages": 2 * (cp - 1),
            "rounds": 2,
            "share": share,
        },
    )


def zigzag_imbalance(starts: Sequence[int], length: int, cp: int) -> float:
    """Work of the largest rank over the mean where the row is cut zigzag, as a single document would be."""
    bounds = numpy.array([*starts, length])
    seen = numpy.arange(1, length + 1) - numpy.repeat(bounds[:-1], numpy.diff(bounds))
    chunks = seen.reshape(2 * cp, -1).sum(axis=1)
    work = [sum(chunks[chunk] for chunk in zigzag.chunk_ids(rank, cp)) for rank in range(cp)]
    return float(max(work) / numpy.mean(work))
