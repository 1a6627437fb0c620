"""A whole training run, assembled: ranks, weights, model, optimizer, data, loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.config import Run, check_model_layout
from megatron_ultralong.data import loader, packed_rows
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.runtime import launch
from megatron_ultralong.train import loop, weights_source
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.log import Log, print_run

Prepare = Callable[[Run, Path | None, int], loop.Evaluation]


def train_run(
    run: Run,
    *,
    data: list[str],
    valid: list[str] | None,
    save: Path,
    load: Path | None = None,
    load_hf: Path | None = None,
    tokenizer: Path | None = None,
    evaluations: Sequence[Prepare] = (),
) -> sharded.Progress:
    """Train `run` on the packed rows `data` into the run directory `save`. Every rank calls it; see
    tools/train.py for the arguments.

    evaluations: called first with the settled run, a directory with its tokenizer (None where there is none)
    and the vocabulary's size; what they give is called as `loop.Evaluation` says.

    Raises UserError for what a user can mend, before anything is built where that can be known.
    """
    run.parallel.data_parallel(launch.world_size())
    run, source = weights_source.find(run, save, load, load_hf, tokenizer)
    check_model_layout(source.progress.model, run.parallel)
    masked = run.data.documents == "masked"
    rows = packed_rows.open_blend(data, run.train.seq_length, source.progress.model.vocab_size, masked)
    held_out = (
        packed_rows.open_blend(valid, run.train.seq_length, source.progress.model.vocab_size, masked)
        if valid
        else None
    )

    prepared = [
        prepare(run, source.tokenizer or source.assets, source.progress.model.vocab_size)
        for prepare in evaluations
    ]

    ranks = launch.start(run.runtime, run.parallel, run.train.seed, run.train.deterministic)
    run.micro_batches(ranks.dp)
    weights_source.check_same(source, save)
    gpu_bytes = (
        torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else None
    )
    run = plan.settle_offload(run, source.progress.model, ranks.world, gpu_bytes)
    print_run(run, ranks)
    progress = _train(run, ranks, source, rows, held_out, save, prepared)
    launch.stop()  # not after a failure: other ranks may still be in a collective, and leaving the groups would wait for them
    return progress


def _train(
    run: Run,
    ranks: launch.Ranks,
    source: weights_source.Source,
    rows: packed_rows.BlendedDataset,
    held_out: packed_rows.BlendedDataset | None,
    save: Path,
    evaluations: Sequence[loop.Evaluation],
) -> sharded.Progress:
    from megatron_ultralong.model import llama

    progress = weights_source.with_run(source.progress, run, rows)
    log = Log(run, ranks, progress.model, save, progress.iteration, rows)
    chunks = llama.build(
        source.progress.model,
        source.progress.rope,
        ranks,
        run.parallel,
        run.memory,
        run.train.precision,
        deterministic=run.train.deterministic,
        positions_by_document=run.data.positions == "document",
    )
    weights_source.load_weights(chunks, run, source, ranks)
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, run.train, ranks)
    if source.resume is not None:
        sharded.load(source.resume, chunks, optimizer)
    shard = loader.BatchShard(
        micro_batch=run.train.micro_batch,
        dp_rank=ranks.dp_rank,
        dp=ranks.dp,
        cp_rank=ranks.cp_rank,
        cp=ranks.cp,
        document_starts=run.data.documents == "masked",
    )

    try:
        log.note(f"data: {len(rows)} rows of {run.train.seq_length} + 1 tokens")
        if source.resume is not None:
            if (note := weights_source.data_note(source.progress, progress)) is not None:
                log.note(note)
            log.note(
                f"going on from {source.resume}: iteration {progress.iteration}, {progress.consumed} sequences done"
            )
        elif (note := weights_source.theta_note(run, source)) is not None:
            log.note(note)
        return loop.train(
            run,
            ranks,
            chunks,
            optimizer,
            progress,
            data=lambda consumed: [
                loader.batches(
                    rows,
                    shard,
                    consumed=consumed,
                    seed=run.train.seed,
                    shuffle=run.data.shuffle,
                    workers=run.data.workers,
                )
                for _ in chunks
            ],
            valid=None
            if held_out is None
            else lambda: loader.validation_batches(
                held_out,
                run.train.eval_rows,
                shard,
                copies=len(chunks),
                multiple=run.parallel.pp if run.parallel.vpp > 1 else 1,
            ),
            save_dir=save,
            assets=source.assets,
            tokenizer=source.tokenizer,
            log=log,
            evaluations=evaluations,
        )
    finally:
        log.close()
