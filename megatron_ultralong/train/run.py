"""A complete training run, assembled: ranks, weights, model, optimizer, data, loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Run, check_model_layout
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.data import loader, packed_rows
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.rope.clex import TrainedCLEX
from megatron_ultralong.rope.methods import report
from megatron_ultralong.runtime import agreement, launch
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train import loop, weights_source
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.log import Log, print_run
from megatron_ultralong.train.ode_training import OdeTraining
from megatron_ultralong.train.step import Batches, Trainer
from megatron_ultralong.train.weights_source import WeightsSource

PrepareEvaluation = Callable[[Run, Path | None, int], loop.Evaluation]
"""Called before the ranks start, with the resolved run, a folder with its tokenizer (None if it has none) and
the vocabulary size."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run; see tools/train.py."""

    data: list[str]
    """Packed rows to train on: a prefix, or weights and prefixes."""
    valid: list[str] | None = None
    """Packed rows for the held-out loss."""
    save: Path
    """The run directory."""
    load: Path | None = None
    """A checkpoint to start from."""
    load_hf: Path | None = None
    """A Hugging Face directory to start from."""
    tokenizer: Path | None = None
    """Folder whose tokenizer goes into the checkpoints."""


def train_run(run: Run, files: RunFiles, evaluations: Sequence[PrepareEvaluation] = ()) -> TrainingState:
    """Train `run` and return its last state. Every rank calls it.

    UserError for what a user can fix, before anything is built where that can be known.
    """
    run.parallel.data_parallel(launch.world_size())
    run, source = weights_source.find(run, files.save, files.load, files.load_hf, files.tokenizer)
    model = source.state.model
    check_model_layout(model, run.parallel)
    masked = run.data.documents == "masked"
    rows, held_out = (
        packed_rows.open_blend(names, run.train.seq_length, model.vocab_size, masked) if names else None
        for names in (files.data, files.valid)
    )
    assert rows is not None
    tokenizer = source.assets.tokenizer or source.assets.base
    prepared = [prepare(run, tokenizer, model.vocab_size) for prepare in evaluations]

    ranks = launch.start(run.runtime, run.parallel, run.train.seed, run.train.deterministic)
    run.micro_batches(ranks.dp)
    weights_source.check_same_checkpoint(source, files.save)
    gpu_bytes = (
        torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else None
    )
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    backend = kernels.choose(ranks.device, dtype, model.head_dim)
    run = plan.settle_offload(run, model, ranks.world, gpu_bytes, backend)
    print_run(run, ranks)
    state = weights_source.with_run(source.state, run, rows)
    log = Log(run, ranks, model, files.save, state.iteration, rows)
    try:
        trainer = _build(run, ranks, source)
        _print_start(log, trainer, source, state, rows)
        state = loop.train(
            trainer,
            state,
            _training_data(trainer, rows, held_out),
            loop.Checkpoints(files.save, source.assets, run.train.keep),
            log,
            prepared,
        )
        if ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(ranks.device)
            log.note(f"GPU memory at its peak: {peak} bytes ({peak / 2**30:.1f} GiB) allocated on rank 0")
    finally:
        log.close()
    # Not after a failure: leaving the groups would wait for ranks that may still be in a collective.
    launch.stop()
    return state


def _build(run: Run, ranks: Ranks, source: WeightsSource) -> Trainer:
    """Build the model, load its weights and build the optimizer."""
    from megatron_ultralong.model import llama

    chunks = llama.build(
        source.state.model,
        source.state.rope,
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
    elif run.train.load_optimizer:
        assert source.checkpoint is not None
        sharded.load(source.checkpoint, chunks, optimizer)
    ode, rotary = None, llama.unwrap(chunks[0]).rotary
    if isinstance(rotary.rope, TrainedCLEX):
        ode = OdeTraining(rotary, run.train, run.optim, ranks)
        with_optimizer = source.resume or (source.checkpoint if run.train.load_optimizer else None)
        if with_optimizer is not None:
            agreement.on_every_rank(lambda: ode.load_optimizer(with_optimizer))
    return Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer, ode=ode)


def _print_start(
    log: Log, trainer: Trainer, source: WeightsSource, state: TrainingState, rows: BlendedDataset
) -> None:
    """Log what the run is trained on and where it starts."""
    from megatron_ultralong.model import llama

    run = trainer.run
    log.note(f"data: {len(rows)} rows of {run.train.seq_length} + 1 tokens")
    rope = llama.unwrap(trainer.chunks[0]).rotary.rope
    log.note(f"RoPE: {report(rope, state.model.head_dim, run.train.seq_length)}")
    covered = rope.covered_length()
    if rope.depends_on_length() and covered is not None and covered > run.train.seq_length:
        log.note(f"RoPE at {covered} tokens: {report(rope, state.model.head_dim, covered)}")
    if source.resume is None:
        note = weights_source.theta_note(run, source)
    else:
        note = weights_source.data_note(source.state, state)
    if note is not None:
        log.note(note)
    if source.resume is not None:
        log.note(
            f"resuming from {source.resume}: iteration {state.iteration}, {state.consumed} sequences consumed"
        )


def _training_data(
    trainer: Trainer, rows: BlendedDataset, held_out: BlendedDataset | None
) -> loop.TrainingData:
    run, copies = trainer.run, len(trainer.chunks)
    ranks = trainer.ranks
    shard = loader.BatchShard(
        micro_batch=run.train.micro_batch,
        dp_rank=ranks.dp_rank,
        dp=ranks.dp,
        cp_rank=ranks.cp_rank,
        cp=ranks.cp,
        document_starts=run.data.documents == "masked",
    )

    def training(consumed: int) -> Batches:
        return [
            loader.batches(
                rows,
                shard,
                consumed=consumed,
                seed=run.train.seed,
                shuffle=run.data.shuffle,
                workers=run.data.workers,
            )
            for _ in range(copies)
        ]

    def validation() -> tuple[Batches, int]:
        assert held_out is not None
        multiple = run.parallel.pp if run.parallel.vpp > 1 else 1
        return loader.validation_batches(
            held_out, run.train.eval_rows, shard, copies=copies, multiple=multiple
        )

    return loop.TrainingData(training=training, held_out=None if held_out is None else validation)
