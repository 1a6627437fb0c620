"""Sharded checkpoints by Megatron's dist_checkpointing: written whole or not at all, read back under any
layout.

A run directory holds `iter_0000100/` folders: Megatron's shards, `run.json` (format version, run, shape,
RoPE, progress) and `hf/` (config, tokenizer and licence of the base model). A folder is written under a
hidden name and renamed when every rank is done, so each `iter_*` that exists is whole.
`latest_checkpointed_iteration.txt` is kept for Megatron-LM's own tools.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong import config
from megatron_ultralong.config import Model, Rope
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime.launch import Ranks

FORMAT = 2
"""Of run.json. 1 had other names for some settings of the run (`config.RENAMED`); both are read."""
READABLE = (1, FORMAT)
# The whole optimizer state goes by way of the host to data-parallel rank 0, so a save takes no GPU memory.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint knows beside its tensors."""

    model: Model
    rope: Rope
    iteration: int = 0
    consumed: int = 0
    """Sequences trained on so far."""
    tokens: int = 0
    """Tokens trained on so far."""
    run: dict[str, Any] | None = None
    """The resolved run, `config.to_dict`."""
    max_length: int = 0
    """Longest sequence that it or what it started from was trained at, tokens."""
    data: dict[str, Any] | None = None
    """What it was trained on: seed, shuffling, and of each set its weight and its manifest's hash."""
    base: str = ""
    """Name of the model it all started from."""


def save(
    folder: Path,
    progress: Progress,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    assets: Path | None,
    ranks: Ranks,
    keep: int = 0,
    tokenizer: Path | None = None,
) -> Path:
    """Write `folder/iter_NNNNNNN`; every rank calls it. Then the oldest checkpoints beyond `keep` go (0 =
    keep all).

    `assets` is a folder of the base model's small files, copied to `hf/`; `tokenizer` one whose tokenizer
    takes the place of theirs. Returns the checkpoint's path. UserError, on every rank, where it cannot be
    written.
    """
    from megatron.core import dist_checkpointing

    final = folder / f"iter_{progress.iteration:07d}"
    name = agree(lambda: _begin(folder, final, assets, tokenizer), ranks, f"cannot write checkpoint {final}")
    partial = folder / name
    dist_checkpointing.save(state_dict(chunks, optimizer), str(partial), validate_access_integrity=True)
    _end_writers()
    _barrier()
    agree(lambda: _finish(partial, final, progress, keep), ranks, f"cannot write checkpoint {final}")
    return final


def agree(act: Callable[[], Any], ranks: Ranks, what: str) -> Any:
    """What `act()` gives on rank 0, on every rank; its OSError or UserError is raised on all of them as one
    UserError.

    So a rank never waits in a collective for one that has left. Every rank calls it.
    """
    box: list[Any] = [None, None]
    if ranks.is_main:
        try:
            box[0] = act()
        except OSError as error:
            box[1] = f"{what}: {error.strerror or error}"
        except UserError as error:
            box[1] = str(error)
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def _begin(folder: Path, final: Path, assets: Path | None, tokenizer: Path | None) -> str:
    """The name of a new hidden folder with the small files in it."""
    from megatron_ultralong.checkpoint.hf import reader as hf

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".iter_*.partial*"):
        # What cannot be removed (a file still open on NFS) costs space, not the run: hence the new folder's
        # name of its own.
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=folder))
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp makes it private
    if assets is not None:
        hf.copy_assets(assets, partial / "hf", tokenizer=tokenizer is None)
    if tokenizer is not None:
        hf.copy_assets(tokenizer, partial / "hf", others=assets is None)
    return partial.name


def _finish(partial: Path, final: Path, progress: Progress, keep: int) -> None:
    """Make `partial` the whole checkpoint `final`, and remove old ones."""
    values = {"format": FORMAT, **asdict(progress)}
    (partial / "run.json").write_text(json.dumps(values, indent=2) + "\n")
    _sync(partial)
    if final.exists():
        _remove(final)
    os.rename(partial, final)
    _write_atomically(final.parent / "latest_checkpointed_iteration.txt", str(progress.iteration))
    for old in whole(final.parent)[:-keep] if keep else []:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Out of sight first: a kill in the middle of the removal must not leave a folder that looks whole."""
    gone = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}.partial-", dir=checkpoint.parent))
    os.rename(checkpoint, gone / checkpoint.name)
    shutil.rmtree(gone, ignore_errors=True)


def _end_writers() -> None:
    """Let go of the process that holds the queue of Megatron's writers: it would outlive a killed rank, and
    keep its output open."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None


def state_dict(
    chunks: list[torch.nn.Module], optimizer: Any = None, *, loading: bool = False
) -> dict[str, Any]:
    """Megatron's sharded state dict of the chunks and, where given, the optimizer."""
    from megatron_ultralong.model.llama import unwrap

    many = len(chunks) > 1
    state: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        # Older releases fill the metadata in place, hence a copy a call.
        state[f"model{i}" if many else "model"] = unwrap(chunk).sharded_state_dict(metadata=_metadata())
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=_metadata()
        )
    return state


