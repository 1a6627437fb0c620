"""Conversion between Hugging Face directories and sharded checkpoints, and their comparison; on any number of
ranks, from any TP x PP to any other.

Conversion runs on the CPU: the model is built there and filled, and Megatron's dist_checkpointing does the
resharding. Every rank holds its shard of the weights once; export sends one Megatron parameter at a time to
rank 0, which streams it to disk.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ultralong.checkpoint import rope_network, run_directory, saving, sharded, training_state
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import model_card, schema
from megatron_ultralong.checkpoint.hf.assets import AssetFolders, write_assets
from megatron_ultralong.checkpoint.hf.reader import HFReader, load_parameters
from megatron_ultralong.checkpoint.hf.writer import SHARD_BYTES, HFWriter
from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.max_position import note as max_position_note
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Memory, Model, Parallel, Runtime, check_model_layout, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_config import client_warnings
from megatron_ultralong.rope.methods import same_maths
from megatron_ultralong.runtime import agreement, launch
from megatron_ultralong.runtime.launch import Ranks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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

    dtype: None = as stored (float16 or mixed weights become float32, which represents them exactly).
    UserError before anything is written where the directory is not a complete Llama or `out` is in use.
    """
    base = hf_config.read_config(folder)
    reader = HFReader(folder, base.model)
    dtype = dtype or reader.dtype
    reader.close()
    agreement.on_main_rank(lambda: _make_run_directory(out))
    try:
        chunk = _build(base.model, base.rope, ranks, parallel, dtype)
        load_parameters(folder, base.model, _parameters(chunk), ranks.tp_rank, ranks.tp)
        name = hf_config.base_name(folder, base.raw)
        state = TrainingState(model=base.model, rope=base.rope, base=name)
        return saving.save(out, state, [chunk], None, AssetFolders(base=folder))
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # only if it is empty
        raise


def export_hf(
    checkpoint: Path,
    out: Path,
    ranks: Ranks,
    parallel: Parallel,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    clex_scale: float | None = None,
) -> tuple[Path, list[str]]:
    """Write a checkpoint (run directory or one iteration) as the HF directory `out` and return it, and what
    its user should know, in lines; every rank calls it.

    dtype: None = the checkpoint's. clex_scale: scale at which CLEX's frequencies are frozen; None = the
    largest. UserError, on every rank, where `out` is in use or cannot be written, or config.json cannot
    express the RoPE; `out` then does not exist.
    """
    checkpoint = run_directory.resolve_verified(checkpoint)
    state, stored = training_state.read(checkpoint), stored_dtype(checkpoint)
    rope = rope_network.exported(checkpoint, state.rope, state.model.head_dim, clex_scale)
    state = replace(state, rope=rope)
    dtype = dtype or stored
    model, assets = state.model, checkpoint / "hf"
    base = _base_config(assets)
    config = hf_config.export_config(model, state.rope, max_position(state, base), dtype, base)
    shapes = weight_mapping.hf_shapes(model)
    writer = agreement.on_every_rank(
        lambda: HFWriter(out, shapes, dtype, shard_bytes) if ranks.is_main else None
    )

    def write(name: str, shards: list[Tensor]) -> None:
        if writer is not None:
            for hf_name, tensor in weight_mapping.merge(name, shards, model).items():
                writer.add(hf_name, tensor)

    def finish() -> None:
        if writer is not None:
            card = _model_card(writer.out_dir, assets, state, config["max_position_embeddings"], dtype)
            write_assets(writer.folder, assets if assets.is_dir() else None, config, _texts(card))
            writer.finish()

    try:
        chunk = _build(model, state.rope, ranks, parallel, stored)
        sharded.load(checkpoint, [chunk])
        parameters = _parameters(chunk)
        owners = _owners(parameters, ranks)
        names = weight_mapping.megatron_names(model)
        for name in tqdm(names, desc="writing weights", unit="tensor", disable=not ranks.is_main):
            shape = weight_mapping.shard_shape(name, model, ranks.tp)
            shards = _gather(parameters.get(name), owners[name], shape, stored, ranks)
            agreement.on_every_rank(functools.partial(write, name, shards))
        agreement.on_every_rank(finish)
    finally:
        if writer is not None:
            writer.abandon()
    return out, [*max_position_note(config["max_position_embeddings"], base), *client_warnings(state.rope)]


