"""Rows to this rank's micro-batches: deterministic, resumable on any layout, each context parallel rank its
share.

S tokens of a sequence, s = S / CP of this rank, b sequences of a micro-batch. All that has to be saved is how
many samples were consumed. Sample number n is the same row whatever the layout: micro-batch m after
`consumed` takes the samples from consumed + m x (b x DP) on, data parallel rank r the b of them from r x b
on. So the samples of an optimizer step do not depend on the data parallel size, and the next step's follow.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_ultralong.config import Run
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.data.packed_rows import Rows
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime.launch import Ranks

Batch = dict[str, Tensor]
"""tokens, labels: int64 [b, s]; loss_mask: float32 [b, s], 1 where the label counts; with documents masked
also document_starts: int64 [documents], where in the whole row of S tokens (b = 1) documents start."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which sequences, and which tokens of them, this rank gets in a micro-batch."""

    micro_batch: int
    """Sequences per micro-batch and data parallel rank, b."""
    dp_rank: int = 0
    dp: int = 1
    cp_rank: int = 0
    cp: int = 1
    masked: bool = False
    """Attention stays inside documents (b = 1)."""
    seed: int = 0
    shuffle: bool = True
    """Shuffle training rows by `seed`; held-out rows are never shuffled."""

    @classmethod
    def of(cls, run: Run, ranks: Ranks) -> BatchPlan:
        return cls(
            micro_batch=run.train.micro_batch,
            dp_rank=ranks.dp_rank,
            dp=ranks.dp,
            cp_rank=ranks.cp_rank,
            cp=ranks.cp,
            masked=run.data.documents == "masked",
            seed=run.train.seed,
            shuffle=run.data.shuffle,
        )

    def samples(self, consumed: int, number: int) -> range:
        """Numbers of the samples in this rank's micro-batch `number` after `consumed`."""
        first = consumed + (number * self.dp + self.dp_rank) * self.micro_batch
        return range(first, first + self.micro_batch)


def batches(
    rows: Rows, plan: BatchPlan, *, consumed: int, global_batch: int, workers: int = 0
) -> Iterator[Batch]:
    """Yield this rank's micro-batches endlessly, from sample `consumed` on; the next one is prepared in
    advance.

    workers: processes that read; 0 = a thread. UserError where `global_batch` is not a multiple of
    micro_batch x dp.
    """
    if global_batch % (plan.micro_batch * plan.dp):
        raise UserError(
            f"train.global_batch={global_batch} is not a multiple of train.micro_batch={plan.micro_batch} "
            f"x {plan.dp} data parallel ranks"
        )
    make = _TrainingBatches(rows, plan, consumed)
    if workers:
        return iter(
            DataLoader(
                make,
                batch_size=None,
                sampler=itertools.count(),
                num_workers=workers,  # type: ignore[arg-type]
                multiprocessing_context="spawn",
                prefetch_factor=2,
                worker_init_fn=_outlive_sigterm,
            )
        )
    return _one_ahead(make.__getitem__)


def held_out(
    rows: Rows, plan: BatchPlan, eval_rows: int, *, copies: int = 1, multiple: int = 1
) -> tuple[list[Iterator[Batch]], int]:
    """Divide the first `eval_rows` rows (all, if fewer), never shuffled, over the data parallel ranks.

    Returns (`copies` equal iterators, number of micro-batches of each). The number is the same on every rank,
    and a multiple of `multiple` (an interleaved pipeline requires a multiple of its size); the remaining
    places hold a row with every token masked.
    """
    places = rows.first(eval_rows)
    count = -(-len(places) // (plan.micro_batch * plan.dp))
    count = -(-count // multiple) * multiple

    def make(number: int) -> Batch:
        return _batch(rows, plan, [places[n] if n < len(places) else None for n in plan.samples(0, number)])

    return [map(make, range(count)) for _ in range(copies)], count


@dataclass(frozen=True)
class _TrainingBatches:
    """Micro-batch number m of this rank; a torch map-style dataset, so that worker processes can make
    them."""

    rows: Rows
    plan: BatchPlan
    consumed: int

    def __getitem__(self, number: int) -> Batch:
        plan = self.plan
        samples = plan.samples(self.consumed, number)
        return _batch(self.rows, plan, [self.rows.locate(n, plan.seed, plan.shuffle) for n in samples])


def _batch(rows: Rows, plan: BatchPlan, places: Sequence[tuple[int, int] | None]) -> Batch:
    """This rank's share of the rows at `places` (set, row); None = any row, fully masked."""
    tokens = numpy.zeros((len(places), rows.seq_length + 1), dtype=numpy.int64)  # [b, S + 1]
    targets = numpy.zeros(tokens.shape, dtype=numpy.float32)
    starts = [0]
    for i, place in enumerate(places):
        if place is None:
            continue
        which, row = place
        ids, counts = rows.sets[which][row]
        tokens[i] = ids
        targets[i] = 1.0 if counts is None else counts
        if plan.masked:
            starts = rows.sets[which].starts(row)
            targets[i, starts] = 0.0  # nothing that it may look at foretells a document's first token
    whole = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": targets[:, 1:],
    }  # shifted first, then shared out
    batch = {
        name: zigzag.shard(torch.from_numpy(x), plan.cp_rank, plan.cp, dim=1).contiguous()
        for name, x in whole.items()
    }  # [b, s]
    if plan.masked:
        batch["document_starts"] = torch.tensor([start for start in starts if start < rows.seq_length])
    return batch


def _outlive_sigterm(worker: int) -> None:
    """A reader ends when its rank does. Slurm sends SIGTERM to every process, and a rank whose reader died
    could not save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _one_ahead(make: Callable[[int], Batch]) -> Iterator[Batch]:
    """make(0), make(1), ...; the next one is made in a thread while this one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as thread:
        ahead = thread.submit(make, 0)
        for number in itertools.count(1):
            ready, ahead = ahead, thread.submit(make, number)
            yield ready.result()