def load(path: Path, chunks: list[torch.nn.Module], optimizer: Any = None) -> None:
    """Fill `chunks` (and the optimizer) from the checkpoint at `path`, written under any layout.

    Raises UserError naming the first tensor that is missing, extra or of another shape; only `_extra_state`
    may differ.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_ultralong.checkpoint import optimizer_state
    from megatron_ultralong.model.llama import unwrap

    if optimizer is not None:
        optimizer_state.before_load(optimizer)
    wanted = state_dict(chunks, optimizer, loading=True)
    _check(path, wanted, unwrap(chunks[0]).vocab_size, with_optimizer=optimizer is not None)
    state = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.IGNORE_ALL)
    many = len(chunks) > 1
    for i, chunk in enumerate(chunks):
        tensors = {
            k: v for k, v in state[f"model{i}" if many else "model"].items() if not k.endswith("_extra_state")
        }
        missing, unexpected = unwrap(chunk).load_state_dict(tensors, strict=False)
        left = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        assert not left, left
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        optimizer_state.after_load(optimizer)


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    if not folder.is_dir():
        return []
    found = [
        p for p in folder.iterdir() if re.fullmatch(r"iter_\d+", p.name) and (p / "metadata.json").is_file()
    ]
    return sorted(found, key=lambda p: int(p.name[5:]))


def resolve(path: Path) -> Path:
    """An iteration's folder: `path` itself, or the newest whole one in the run directory `path`. UserError if
    there is none."""
    if (path / "metadata.json").is_file():
        return path
    found = whole(path)
    if not found:
        raise UserError(
            f"{path} holds no whole checkpoint; expected a run directory with iter_* folders, or one of those"
        )
    return found[-1]


def progress_of(path: Path) -> Progress:
    """What `run.json` of the checkpoint says. UserError where it is missing or of a newer format."""
    file = path / "run.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: not a checkpoint of this program (a Megatron-LM one needs a recipe with the model's shape)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if (version := values.pop("format", None)) not in READABLE:
        raise UserError(
            f"{file}: unsupported format version {version} (expected {' or '.join(map(str, READABLE))}); "
            "use the release that wrote it"
        )
    return Progress(model=Model(**values.pop("model")), rope=Rope(**values.pop("rope")), **values)


def stored_run(progress: Progress) -> config.Run | None:
    return config.from_dict(progress.run) if progress.run else None


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _check(path: Path, wanted: dict[str, Any], vocab_size: int, with_optimizer: bool) -> None:
    """Compare names and global shapes before anything is read: Megatron pads or cuts a vocabulary that
    differs in silence."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    stored = {
        k: tuple(t.global_shape) for k, t in dist_checkpointing.load_tensors_metadata(str(path)).items()
    }
    asked: dict[str, tuple[tuple[int, ...], bool]] = {}  # shape, and whether its rows may be padded otherwise
    for leaf in nested_values(wanted):
        if isinstance(leaf, ShardedTensorFactory):
            for part in nested_values(leaf.build()):
                asked[part.key] = tuple(part.global_shape), part.allow_shape_mismatch
        elif isinstance(leaf, ShardedTensor):
            asked[leaf.key] = tuple(leaf.global_shape), leaf.allow_shape_mismatch
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, asked)
    asked = {k: v for part in everyone for k, v in part.items()}
    for name, (shape, padded) in asked.items():
        if name not in stored:
            raise UserError(f"{path} lacks the tensor {name}")
        if padded and not name.startswith("optimizer.") and not _pads(stored[name][0], vocab_size):
            raise UserError(
                f"{path}: {name} has {stored[name][0]} rows, which is no padding of the model's vocabulary of {vocab_size}"
            )
        if (shape[1:] != stored[name][1:]) if padded else (shape != stored[name]):
            raise UserError(
                f"{path}: {name} has shape {list(stored[name])}, but the model needs {list(shape)}"
            )
    for name in stored:
        if (
            name not in asked
            and not name.endswith("_extra_state")
            and (with_optimizer or not name.startswith("optimizer."))
        ):
            raise UserError(f"{path} has the tensor {name}, which the model does not have")


def _pads(rows: int, vocab_size: int) -> bool:
    """Whether `rows` is `vocab_size` padded for some tensor parallel size: as here, or as Megatron-LM does
    (to multiples of 128)."""
    sizes = (
        *range(1, 17),
        32,
        64,
    )  # with any size at all, a small model's vocabulary would fit almost any number of rows
    return any(rows == -(-vocab_size // size) * size for tp in sizes for size in (tp, 128 * tp))


def _barrier() -> None:
    torch.distributed.barrier()


def _sync(folder: Path) -> None:
    """Put the files' contents on the disk before the rename that makes them count."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, file)
