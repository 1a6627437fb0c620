"""How well packed rows suit context parallelism with attention inside documents: what `ultralong prepare`
says of the rows that it has written."""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_ultralong import shapes
from megatron_ultralong.config import Data, Memory, Parallel, Run, Train
from megatron_ultralong.data.packed_rows import PackedDataset
from megatron_ultralong.planning import documents, time
from megatron_ultralong.planning.hardware import GPUS, Machine

MODEL = shapes.SHAPES["meta-llama/Llama-3.1-8B-Instruct"]
"""Whose attention is estimated."""
CP = (8, 32, 64)
_ROWS = 1000
"""Rows whose attention is compared."""
_FEWEST = 1024
"""Tokens of a rank, below which rows are not divided further."""


def machine(lengths: documents.DocumentLengths, cp: int) -> Machine:
    """H100s with `cp` ranks, for such rows."""
    return Machine(gpu=GPUS["h100"], gpus=max(8, cp), documents=lengths)


def run_of(seq_length: int, parallel: Parallel) -> Run:
    """A run of such rows."""
    return Run(
        name="rows",
        model=MODEL,
        parallel=parallel,
        memory=Memory(recompute="all_but_attention", offload="off"),
        data=Data(documents="masked"),
        train=Train(seq_length=seq_length, global_batch=1, iterations=1, lr=1e-5),
    )


def lines(prefix: Path, seq_length: int) -> list[str]:
    """Say how much attention the rows have, how different they are, and what CP ranks make of them."""
    rows = PackedDataset(str(prefix), seq_length)
    attention = []
    for row in range(min(len(rows), _ROWS)):
        starts = [start for start in rows.document_starts(row) if start < seq_length]
        attention.append(sum((b - a) ** 2 for a, b in itertools.pairwise([*starts, seq_length])))
    mean, lengths = sum(attention) / len(attention), documents.read(prefix)
    found = [
        f"attention inside documents (data.documents=masked): as much as of equal ones of {mean / seq_length:,.0f} tokens; "
        f"the row with most has {max(attention) / mean:.2f} times the mean"
    ]
    for cp in CP:
        if seq_length % (2 * cp) == 0 and seq_length // cp >= _FEWEST:
            work = time.ring_work(run_of(seq_length, Parallel(cp=cp)), lengths)
            share = time.share_of_ideal(run_of(seq_length, Parallel(cp=cp)), MODEL, machine(lengths, cp))
            found.append(
                f"  on CP {cp} ranks: the one with most has {work.imbalance:.3f} of the mean work and sends keys of "
                f"{work.most_sent:.3f} tokens per token that it holds; an estimated {share:.2f} of the speed of equal work with "
                "nothing to send (Llama-3.1-8B's attention, H100s)"
            )
    return found