def verify(folder: Path, checkpoint: Path, ranks: Ranks, parallel: Parallel) -> list[str]:
    """Compare every weight of an HF directory and a checkpoint bit by bit; return one line per difference,
    the same list on every rank.

    Where the two are stored in different dtypes, both are compared in the narrower one. UserError where they
    cannot be compared.
    """
    checkpoint = run_directory.resolve_verified(checkpoint)
    hf, state, stored = (
        hf_config.read_config(folder),
        training_state.read(checkpoint),
        stored_dtype(checkpoint),
    )
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
    narrow = torch.bfloat16 if torch.bfloat16 in (stored, reader.dtype) else torch.float32
    chunk = _build(hf.model, hf.rope, ranks, parallel, stored)
    sharded.load(checkpoint, [chunk])
    mine: dict[str, tuple[int, float]] = {}  # HF tensor -> elements that differ, largest difference
    parameters = _parameters(chunk)
    for name, parameter in tqdm(
        parameters.items(), desc="comparing", unit="tensor", disable=not ranks.is_main
    ):
        if parameter.dim() == 1 and ranks.tp_rank:
            continue  # all tensor parallel ranks hold the same values: counted once
        theirs = reader.shard(name, ranks.tp_rank, ranks.tp, narrow)
        ours = parameter.to(narrow)
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


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """dtype of a checkpoint's weights. UserError where Megatron cannot read it."""
    stored = sharded.stored_tensors(checkpoint)
    if weight_mapping.EMBEDDING not in stored:
        raise UserError(f"{checkpoint} lacks the tensor {weight_mapping.EMBEDDING}")
    return stored[weight_mapping.EMBEDDING].dtype


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
    owners: dict[str, list[int]] = {}
    for rank, (tp_rank, names) in enumerate(agreement.gather((ranks.tp_rank, list(parameters)))):
        for name in names:
            owners.setdefault(name, [0] * ranks.tp)[tp_rank] = rank
    return owners


def _gather(
    mine: Tensor | None, owners: list[int], shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks
) -> list[Tensor]:
    """The shards of one parameter in TP order, on rank 0; an empty list on the others. mine: this rank's."""
    if not ranks.is_main:
        if ranks.rank in owners:
            assert mine is not None
            torch.distributed.send(_bytes(mine), dst=0)
        return []
    shards = []
    for owner in owners:
        shard = mine if owner == 0 and mine is not None else torch.empty(shape, dtype=dtype)
        if owner != 0:
            torch.distributed.recv(_bytes(shard), src=owner)
        shards.append(shard)
    return shards


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8, which gloo can send for any dtype."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _differences(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Number of elements whose bits differ, and the largest difference."""
    bits = torch.int16 if ours.dtype == torch.bfloat16 else torch.int32
    unequal = ours.view(bits) != theirs.view(bits)
    if not unequal.any():
        return 0, 0.0
    return int(unequal.sum()), float((ours[unequal].double() - theirs[unequal].double()).abs().max())


def _make_run_directory(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise UserError(
            f"{out} already exists and is not an empty directory; choose another --out or remove it"
        )
    atomic_files.check_writable(out, f"--out {out}")


def _base_config(assets: Path) -> dict[str, Any]:
    """The base model's config.json as the checkpoint carries it; only the special tokens where it is missing
    or not a Llama's."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    if (assets / "config.json").is_file():
        raw = schema.read(assets / "config.json")
        return raw if raw.get("model_type") == "llama" else {key: raw[key] for key in special if key in raw}
    if not (assets / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets)
    return {key: getattr(tokenizer, key) for key in special}


def _model_card(
    out: Path, assets: Path, state: TrainingState, max_position: int, dtype: torch.dtype
) -> model_card.ModelCard:
    run = state.stored_run()
    base = state.base or (run.base if run else "")
    return model_card.ModelCard(
        name=out.parent.name if out.name == "hf" else out.name,
        base=base,
        license=model_card.base_license(assets, base),
        run=run,
        model=state.model,
        rope=state.rope,
        max_position=max_position,
        iterations=state.iteration,
        tokens=state.tokens,
        dtype=dtype,
    )


def _texts(card: model_card.ModelCard) -> dict[str, str]:
    """File name -> text of the files that an export adds to those of its base model."""
    texts = {"README.md": card.text(), **model_card.notice(card.license)}
    if card.run is not None:
        texts["training_run.json"] = json.dumps(to_dict(card.run), indent=2) + "\n"
    return texts
