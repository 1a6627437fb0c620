"""Where a run's weights come from: its own newest checkpoint, another checkpoint, a Hugging Face model read
in place, or a seed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from megatron_ultralong import config
from megatron_ultralong.checkpoint import adapters as stored_adapters
from megatron_ultralong.checkpoint import run_directory, sharded, training_state
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf.assets import AssetFolders
from megatron_ultralong.checkpoint.hf.reader import load_parameters
from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Run
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import adapters, init, llama
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.clex import TrainedCLEX
from megatron_ultralong.rope.methods import Unscaled, differences, follow_run, resolve
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.launch import Ranks


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """What a run starts from, before any weight is read.

    At most one of resume, checkpoint and hf is set; with LoRA, resume and one of the others, which then is
    the model that its adapters belong to.
    """

    state: TrainingState
    assets: AssetFolders
    """Small files for the checkpoints: configuration, tokenizer and licence."""
    resume: Path | None = None
    """The run's own checkpoint: weights, optimizer and position in the data."""
    checkpoint: Path | None = None
    """Another sharded checkpoint: weights only."""
    hf: Path | None = None
    """A Hugging Face model directory: weights only."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints of the run that are damaged, and their faults."""


def find(
    run: Run,
    save: Path,
    load: Path | None,
    load_hf: Path | None,
    tokenizer: Path | None = None,
    *,
    verified: bool = False,
) -> tuple[Run, WeightsSource]:
    """Determine model shape, RoPE and where the weights are. The run's own newest undamaged checkpoint in
    `save` takes precedence.

    verified: all files of the checkpoint are read and hashed first; every rank calls it.
    Returns the run with `model` and `rope` filled in. UserError where shapes or RoPE settings contradict each
    other, and where all checkpoints are damaged.
    """
    own, damaged = run_directory.newest_verified(save) if verified else run_directory.newest(save)
    if own is not None:
        source = replace(_resume(run, own), damaged=tuple(damaged.items()))
        if run.lora.rank:
            source = _with_frozen_weights(source, load, load_hf, verified)
    elif load is not None:
        found = run_directory.resolve_verified(load) if verified else run_directory.resolve(load)
        source = _from_checkpoint(run, found, tokenizer)
    elif load_hf is not None:
        source = _from_hf(run, load_hf, tokenizer)
    elif run.model is not None:
        if run.lora.rank:
            raise UserError("lora.rank trains adapters of a model: give --load-hf DIR or --load CKPT")
        stated = run.rope or Unscaled(original_length=run.train.seq_length)
        state = TrainingState(
            model=run.model, rope=stated.for_length(None, run.train.seq_length), base=run.base
        )
        source = WeightsSource(state=state, assets=AssetFolders(tokenizer=tokenizer))
    else:
        raise UserError(f"recipe {run.name} starts from a model: give --load-hf DIR or --load CKPT")
    if run.train.load_optimizer and source.resume is None:
        _check_optimizer(source.checkpoint)
    return replace(run, model=source.state.model, rope=source.state.rope), source


def _with_frozen_weights(
    source: WeightsSource, load: Path | None, load_hf: Path | None, verified: bool
) -> WeightsSource:
    """The source of a run that resumes with adapters, and whose checkpoint has no other weights. UserError
    where these are not given, or of another shape."""
    if load is not None:
        found = run_directory.resolve_verified(load) if verified else run_directory.resolve(load)
        if bridge.is_stated(found):
            stored = stored_adapters.read_model_state(found)
            _check_same_model(source.state.model, stored.model, found)
        return replace(source, checkpoint=found)
    if load_hf is not None:
        _check_same_model(source.state.model, hf_config.read_config(load_hf).model, load_hf)
        return replace(source, hf=load_hf)
    raise UserError(
        f"{source.resume} contains adapters only: give the model that they belong to again, by --load-hf or --load"
    )


