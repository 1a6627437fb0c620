"""HF directory -> sharded checkpoint, back, and a comparison of the two; on one rank or many, any TP x PP to
any other.

Conversion runs on the CPU: the model is built there, filled, and Megatron's dist_checkpointing does the
resharding. Every rank holds its share of the weights once; export sends one Megatron parameter at a time to
rank 0, which streams it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ultralong.checkpoint import sharded
from megatron_ultralong.checkpoint.hf import model_card
from megatron_ultralong.checkpoint.hf import reader as hf
from megatron_ultralong.checkpoint.hf import writer as hf_writer
from megatron_ultralong.checkpoint.sharded import Progress
from megatron_ultralong.config import Memory, Model, Parallel, Rope, Runtime, check_model_layout, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.model.rope import same_maths
from megatron_ultralong.runtime import launch
from megatron_ultralong.runtime.launch import Ranks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def layout(model: Model, world: int, tp: int | None = None, pp: int | None = None) -> Parallel:
    """TP x PP of a conversion on `world` ranks; what is left open is chosen, pipeline first. UserError where
    nothing fits."""
    sizes = [(t, world // t) for t in range(1, world + 1) if world % t == 0]
    options = [Parallel(tp=t, pp=p) for t, p in sizes if tp in (None, t) and pp in (None, p)]
    if not options:
        asked = " x ".join(f"--{name} {size}" for name, size in (("tp", tp), ("pp", pp)) if size is not None)
        raise UserError(
            f"{asked} does not make {world}, the number of ranks started; change it, or torchrun's --nproc-per-node"
        )
    failures = []
    for parallel in options:
        try:
            check_model_layout(model, parallel)
            return parallel
        except UserError as error:
            failures.append(f"tp={parallel.tp} pp={parallel.pp}: {error}")
    raise UserError(f"{world} ranks do not split this model ({failures[0]}); start another number of ranks")


@contextmanager
def started(model: Model, tp: int | None, pp: int | None) -> Iterator[tuple[Ranks, Parallel]]:
    """This process as a rank of a conversion of `model`: joins torchrun's other ranks, if any, and leaves
    them at the end."""
    parallel = layout(model, launch.world_size(), tp, pp)
    yield launch.start(Runtime(device="cpu"), parallel), parallel
    launch.stop()  # not after a failure: other ranks may still be in a collective


def import_hf(
    folder: Path, out: Path, ranks: Ranks, parallel: Parallel, dtype: torch.dtype | None = None
) -> Path:
    """Write the HF directory `folder` as iteration 0 of the run directory `out`; every rank calls it. Returns
    the checkpoint.

    `dtype` None = as stored (float16 or mixed weights become float32, which holds them exactly). UserError
    before anything is written where the directory is no whole Llama or `out` is in use.
    """
    found = hf.read_config(folder)
    weights = hf.Weights(folder, found.model)
    dtype = dtype or weights.dtype
    weights.close()
    _empty_run_directory(out, ranks)
    try:
        chunk = _build(found.model, found.rope, ranks, parallel, dtype)
        hf.load_parameters(
            folder, found.model, _parameters(chunk), ranks.tp_rank, ranks.tp, show_progress=ranks.is_main
        )
        progress = Progress(model=found.model, rope=found.rope, base=hf.base_name(folder, found.raw))
        return sharded.save(out, progress, [chunk], None, folder, ranks)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # only if nothing is in it
        raise


def export_hf(
    checkpoint: Path,
    out: Path,
    ranks: Ranks,
    parallel: Parallel,
    dtype: torch.dtype | None = None,
    shard_bytes: int = hf_writer.SHARD_BYTES,
) -> Path:
    """Write a checkpoint (run directory or one iteration) as the HF directory `out`; every rank calls it.
    Returns `out`.

    `dtype` None = the checkpoint's. UserError, on every rank, where `out` is in use or cannot be written, or
    HF has no words for the RoPE; `out` then does not exist.
    """
    checkpoint = sharded.resolve(checkpoint)
    progress, stored = sharded.progress_of(checkpoint), stored_dtype(checkpoint)
    dtype = dtype or stored
    model, writer = progress.model, None
    assets = checkpoint / "hf"
    base = _base_config(assets)
    config = hf_writer.export_config(model, progress.rope, max_position(progress, base), dtype, base)
    with _Together(ranks) as together:
        if ranks.is_main:
            writer = hf_writer.HFWriter(out, weight_mapping.hf_shapes(model), dtype, shard_bytes)
    try:
        chunk = _build(model, progress.rope, ranks, parallel, stored)
        sharded.load(checkpoint, [chunk])
        parameters = _parameters(chunk)
        owners = _owners(parameters, ranks)
        for name in tqdm(
            weight_mapping.megatron_names(model),
            desc="writing weights",
            unit="tensor",
            disable=not ranks.is_main,
        ):
            shards = _gather(name, parameters, owners[name], model, stored, ranks)
            with together:
                if writer is not None:
                    for tensor, whole in weight_mapping.merge(name, shards, model).items():
                        writer.add(tensor, whole)
        with together:
            if writer is not None:
                _small_files(writer, assets, config, progress, dtype)
                writer.finish()
    finally:
        if writer is not None:
            writer.abandon()
    return out


def verify(folder: Path, checkpoint: Path, ranks: Ranks, parallel: Parallel) -> list[str]:
    """Compare every weight of an HF directory and a checkpoint, bit by bit; one line a difference, the same
    list on every rank.

    Where the two are stored in different dtypes both are compared in the narrower. UserError where they
    cannot be compared.
    """
    checkpoint = sharded.resolve(checkpoint)
    found, progress, stored = (
        hf.read_config(folder),
        sharded.progress_of(checkpoint),
        stored_dtype(checkpoint),
    )
    names = [f.name for f in fields(Model) if f.name != "init_std"]
    shapes = {name: (getattr(found.model, name), getattr(progress.model, name)) for name in names}
    different = [
        f"config.json: {name} is {a}, in the checkpoint {b}" for name, (a, b) in shapes.items() if a != b
    ]
    if different:
        return different
    if not same_maths(found.rope, progress.rope, found.model.head_dim):
        different.append(
            f"config.json: RoPE is {model_card.rope_text(found.rope)}; in the checkpoint {model_card.rope_text(progress.rope)}"
        )
    weights = hf.Weights(folder, found.model)
    narrow = torch.bfloat16 if torch.bfloat16 in (stored, weights.dtype) else torch.float32
    chunk = _build(found.model, found.rope, ranks, parallel, stored)
    sharded.load(checkpoint, [chunk])
    mine: dict[str, tuple[int, float]] = {}  # HF tensor -> elements that differ, largest difference
    for name, parameter in tqdm(
        _parameters(chunk).items(), desc="comparing", unit="tensor", disable=not ranks.is_main
    ):
        if parameter.dim() == 1 and ranks.tp_rank:
            continue  # every tensor parallel rank holds the same: counted once
        theirs = weights.shard(name, ranks.tp_rank, ranks.tp, narrow)
        ours = parameter.detach().to(narrow)
        for piece in weight_mapping.pieces(name, found.model, ranks.tp_rank, ranks.tp):
            count, largest = _differences(ours[piece.target], theirs[piece.target])
            if count:
                before = mine.get(piece.hf, (0, 0.0))
                mine[piece.hf] = (before[0] + count, max(before[1], largest))
    everyone: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(everyone, mine)
    for hf_name in weight_mapping.hf_shapes(found.model):
        parts = [part[hf_name] for part in everyone if hf_name in part]
        if parts:
            different.append(
                f"{hf_name}: {sum(count for count, _ in parts):,} differ, by up to {max(d for _, d in parts):.3g}"
            )
    return different


def max_position(progress: Progress, base: dict[str, Any]) -> int:
    """max_position_embeddings of an export, tokens: what the training reached, and all of a scaled RoPE's
    range."""
    rope, run, reached = (
        progress.rope,
        sharded.stored_run(progress),
        int(base.get("max_position_embeddings", 0)),
    )
    scaled = 0 if rope.type == "none" else round(rope.factor * rope.original_length)
    if rope.type == "yarn" and rope.ramp == "dimension":
        return scaled  # exactly: transformers 4.51 to 4.55 take max / original as the factor
    if run is None:  # imported, not trained
        return reached or scaled or 2048
    return max(progress.max_length, run.train.seq_length, scaled or reached)


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """dtype of a checkpoint's weights. UserError where Megatron cannot read it."""
    from megatron.core import dist_checkpointing

    try:
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    except Exception as error:  # whatever a damaged checkpoint makes torch or Megatron raise
        raise UserError(
            f"{checkpoint} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None
    if weight_mapping.EMBEDDING not in stored:
        raise UserError(f"{checkpoint} lacks the tensor {weight_mapping.EMBEDDING}")
    return stored[weight_mapping.EMBEDDING].dtype


class _Together:
    """A block that rank 0 does alone: its UserError is raised on every rank, so none waits for another that
    has left."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, UserError):
            return
        box = [None if error is None else str(error)]
        torch.distributed.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise UserError(box[0]) from None


def _build(model: Model, rope: Rope, ranks: Ranks, parallel: Parallel, dtype: torch.dtype) -> torch.nn.Module:
    from megatron_ultralong.model import llama

    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return llama.build(
        model, rope, ranks, parallel, Memory(offload="off"), precision, transformer_engine=False
    )[0]


def _parameters(chunk: torch.nn.Module) -> dict[str, Tensor]:
    from megatron_ultralong.model import llama

    return {
        weight_mapping.canonical(name): parameter.detach()
        for name, parameter in llama.named_parameters(chunk).items()
    }


def _owners(parameters: dict[str, Tensor], ranks: Ranks) -> dict[str, list[int]]:
    """Parameter name -> the ranks that hold its shards, in TP order."""
    everyone: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(everyone, (ranks.tp_rank, list(parameters)))
    owners: dict[str, list[int]] = {}
    for rank, (tp_rank, names) in enumerate(everyone):
        for name in names:
            owners.setdefault(name, [0] * ranks.tp)[tp_rank] = rank
    return owners


def _gather(
    name: str,
    parameters: dict[str, Tensor],
    owners: list[int],
    model: Model,
    dtype: torch.dtype,
    ranks: Ranks,
) -> list[Tensor]:
    """The shards of one parameter in TP order, on rank 0; nothing on the others."""
    if not ranks.is_main:
        if ranks.rank in owners:
            torch.distributed.send(_bytes(parameters[name]), dst=0)
        return []
    shards = []
    for owner in owners:
        shard = (
            parameters[name]
            if owner == 0
            else torch.empty(weight_mapping.shard_shape(name, model, ranks.tp), dtype=dtype)
        )
        if owner != 0:
            torch.distributed.recv(_bytes(shard), src=owner)
        shards.append(shard)
    return shards


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8: gloo moves it whatever the dtype."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _differences(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Elements whose bits differ, and the largest difference."""
    bits = torch.int16 if ours.dtype == torch.bfloat16 else torch.int32
    unequal = ours.view(bits) != theirs.view(bits)
    if not unequal.any():
        return 0, 0.0
    return int(unequal.sum()), float((ours[unequal].double() - theirs[unequal].double()).abs().max())


def _empty_run_directory(out: Path, ranks: Ranks) -> None:
    with _Together(ranks):
        if not ranks.is_main:
            return
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
            raise UserError(
                f"{out} already exists and is not an empty directory; choose another --out or remove it"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def _base_config(assets: Path) -> dict[str, Any]:
    """The base model's config.json as the checkpoint carries it; special tokens only where it is not a
    Llama's, or missing."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    if (assets / "config.json").is_file():
        raw = hf.read_json(assets / "config.json")
        return raw if raw.get("model_type") == "llama" else {key: raw[key] for key in special if key in raw}
    if not (assets / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets)
    return {key: getattr(tokenizer, key) for key in special}


def _small_files(
    writer: hf_writer.HFWriter, assets: Path, config: dict[str, Any], progress: Progress, dtype: torch.dtype
) -> None:
    run = sharded.stored_run(progress)
    base = progress.base or (run.base if run else "")
    licence = model_card.base_license(assets, base)
    out = writer.out_dir.resolve()
    readme = model_card.model_card(
        out.parent.name if out.name == "hf" else out.name,
        base=base,
        license=licence,
        run=run,
        model=progress.model,
        rope=progress.rope,
        max_position=config["max_position_embeddings"],
        iterations=progress.iteration,
        tokens=progress.tokens,
        dtype=dtype,
    )
    extra = {"README.md": readme, **model_card.notice(licence)}
    if run is not None:
        extra["training_run.json"] = json.dumps(to_dict(run), indent=2) + "\n"
    hf_writer.write_small_files(writer.folder, assets if assets.is_dir() else None, config, extra)
