"""A complete training run, assembled: ranks, weights, model, optimizer, data, loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import run_directory, sharded
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Run, check_model_layout
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.data import loader, packed_rows
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import kernel_choices
from megatron_ultralong.planning import memory as plan
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.clex import TrainedCLEX
from megatron_ultralong.rope.methods import report
from megatron_ultralong.runtime import agreement, launch
from megatron_ultralong.runtime.launch import Ranks
from megatron_ultralong.train import loop, resume_changes, run_lock, weights_source
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train.checkpoints import Checkpoints
from megatron_ultralong.train.log import Log, print_run
from megatron_ultralong.train.ode_training import OdeTraining
from megatron_ultralong.train.step import Batches, Trainer
from megatron_ultralong.train.stopwatch import Stopwatch
from megatron_ultralong.train.weights_source import WeightsSource

PrepareEvaluation = Callable[[Run, Path | None, int], loop.Evaluation]
"""Called before the ranks start, with the resolved run, a folder with its tokenizer (None if it has none) and
the vocabulary size."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run; see `ultralong train`."""

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
    asked = run
    run, source = weights_source.find(asked, files.save, files.load, files.load_hf, files.tokenizer)
    if source.resume is not None:
        resume_changes.check(source.state, run)
    model = source.state.model
    check_model_layout(model, run.parallel)
    masked = run.data.documents == "masked"
    tokenizer = source.assets.tokenizer or source.assets.base
    made_with = None if run.data.allow_other_tokenizer else tokenizer
    block_size = run.train.global_batch if run.data.mix == "iterations" else 1
    rows, held_out = (
        packed_rows.open_blend(names, run.train.seq_length, model.vocab_size, masked, made_with, block_size)
        if names
        else None
        for names in (files.data, files.valid)
    )
    assert rows is not None
    prepared = [prepare(run, tokenizer, model.vocab_size) for prepare in evaluations]

    ranks = launch.start(run.runtime, run.parallel, run.train.seed, run.train.deterministic)
    run.micro_batches(ranks.dp)
    with contextlib.ExitStack() as until_end:
        lock_note = agreement.on_main_rank(lambda: until_end.enter_context(run_lock.locked(files.save)))
        weights_source.check_same_checkpoint(source, files.save)
        run, source = weights_source.find(
            asked, files.save, files.load, files.load_hf, files.tokenizer, verified=True
        )
        agreement.on_main_rank(lambda: run_directory.set_aside(path for path, _ in source.damaged))
        chosen = kernel_choices.apply(
            ranks.device,
            model,
            run.train.precision,
            run.runtime.attention_backend,
            masked,
            adapters=run.lora.rank > 0,
        )
        run = _settle_offload(run, ranks, model)
        print_run(run, ranks, chosen)
        state = weights_source.with_run(source.state, run, rows)
        log = until_end.enter_context(Log(run, ranks, model, files.save, state.iteration, rows))
        ranks.heartbeat.phase("loading the weights")
        trainer, frozen = _build(run, ranks, source)
        state = replace(state, frozen_weights=frozen)
        if lock_note is not None:
            log.note(lock_note)
        _print_start(log, trainer, source, state, rows, files)
        log.start(state, _rope(trainer), chosen)
        checkpoints = Checkpoints(files.save, source.assets, run.train, ranks.heartbeat)
        ranks.heartbeat.prepare_report(files.save / "hang", lambda: str(checkpoints))
        state = loop.train(
            trainer,
            state,
            _training_data(trainer, rows, held_out),
            checkpoints,
            log,
            prepared,
        )
        if ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(ranks.device)
            log.note(f"GPU memory at its peak: {peak} bytes ({peak / 2**30:.1f} GiB) allocated on rank 0")
    # Not after a failure: leaving the groups would wait for ranks that may still be in a collective.
    launch.stop()
    return state


def ranks_per_node(run: Run) -> int:
    """Adjacent ranks of the ring that are in one node, the same on all ranks, which thus place rows alike.
    Every rank calls it."""
    return run.parallel.ring_ranks_per_node(min(agreement.gather(launch.local_world_size())))


