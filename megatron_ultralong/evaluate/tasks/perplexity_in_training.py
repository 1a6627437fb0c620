"""Perplexity by position of the model in training, on all its ranks: an evaluation that the training loop
calls.

Each rank sums the losses of its own tokens by their positions in the row; the sums are added over context,
data and pipeline parallel ranks. No rank sees a complete row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_ultralong.config import Run
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.data import loader, packed_rows
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.results import short_count
from megatron_ultralong.evaluate.scorers import loss_by_position
from megatron_ultralong.evaluate.tasks import perplexity
from megatron_ultralong.runtime.launch import Ranks

Losses = Callable[
    [list[Iterator[loader.Batch]], int, Callable[[torch.Tensor, loader.Batch], torch.Tensor]],
    list[torch.Tensor],
]
"""Provided by the loop: runs micro-batches through the model, and returns the result of a function of each
one's losses [b, s] on the last stage."""


class TextRows:
    """The beginnings of documents in the form of packed rows, [S + 1] tokens each."""

    def __init__(self, names: list[str], tokenizer: Any, seq_length: int, most: int) -> None:
        """UserError where no document is long enough."""
        self.seq_length = seq_length
        self.datasets = [
            [
                (row[0][: seq_length + 1], None)
                for row in _first_long(perplexity.read_rows(names, tokenizer), seq_length, most)
            ]
        ]
        if not self.datasets[0]:
            raise UserError(
                f"--perplexity: no document is longer than train.seq_length={seq_length} tokens; give longer ones, or packed rows"
            )

    def first(self, count: int) -> list[tuple[int, int]]:
        return [(0, i) for i in range(min(count, len(self.datasets[0])))]


def during_training(
    names: list[str], save: Path
) -> Callable[[Run, Path | None, int], Callable[[int, Ranks, Losses], dict[str, float]]]:
    """Make the evaluation that `train_run` takes. names: packed prefixes of the run's length, or files of
    documents, which require a tokenizer.

    The data is opened before the model is built, so that mistakes in it are reported early. Results: scalars
    for the log, and one line per evaluation in SAVE/perplexity.jsonl (a resumed run may write an iteration
    twice; the last line is valid).
    """

    def prepare(
        run: Run, assets: Path | None, vocab_size: int
    ) -> Callable[[int, Ranks, Losses], dict[str, float]]:
        rows = _open(names, run, assets, vocab_size)
        length = run.train.seq_length

        def evaluate(iteration: int, ranks: Ranks, losses: Losses) -> dict[str, float]:
            positions = zigzag.positions(length, ranks.cp_rank, ranks.cp, ranks.device)
            shard = loader.BatchShard(
                micro_batch=run.train.micro_batch,
                dp_rank=ranks.dp_rank,
                dp=ranks.dp,
                cp_rank=ranks.cp_rank,
                cp=ranks.cp,
            )
            batches, count = loader.validation_batches(
                rows,
                run.train.eval_rows,
                shard,
                copies=run.parallel.vpp,
                multiple=run.parallel.pp if run.parallel.vpp > 1 else 1,
            )
            parts = losses(
                batches,
                count,
                lambda nll, batch: loss_by_position.sums(
                    nll, batch["loss_mask"].to(nll.device), positions, length
                ),
            )
            total = loss_by_position.zeros(length, ranks.device)
            for part in parts:
                total += part
            torch.distributed.all_reduce(total, group=ranks.groups.dp_cp)
            torch.distributed.all_reduce(total, group=ranks.groups.pp)  # zero except on the last stage
            summary = loss_by_position.summary(total.cpu(), length)
            if ranks.is_main:
                with (save / "perplexity.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"iteration": iteration, "length": length, **summary}) + "\n")
            named = {"all": summary} | {
                f"{short_count(bucket['from'])}-{short_count(bucket['to'])}": bucket
                for bucket in summary["by_position"]
            }
            return {
                f"perplexity/{name}": bucket["perplexity"]
                for name, bucket in named.items()
                if bucket["perplexity"] is not None
            }

        return evaluate

    return prepare


def _open(names: list[str], run: Run, assets: Path | None, vocab_size: int) -> Any:
    packed = [perplexity.is_packed(name) for name in names]
    if all(packed):
        sets = [packed_rows.PackedDataset(name, run.train.seq_length) for name in names]
        for one in sets:
            one.check_vocabulary(vocab_size)
        return packed_rows.BlendedDataset(sets, [Fraction(1)] * len(sets))
    if any(packed):
        raise UserError("--perplexity: give packed rows or files of documents, not both")
    if assets is None:
        raise UserError("--perplexity with documents needs a tokenizer: give --tokenizer DIR, or packed rows")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(assets, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--perplexity: the tokenizer in {assets} cannot be read: {str(error).splitlines()[0]}"
        ) from None
    rows = TextRows(names, tokenizer, run.train.seq_length, run.train.eval_rows)
    largest = max(int(ids.max()) for ids, _ in rows.datasets[0])
    if largest >= vocab_size:
        raise UserError(
            f"--perplexity: the tokenizer in {assets} produces token {largest}, but the model's vocabulary has {vocab_size}"
        )
    return rows


def _first_long(
    rows: Iterator[perplexity.TokenRow], seq_length: int, most: int
) -> Iterator[perplexity.TokenRow]:
    count = 0
    for row in rows:
        if count == most:
            return
        if len(row[0]) > seq_length:
            count += 1
            yield numpy.asarray(row[0]), None
