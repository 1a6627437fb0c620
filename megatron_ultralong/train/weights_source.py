"""Where a run's weights come from: its own newest checkpoint, another checkpoint, a Hugging Face model read
in place, or a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ultralong import config
from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.checkpoint.hf import reader as hf
from megatron_ultralong.checkpoint.sharded import Progress
from megatron_ultralong.config import Model, Rope, Run
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import init, llama
from megatron_ultralong.runtime.launch import Ranks


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run starts from, before any weight is read."""

    progress: Progress
    resume: Path | None = None
    """The run's own checkpoint: weights, optimizer and place in the data."""
    weights: Path | None = None
    """Another sharded checkpoint: weights only."""
    hf: Path | None = None
    """A Hugging Face model directory: weights only."""
    assets: Path | None = None
    """Folder with config, tokenizer and licence to carry along."""
    tokenizer: Path | None = None
    """Folder whose tokenizer is carried along instead."""


def find(
    run: Run, save: Path, load: Path | None, load_hf: Path | None, tokenizer: Path | None = None
) -> tuple[Run, Source]:
    """Settle model shape and RoPE, and say where the weights are. The run's own newest checkpoint in `save`
    wins.

    Returns the run with `model` and `rope` filled in. Raises UserError where the shapes or RoPE settings
    contradict each other.
    """
    whole = sharded.whole(save)
    if whole:
        newest = whole[-1]
        progress = sharded.progress_of(newest)
        _same_model(run.model, progress.model, newest)
        if run.rope is not None and run.rope != progress.rope:
            raise UserError(
                f"{newest} was trained with {progress.rope}, but this run asks for {run.rope}; use a new --save folder"
            )
        source = Source(progress=progress, resume=newest, assets=_folder(newest / "hf"))
        return _settled(run, progress.model, progress.rope), source
    if load is not None:
        path = sharded.resolve(load)
        if (
            not (path / "run.json").is_file() and run.model is not None
        ):  # a Megatron-LM checkpoint: the recipe gives the shape
            found = Progress(model=run.model, rope=run.rope or Rope())
        else:
            found = sharded.progress_of(path)
        _same_model(run.model, found.model, path)
        rope = run.rope or found.rope
        progress = Progress(model=found.model, rope=rope, base=found.base, max_length=found.max_length)
        return _settled(run, found.model, rope), Source(
            progress=progress, weights=path, assets=_folder(path / "hf"), tokenizer=tokenizer
        )
    if load_hf is not None:
        found_hf = hf.read_config(load_hf)
        _same_model(run.model, found_hf.model, load_hf)
        rope = run.rope or found_hf.rope
        name = hf.base_name(load_hf, found_hf.raw)
        if run.base.rpartition("/")[2].lower() == name.lower():
            name = run.base  # the directory is called like the recipe's base: by its full name then
        progress = Progress(model=found_hf.model, rope=rope, base=name)
        return _settled(run, found_hf.model, rope), Source(
            progress=progress, hf=load_hf, assets=load_hf, tokenizer=tokenizer
        )
    if run.model is None:
        raise UserError(f"recipe {run.name} starts from a model: give --load-hf DIR or --load CKPT")
    rope = run.rope or Rope()
    return _settled(run, run.model, rope), Source(
        progress=Progress(model=run.model, rope=rope, base=run.base), tokenizer=tokenizer
    )


def load_weights(chunks: list[torch.nn.Module], run: Run, source: Source, ranks: Ranks) -> None:
    """Fill the model's weights; for a resume they come later, with the optimizer. Before data_parallel and
    optimizer."""
    if source.resume is not None:
        return
    if source.weights is not None:
        sharded.load(source.weights, chunks)
        return
    model = source.progress.model
    for chunk in chunks:
        parameters = llama.named_parameters(chunk)
        if source.hf is not None:
            hf.load_parameters(
                source.hf, model, parameters, ranks.tp_rank, ranks.tp, group=ranks.groups.dp_cp
            )
        else:
            init.initialise(parameters, model, run.train.seed, ranks.tp_rank, ranks.tp)


def with_run(progress: Progress, run: Run, rows: BlendedDataset) -> Progress:
    """Progress that carries the resolved run and what it is trained on into its checkpoints."""
    data = {"seed": run.train.seed, "shuffle": run.data.shuffle, "sets": rows.identity()}
    return replace(
        progress,
        run=config.to_dict(run),
        max_length=max(progress.max_length, run.train.seq_length),
        data=data,
    )


def check_same(source: Source, save: Path) -> None:
    """UserError, on every rank, where the ranks do not see the same checkpoints. Every rank calls it."""
    seen: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, source.resume.name if source.resume else "none")
    if len(set(seen)) > 1:
        rank = next(i for i, name in enumerate(seen) if name != seen[0])
        raise UserError(
            f"--save {save}: rank 0 finds checkpoint {seen[0]} there, rank {rank} {seen[rank]}; put it on storage that all nodes share"
        )


def data_note(before: Progress, now: Progress) -> str | None:
    """A line where a run goes on with other data, or another order of it, than it had so far."""
    if before.data is None or before.data == now.data:
        return None
    what = [
        name for name in ("seed", "shuffle", "sets") if before.data.get(name) != (now.data or {}).get(name)
    ]
    return (
        f"note: this run's data changed ({', '.join(what)}): it goes on at sequence {before.consumed} of the new order, so some rows "
        "may come twice and some not at all in this epoch"
    )


def theta_note(run: Run, source: Source) -> str | None:
    """A line where the run's RoPE base differs from the model's: meant for NTK-aware runs, a slip in all
    others."""
    if source.hf is None or run.rope is None:
        return None
    theirs = hf.read_config(source.hf).rope.theta
    if theirs == run.rope.theta:
        return None
    return f"note: rope.theta={run.rope.theta:g}, but {source.hf} was trained with {theirs:g}; --set rope.theta={theirs:g} keeps it"


def _same_model(asked: Model | None, found: Model, where: Path) -> None:
    if asked is None or asked == found:
        return
    from dataclasses import fields

    for f in fields(Model):
        ours, theirs = getattr(asked, f.name), getattr(found, f.name)
        if ours != theirs and f.name != "init_std":
            raise UserError(
                f"{where} has model.{f.name}={theirs}, but the recipe says {ours}; use another recipe or --set model.{f.name}={theirs}"
            )


def _settled(run: Run, model: Model, rope: Rope) -> Run:
    return replace(run, model=model, rope=rope)


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None