def _check_optimizer(checkpoint: Path | None) -> None:
    """UserError where there is no optimizer state to start with."""
    without = "or set train.load_optimizer=false to start with a new one"
    if checkpoint is None:
        raise UserError(
            f"train.load_optimizer=true takes the optimizer from a checkpoint: give --load CKPT, {without}"
        )
    if not any(name.startswith("optimizer.") for name in sharded.stored_tensors(checkpoint)):
        raise UserError(
            f"{checkpoint} contains no optimizer state: --load a checkpoint of a training run, {without}"
        )


def _resume(run: Run, newest: Path) -> WeightsSource:
    state = training_state.read(newest)
    _check_same_model(run.model, state.model, newest)
    other = differences(run.rope, state.rope) if run.rope is not None else []
    if other:
        theirs, ours = (
            ", ".join(f"rope.{name}={getattr(rope, name)}" for name in other)
            for rope in (state.rope, run.rope)
        )
        raise UserError(
            f"{newest} was trained with {theirs}, but this run specifies {ours}; use a new --save folder"
        )
    state = replace(state, rope=follow_run(state.rope, run.rope))
    covered = state.rope.covered_length()
    if covered is not None and not (run.rope is not None and run.rope.allow_short):
        reach = max(state.max_length, covered)
        config.check_reach(replace(state.rope, allow_short=False), reach, run.train.seq_length)
    return WeightsSource(state=state, resume=newest, assets=_assets_of(newest))


def _from_checkpoint(run: Run, path: Path, tokenizer: Path | None) -> WeightsSource:
    if not (path / "run.json").is_file() and run.model is not None:
        # A checkpoint of Megatron-LM or Megatron-Bridge: the recipe gives the shape.
        stored = TrainingState(
            model=run.model, rope=(run.rope or Unscaled()).for_length(None, run.train.seq_length)
        )
    else:
        stored = stored_adapters.read_model_state(path)
    _check_same_model(run.model, stored.model, path)
    assets = _assets_of(path)
    length = stored.max_length
    if assets.base is not None:
        base = hf_config.read_config(assets.base)
        if base.rope == stored.rope:  # it may state more than it was trained on here
            length = max(length, base.max_position)
    rope = _rope(run, stored.rope, length)
    state = TrainingState(
        model=stored.model,
        rope=rope,
        base=stored.base,
        max_length=length if rope == stored.rope else 0,
    )
    return WeightsSource(state=state, checkpoint=path, assets=replace(assets, tokenizer=tokenizer))


def _from_hf(run: Run, folder: Path, tokenizer: Path | None) -> WeightsSource:
    hf = hf_config.read_config(folder)
    _check_same_model(run.model, hf.model, folder)
    name = hf_config.base_name(folder, hf.raw)
    if run.base.rpartition("/")[2].lower() == name.lower():
        name = run.base  # the directory has the short name of the recipe's base: use the full name
    rope = _rope(run, hf.rope, hf.max_position)
    length = hf.max_position if rope == hf.rope else 0
    state = TrainingState(model=hf.model, rope=rope, base=name, max_length=length)
    return WeightsSource(state=state, hf=folder, assets=AssetFolders(base=folder, tokenizer=tokenizer))


def _rope(run: Run, loaded: Rope, length: int) -> Rope:
    """The RoPE of a run from a model with the RoPE `loaded` that was made for `length` tokens."""
    reach = max(length, loaded.covered_length() or 0)
    rope = resolve(run.rope, loaded, reach, run.train.seq_length)
    covered = rope.covered_length()
    if rope == loaded and run.train.seq_length <= reach:
        # The loaded model may read more than its factor says, like Llama-3.1: 131,072 tokens with 8 x 8,192.
        return replace(rope, allow_short=covered is not None and covered < run.train.seq_length)
    config.check_reach(rope, covered, run.train.seq_length)
    return rope


def _assets_of(checkpoint: Path) -> AssetFolders:
    folder = bridge.assets(checkpoint)
    if (folder / "config.json").is_file():
        return AssetFolders(base=folder)
    return AssetFolders(tokenizer=folder if folder.is_dir() else None)


