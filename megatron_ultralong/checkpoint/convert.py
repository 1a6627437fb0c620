"""Conversion between Hugging Face directories and sharded checkpoints, and their comparison; on any number of
ranks, from any TP x PP to any other.

Conversion runs on the CPU, tensor by tensor (streaming.py): no rank holds more than a few of them, and
Megatron's dist_checkpointing does the resharding. Export sends one Megatron parameter at a time to rank 0,
which writes it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ultralong.checkpoint import (
    adapters,
    rope_network,
    run_directory,
    saving,
    streaming,
    training_state,
)
from megatron_ultralong.checkpoint.exported_weights import MergedWeights, StoredWeights, build
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import dtypes, export_files
from megatron_ultralong.checkpoint.hf.assets import AssetFolders, copy_assets, write_assets
from megatron_ultralong.checkpoint.hf.reader import HFReader
from megatron_ultralong.checkpoint.hf.writer import SHARD_BYTES, HFWriter
from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.max_position import note as max_position_note
from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Parallel, Runtime, check_model_layout
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.progress import progress_bar
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.client_notes import client_notes
from megatron_ultralong.rope.methods import same_maths
from megatron_ultralong.runtime import agreement, launch
from megatron_ultralong.runtime.launch import Ranks


def layout(model: Model, world: int, tp: int | None = None, pp: int | None = None) -> Parallel:
    """Choose TP x PP of a conversion on `world` ranks; sizes left open are chosen, pipeline first. UserError
    where nothing fits."""
    sizes = [(t, world // t) for t in range(1, world + 1) if world % t == 0]
    options = [Parallel(tp=t, pp=p) for t, p in sizes if tp in (None, t) and pp in (None, p)]
    if not options:
        given = " x ".join(f"--{name} {size}" for name, size in (("tp", tp), ("pp", pp)) if size is not None)
        raise UserError(
            f"{given} does not match the {world} ranks started; change it, or torchrun's --nproc-per-node"
        )
    failures = []
    for parallel in options:
        try:
            check_model_layout(model, parallel)
            return parallel
        except UserError as error:
            failures.append(f"tp={parallel.tp} pp={parallel.pp}: {error}")
    raise UserError(
        f"this model cannot be split over {world} ranks ({failures[0]}); start another number of ranks"
    )


@contextmanager
def started(model: Model, tp: int | None, pp: int | None) -> Iterator[tuple[Ranks, Parallel]]:
    """Join the other ranks of torchrun, if any, as a rank of a conversion of `model`; leave them at the
    end."""
    parallel = layout(model, launch.world_size(), tp, pp)
    yield launch.start(Runtime(device="cpu"), parallel), parallel
    launch.stop()  # not after a failure: other ranks may still be in a collective


def import_hf(
    folder: Path, out: Path, ranks: Ranks, parallel: Parallel, dtype: torch.dtype | None = None
) -> Path:
    """Write the HF directory `folder` as iteration 0 of the run directory `out` and return the checkpoint;
    every rank calls it.

    dtype: None = each tensor's own, as stored (tensors of different dtypes that form one of Megatron's get
    the dtype that represents all of them exactly). UserError before anything is written where the directory
    is not a complete model or `out` is in use.
    """
    base = hf_config.read_config(folder)
    reader = HFReader(folder, base.model)
    lock = agreement.on_every_rank(lambda: _make_run_directory(out) if ranks.is_main else None)
    try:
        chunk = build(base.model, base.rope, ranks, parallel)
        name = hf_config.base_name(folder, base.raw)
        state = TrainingState(model=base.model, rope=base.rope, base=name)
        if ranks.is_main:
            print_notes(reader.notes())
        with weights_of(reader, chunk, ranks, dtype) as values:
            return saving.save(out, state, [chunk], None, AssetFolders(base=folder), values=values)
    except BaseException:
        if ranks.is_main:
            saving.remove_interrupted(out, "import")
            with suppress(OSError):
                out.rmdir()  # only if it is empty
        raise
    finally:
        reader.close()
        if lock is not None:
            os.close(lock)


def export_hf(
    checkpoint: Path,
    out: Path,
    ranks: Ranks,
    parallel: Parallel,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    clex_scale: float | None = None,
    base_model: Path | None = None,
) -> tuple[Path, list[str]]:
    """Write a checkpoint (run directory or one iteration) as the HF directory `out` and return it, and what
    its user should know, in lines; every rank calls it.

    dtype: None = each tensor's own, as stored. clex_scale: scale at which CLEX's frequencies are frozen;
    None = the largest. base_model: HF directory of the model with which a checkpoint of adapters is merged.
    UserError, on every rank, where `out` is in use or cannot be written, config.json cannot express the RoPE,
    or the adapters were trained with another model; `out` then does not exist.
    """
    checkpoint = run_directory.resolve_verified(checkpoint)
    state = bridge.read_state(checkpoint)
    if state.has_adapters_only() and base_model is None:
        raise UserError(
            f"{checkpoint} contains adapters only: give the model that they belong to by --base DIR, or export them "
            "alone by --adapter"
        )
    if base_model is not None and not state.has_adapters_only():
        raise UserError(f"--base is for a checkpoint of adapters; {checkpoint} contains the whole model")
    rope = rope_network.exported(checkpoint, state.rope, state.model.head_dim, clex_scale)
    state = replace(state, rope=rope)
    model, assets = state.model, bridge.assets(checkpoint)
    weights: StoredWeights | MergedWeights = (
        StoredWeights(checkpoint, model, rope, ranks, parallel)
        if base_model is None
        else MergedWeights(checkpoint, state, base_model, ranks, parallel)
    )
    base = export_files.base_config(assets, model.family)
    shapes = weight_mapping.hf_shapes(model)
    stored = {
        hf: dtype or weights.dtypes[name]
        for name in weight_mapping.megatron_names(model)
        for hf in weight_mapping.hf_names(name, model)
    }
    main = dtypes.main({name: prod(shape) for name, shape in shapes.items()}, stored)
    config = hf_config.export_config(model, rope, max_position(state, base), main, base)
    length = config["max_position_embeddings"]
    writer = agreement.on_every_rank(
        lambda: HFWriter(out, shapes, stored, shard_bytes) if ranks.is_main else None
    )

    def write(name: str, shards: list[Tensor]) -> None:
        if writer is not None:
            for hf_name, tensor in weight_mapping.merge(name, shards, model).items():
                writer.add(hf_name, weights.final(hf_name, tensor))

    def finish() -> None:
        if writer is not None:
            texts = export_files.texts(writer.out_dir, assets, state, length, main)
            with atomic_files.under_final_name(writer.folder, writer.out_dir):
                write_assets(writer.folder, assets if assets.is_dir() else None, config, texts)
            writer.finish()

    try:
        if writer is not None:
            print_notes(writer.notes)
        names = weight_mapping.megatron_names(model)
        with progress_bar("writing weights", len(names), "tensor", hidden=not ranks.is_main) as bar:
            for name, shards in weights:
                agreement.on_every_rank(functools.partial(write, name, shards))
                bar.update()
        agreement.on_every_rank(finish)
    finally:
        if writer is not None:
            writer.abandon()
    return out, [*max_position_note(length, base), *client_notes(rope, model.family)]


def export_adapter(checkpoint: Path, out: Path, base_model: str | None = None) -> tuple[Path, list[str]]:
    """Write a checkpoint of adapters as the PEFT directory `out` and return it, and what its user should
    know, in lines; every rank calls it.

    base_model: path or name of the model that PEFT loads with them; None = the name of the model that they
    were trained with. UserError, on every rank, where the checkpoint has none, or `out` is in use or cannot
    be written; `out` then does not exist.
    """
    checkpoint = run_directory.resolve_verified(checkpoint)
    state = training_state.read(checkpoint)
    if not state.has_adapters_only():
        raise UserError(f"--adapter is for a run with lora.rank; {checkpoint} contains the whole model")
    trained = adapters.read(checkpoint, state)
    assets = checkpoint / "hf"
    base = export_files.base_config(assets, state.model.family)
    config = hf_config.export_config(state.model, state.rope, max_position(state, base), torch.bfloat16, base)
    changed = not (assets / "config.json").is_file() or hf_config.read_config(assets).rope != state.rope
    name = base_model or state.base

    def write() -> None:
        with atomic_files.whole_folder(out) as folder:
            copy_assets(assets, folder, others=False)
            adapters.write_peft(folder, trained, state, config if changed else None, name)

    agreement.on_main_rank(write)
    notes = []
    if changed:
        notes.append(
            f"the adapters were trained with another RoPE than the model's: load {name} with the config of "
            f"{out / 'base_config.json'}"
        )
    return out, notes


def verify(folder: Path, checkpoint: Path, ranks: Ranks, parallel: Parallel) -> list[str]:
    """Compare every weight of an HF directory and a checkpoint bit by bit; return one line per difference,
    the same list on every rank.

    Where a tensor is stored in different dtypes, both are compared in the narrower one. UserError where they
    cannot be compared.
    """
    checkpoint = run_directory.resolve_verified(checkpoint)
    hf, state = hf_config.read_config(folder), adapters.read_model_state(checkpoint)
    names = [f.name for f in fields(Model) if f.name != "init_std"]
    shapes = {name: (getattr(hf.model, name), getattr(state.model, name)) for name in names}
    different = [
        f"config.json: {name} is {a}, in the checkpoint {b}" for name, (a, b) in shapes.items() if a != b
    ]
    if different:
        return different
    scale = rope_network.compared_scale(hf.rope, state.rope)
    rope = rope_network.exported(checkpoint, state.rope, hf.model.head_dim, scale)
    if not same_maths(hf.rope, rope, hf.model.head_dim):
        different.append(f"config.json: RoPE is {hf.rope.describe()}; in the checkpoint {rope.describe()}")
    reader = HFReader(folder, hf.model)
    weights = streaming.StoredParameters(checkpoint, build(hf.model, hf.rope, ranks, parallel), hf.model)
    mine: dict[str, tuple[int, float]] = {}  # HF tensor -> elements that differ, largest difference
    their_dtypes = reader.dtypes()
    with progress_bar("comparing", len(their_dtypes), "tensor", hidden=not ranks.is_main) as bar:
        for name, ours in weights:
            bar.update()
            if ours is None or (ranks.tp_rank and weight_mapping.is_replicated(name, hf.model)):
                continue  # all tensor parallel ranks hold the same values: counted once
            narrow = dtypes.narrower(ours.dtype, their_dtypes[name])
            theirs, ours = reader.shard(name, ranks.tp_rank, ranks.tp, narrow), ours.to(narrow)
            for piece in weight_mapping.pieces(name, hf.model, ranks.tp_rank, ranks.tp):
                count, largest = _differences(ours[piece.target], theirs[piece.target])
                if count:
                    total, maximum = mine.get(piece.hf, (0, 0.0))
                    mine[piece.hf] = (total + count, max(maximum, largest))
    every_rank = agreement.gather(mine)
    for hf_name in weight_mapping.hf_shapes(hf.model):
        counts = [differences[hf_name] for differences in every_rank if hf_name in differences]
        if counts:
            different.append(
                f"{hf_name}: {sum(n for n, _ in counts):,} differ, by up to {max(d for _, d in counts):.3g}"
            )
    return different


@contextmanager
def weights_of(
    reader: HFReader,
    chunk: torch.nn.Module,
    ranks: Ranks,
    dtype: torch.dtype | None,
    vocab_rows: int | None = None,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Move `chunk` to the meta device and yield what returns the values of a view of its parameters, read
    from an HF directory when they are asked for; with a progress bar.

    dtype: as in `import_hf`. vocab_rows: rows of the chunk's vocabulary over all ranks, where it is padded
    further than `reader.model`'s."""
    stored = {name: dtype or its for name, its in reader.dtypes().items()}
    # The last stage has another copy of a tied embedding.
    stored.setdefault(weight_mapping.OUTPUT, stored[weight_mapping.EMBEDDING])
    streaming.drop_values(chunk, stored)
    source = streaming.Source(
        chunk, lambda name: reader.shard(name, ranks.tp_rank, ranks.tp, stored[name], vocab_rows)
    )
    size = sum(parameter.nbytes for parameter in chunk.parameters())
    with progress_bar("converting weights", size, "B", hidden=not ranks.is_main) as bar:

        def values(view: Tensor) -> Tensor:
            bar.update(view.nbytes)
            return source.values(view)

        yield values


def _differences(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Number of elements whose bits differ, and the largest difference."""
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    unequal = ours.view(bits) != theirs.view(bits)
    if not unequal.any():
        return 0, 0.0
    return int(unequal.sum()), float((ours[unequal].double() - theirs[unequal].double()).abs().max())


def print_notes(lines: list[str]) -> None:
    for line in lines:
        print(f"note: {line}", file=sys.stderr, flush=True)


def _make_run_directory(out: Path) -> int:
    """Create `out`, remove what an interrupted import has left in it, and return its lock."""
    if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise UserError(
            f"{out} already exists and is not an empty directory; choose another --output or remove it"
        )
    atomic_files.check_writable(out, f"--output {out}")
    try:
        lock = atomic_files.lock_folder(out)
    except BlockingIOError:
        raise UserError(f"--output {out} is being written by another import; choose another") from None
    except OSError as error:
        raise atomic_files.cannot_write(f"--output {out}", error) from None
    print_notes(saving.remove_interrupted(out, "import"))
    return lock