@contextlib.contextmanager
def model_alone(run: Run, load: Path | None, load_hf: Path | None) -> Iterator[Trainer]:
    """The model of `run` on this rank of its layout, without data and optimizer; every rank calls it.
    UserError for what a user can fix."""
    run.parallel.data_parallel(launch.world_size())
    nowhere = Path(os.devnull)
    run, source = weights_source.find(run, nowhere, load, load_hf)
    check_model_layout(source.state.model, run.parallel)
    ranks = launch.start(run.runtime, run.parallel, run.train.seed, run.train.deterministic)
    kernel_choices.apply(
        ranks.device,
        source.state.model,
        run.train.precision,
        run.runtime.attention_backend,
        run.data.documents == "masked",
    )
    run = _settle_offload(run, ranks, source.state.model)
    chunks = _model(run, ranks, source)
    yield Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=None)
    launch.stop()  # not after a failure: other ranks may still be in a collective


def _settle_offload(run: Run, ranks: Ranks, model: Model) -> Run:
    """The run with `memory.offload=auto` replaced by what this device needs."""
    gpu_bytes = (
        torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else None
    )
    backend = kernels.choose(ranks.device, kernel_choices.DTYPES[run.train.precision], model.head_dim)
    return plan.settle_offload(run, model, ranks.world, gpu_bytes, backend)


def _model(run: Run, ranks: Ranks, source: WeightsSource) -> list[torch.nn.Module]:
    """This rank's model chunks with their weights."""
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
        lora=run.lora,
    )
    weights_source.load_weights(chunks, run, source, ranks)
    return chunks


def _build(run: Run, ranks: Ranks, source: WeightsSource) -> tuple[Trainer, str]:
    """Build the model, load its weights and build the optimizer; return the sum of the weights that are not
    trained too, "" without LoRA."""
    chunks = _model(run, ranks, source)
    frozen = weights_source.check_frozen_weights(chunks, source) if run.lora.rank else ""
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, run.train, ranks)
    if source.resume is not None:
        sharded.load(source.resume, chunks, optimizer)
    elif run.train.load_optimizer:
        assert source.checkpoint is not None
        sharded.load(source.checkpoint, chunks, optimizer)
    from megatron_ultralong.model import llama

    ode, rotary = None, llama.unwrap(chunks[0]).rotary
    if isinstance(rotary.rope, TrainedCLEX):
        ode = OdeTraining(rotary, run.train, run.optim, ranks)
        with_optimizer = source.resume or (source.checkpoint if run.train.load_optimizer else None)
        if with_optimizer is not None:
            agreement.on_every_rank(lambda: ode.load_optimizer(with_optimizer))
    watch = Stopwatch(ranks.device)
    watch.attach(optimizer)
    trainer = Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer, ode=ode, watch=watch)
    return trainer, frozen


def _rope(trainer: Trainer) -> Rope:
    """What rotates queries and keys, with trained weights where it has them."""
    from megatron_ultralong.model import llama

    return llama.unwrap(trainer.chunks[0]).rotary.rope


def _print_start(
    log: Log,
    trainer: Trainer,
    source: WeightsSource,
    state: TrainingState,
    rows: BlendedDataset,
    files: RunFiles,
) -> None:
    """Log what the run is trained on and where it starts."""
    run, rope = trainer.run, _rope(trainer)
    log.note(f"data: {len(rows)} rows of {run.train.seq_length} + 1 tokens")
    log.note(f"RoPE: {report(rope, state.model.head_dim, run.train.seq_length)}")
    covered = rope.covered_length()
    if rope.depends_on_length() and covered is not None and covered > run.train.seq_length:
        log.note(f"RoPE at {covered} tokens: {report(rope, state.model.head_dim, covered)}")
    if source.resume is None:
        notes = [weights_source.theta_note(run, source)]
    else:
        notes = [
            weights_source.data_note(source.state, state),
            *resume_changes.notes(source.state, run, files.load, files.load_hf),
        ]
    if log.ranks.is_main:
        notes.append(_tokenizer_note(source.assets.tokenizer or source.assets.base))
    for note in notes:
        if note is not None:
            log.note(note)
    for path, fault in source.damaged:
        lost = int(path.name[5:])
        log.note(
            f"{path} is damaged ({fault}) and was renamed; iterations {state.iteration + 1} to {lost} are trained again"
        )
    if source.resume is not None:
        log.note(
            f"resuming from {source.resume}: iteration {state.iteration}, {state.consumed} sequences consumed"
        )


def _tokenizer_note(folder: Path | None) -> str | None:
    """A line for a model whose tokenizer the export cannot contain."""
    if folder is None:
        return None
    try:
        load_tokenizer(folder)
    except UserError as error:
        return f"warning: {error}; checkpoints and exports of this run will have no usable tokenizer"
    return None


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
        ulysses=run.parallel.ulysses,
        ranks_per_node=ranks_per_node(run),
        inside_documents=run.data.documents == "masked",
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