def _check_same_model(expected: Model | None, stored: Model, where: Path) -> None:
    if expected is None:
        return
    for f in fields(Model):
        ours, theirs = getattr(expected, f.name), getattr(stored, f.name)
        if ours != theirs and f.name != "init_std":
            raise UserError(
                f"{where} has model.{f.name}={theirs}, but the recipe specifies {ours}; "
                f"use another recipe or --set model.{f.name}={theirs}"
            )


def check_same_checkpoint(source: WeightsSource, save: Path) -> None:
    """UserError, on every rank, where the ranks do not see the same checkpoints. Every rank calls it."""
    names = agreement.gather(source.resume.name if source.resume else "none")
    for rank, name in enumerate(names):
        if name != names[0]:
            raise UserError(
                f"--save {save}: rank 0 sees checkpoint {names[0]} there, rank {rank} {name}; "
                "put it on storage shared by all nodes"
            )


def load_weights(chunks: list[torch.nn.Module], run: Run, source: WeightsSource, ranks: Ranks) -> None:
    """Fill the model's weights, before data_parallel and the optimizer. When resuming, what is trained is
    loaded later, together with the optimizer."""
    if source.resume is not None and not run.lora.rank:
        return
    if isinstance(rope := llama.unwrap(chunks[0]).rotary.rope, TrainedCLEX):
        rope.weights.initialise(run.train.seed)
    model = source.state.model
    of_model = []
    for chunk in chunks:
        parameters = llama.named_parameters(chunk)
        of_adapters = {name: p for name, p in parameters.items() if adapters.is_adapter(name)}
        adapters.initialise(of_adapters, model, run.lora, run.train.seed, ranks)
        of_model.append({name: p for name, p in parameters.items() if name not in of_adapters})
    if source.checkpoint is not None:
        sharded.load(source.checkpoint, chunks, base=True)
        return
    for parameters in of_model:
        if source.hf is not None:
            load_parameters(source.hf, model, parameters, ranks.tp_rank, ranks.tp, group=ranks.groups.dp_cp)
        else:
            init.initialise(parameters, model, run.train.seed, ranks.tp_rank, ranks.tp)


def check_frozen_weights(chunks: list[torch.nn.Module], source: WeightsSource) -> str:
    """Return the sum of the weights that are not trained. UserError, on every rank, where a run that resumes
    was trained with others."""
    found, before = stored_adapters.frozen_sum(chunks), source.state.frozen_weights
    if source.resume is not None and found != before:
        raise UserError(
            f"{source.checkpoint or source.hf} is not the model that the adapters of {source.resume} were trained "
            "with; give that one"
        )
    return found


def with_run(state: TrainingState, run: Run, rows: BlendedDataset) -> TrainingState:
    """Add the resolved run and its training data to the state that its checkpoints record."""
    data = {"seed": run.train.seed, "shuffle": run.data.shuffle, "sets": rows.identity()}
    max_length = max(state.max_length, run.train.seq_length)
    return replace(state, run=config.to_dict(run), max_length=max_length, data=data)


def data_note(before: TrainingState, now: TrainingState) -> str | None:
    """A line for a run that resumes with other data, or another order of it, than before."""
    if before.data is None or before.data == now.data:
        return None
    changed = [
        name for name in ("seed", "shuffle", "sets") if before.data.get(name) != (now.data or {}).get(name)
    ]
    return (
        f"note: this run's data changed ({', '.join(changed)}): it resumes at sequence {before.consumed} of the new "
        "order, so in this epoch some rows may be used twice and some not at all"
    )


def theta_note(run: Run, source: WeightsSource) -> str | None:
    """A line for a run whose RoPE base differs from the model's: intended for NTK-aware scaling, otherwise a
    mistake."""
    if source.hf is None or run.rope is None or run.rope.type == "theta":
        return None
    theirs = hf_config.read_config(source.hf).rope.theta
    if theirs == run.rope.theta:
        return None
    return (
        f"note: rope.theta={run.rope.theta:g}, but {source.hf} was trained with {theirs:g}; "
        f"--set rope.theta={theirs:g} keeps it"
    )
