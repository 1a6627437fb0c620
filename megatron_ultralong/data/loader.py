"""Rows to this rank's micro-batches: deterministic, resumable on any layout, sharded over context parallel
ranks.

S tokens of a sequence, s = S / CP of this rank, b sequences of a micro-batch. A checkpoint only has to
contain how many samples were consumed. Sample number n is the same row on every layout: micro-batch m after
`consumed` takes the samples from consumed + m x (b x DP), of which data parallel rank r takes the b from r x
b. So the samples of an optimizer step do not depend on the data parallel size, and the next step's follow
them.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.placement import Placement, place
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime.signals import STOP_SIGNALS

Batch = dict[str, Any]
"""tokens, labels: int64 [b, s]; loss_mask: float32 [b, s], 1 where the label counts; and, for attention
inside documents, placement: a `Placement` of the row (b = 1), None where it is one document."""


@dataclass(frozen=True, kw_only=True)
class BatchShard:
    """This rank's share of every batch."""

    micro_batch: int = 1
    """b."""
    dp_rank: int = 0
    dp: int = 1
    cp_rank: int = 0
    cp: int = 1
    ulysses: int = 1
    """Adjacent context parallel ranks that exchange heads (config.py); rows are placed on such groups."""
    ranks_per_node: int = 1
    """Adjacent ones of these groups (with ulysses=1, ranks) that are in the same node."""
    inside_documents: bool = False
    """Rows are placed on the context parallel ranks document by document (b = 1), for attention inside
    them."""

    def samples(self, consumed: int, number: int) -> range:
        """Numbers of the samples in this rank's micro-batch `number` after `consumed` samples."""
        first = consumed + (number * self.dp + self.dp_rank) * self.micro_batch
        return range(first, first + self.micro_batch)


def batches(
    dataset: BlendedDataset,
    shard: BatchShard,
    *,
    consumed: int,
    seed: int,
    shuffle: bool = True,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches, endlessly, from sample `consumed`; the next one is prepared ahead.

    workers: processes that read; 0 = a thread.
    """
    training = _TrainingBatches(dataset, shard, consumed, seed, shuffle)
    if workers:
        return map(
            _batch_or_error,
            DataLoader(
                _InWorker(training),
                batch_size=None,
                sampler=itertools.count(),
                num_workers=workers,  # type: ignore[arg-type]
                multiprocessing_context="spawn",
                prefetch_factor=2,
                worker_init_fn=_ignore_signals,
            ),
        )
    return _one_ahead(training.__getitem__)


def validation_batches(
    dataset: BlendedDataset, eval_rows: int, shard: BatchShard, *, copies: int = 1, multiple: int = 1
) -> tuple[list[Iterator[Batch]], int]:
    """The first `eval_rows` rows (all, if fewer), not shuffled, over the data parallel ranks.

    Returns (`copies` equal iterators, number of micro-batches of each). The number is the same on every rank,
    and a multiple of `multiple` (which an interleaved pipeline requires); places left over have a row with
    every token masked.
    """
    rows = dataset.first(eval_rows)
    count = -(-len(rows) // (shard.micro_batch * shard.dp))
    count = -(-count // multiple) * multiple

    def make(number: int) -> Batch:
        samples = shard.samples(0, number)
        return _batch(dataset, [rows[n] if n < len(rows) else None for n in samples], shard)

    return [map(make, range(count)) for _ in range(copies)], count


@dataclass(frozen=True)
class _TrainingBatches:
    """Micro-batch number m of this rank, as a torch map-style dataset, so that worker processes can make
    them."""

    dataset: BlendedDataset
    shard: BatchShard
    consumed: int
    seed: int
    shuffle: bool

    def __getitem__(self, number: int) -> Batch:
        samples = self.shard.samples(self.consumed, number)
        places = [self.dataset.locate(n, self.seed, self.shuffle) for n in samples]
        return _batch(self.dataset, places, self.shard)


@dataclass(frozen=True)
class _InWorker:
    """The batches of a worker process, which returns its errors: raised there, torch would add tracebacks."""

    training: _TrainingBatches

    def __getitem__(self, number: int) -> Batch | str:
        try:
            return self.training[number]
        except UserError as error:
            return str(error)


def _batch_or_error(made: Batch | str) -> Batch:
    if isinstance(made, str):
        raise UserError(made)
    return made


def _batch(dataset: BlendedDataset, places: Sequence[tuple[int, int] | None], shard: BatchShard) -> Batch:
    """This rank's share of the rows at `places` (dataset, row); None = any row, fully masked."""
    tokens = numpy.zeros((len(places), dataset.seq_length + 1), dtype=numpy.int64)  # [b, S + 1]
    targets = numpy.zeros(tokens.shape, dtype=numpy.float32)
    starts = [0]
    for i, chosen in enumerate(places):
        if chosen is None:
            continue
        which, row = chosen
        ids, counts = dataset.datasets[which][row]
        tokens[i] = ids
        targets[i] = 1.0 if counts is None else counts
        if shard.inside_documents:
            starts = dataset.datasets[which].document_starts(row)
            targets[i, starts] = 0.0  # nothing that it may attend to predicts a document's first token
    whole = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": targets[:, 1:],
    }  # shift, then shard
    whole = {name: torch.from_numpy(x) for name, x in whole.items()}
    starts = [start for start in starts if start < dataset.seq_length]
    if not shard.inside_documents:
        return share(whole, [0], shard)[0]
    batch, placement = share(whole, starts, shard)
    return batch | {"placement": placement}


def share(
    whole: Mapping[str, Tensor], starts: Sequence[int], shard: BatchShard
) -> tuple[Batch, Placement | None]:
    """Return this rank's tokens [b, s] of complete rows [b, S], and their placement where they have several
    documents (b = 1)."""
    length = next(iter(whole.values())).shape[1]
    placement = (
        None if len(starts) == 1 else place(starts, length, shard.cp // shard.ulysses, shard.ranks_per_node)
    )
    if placement is None:
        return {
            name: zigzag.shard(x, shard.cp_rank, shard.cp, dim=1).contiguous() for name, x in whole.items()
        }, None
    _ = placement.schedules  # made here, ahead of the model
    held = placement.positions(shard.cp_rank, shard.ulysses)
    return {name: x[:, held] for name, x in whole.items()}, placement


def _ignore_signals(worker: int) -> None:
    """A reader ends when its rank does. Slurm sends a request to stop to every process, and a rank without
    its reader could not save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _one_ahead(make: Callable[[int], Batch]) -> Iterator[Batch]:
    """Yield make(0), make(1), ...; the next one is made in a thread while this one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as thread:
        ahead = thread.submit(make, 0)
        for number in itertools.count(1):
            ready, ahead = ahead, thread.submit(make, number)
            yield ready.result()
