"""Writing of sharded checkpoints: completely or not at all, at once or while training goes on.

A save has three parts. `start`, on every rank: a hidden folder, the small files, and the tensors as they are
now, copied to host memory where training goes on. Then each rank writes and hashes its own files, without
another rank. `Saving.finish`, on every rank: the index, the checksums, and the folder's final name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_ultralong.checkpoint import (
    integrity,
    rope_network,
    run_directory,
    shard_writer,
    sharded,
    training_state,
)
from megatron_ultralong.checkpoint.hf.assets import AssetFolders
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement

T = TypeVar("T")

NO_ASSETS = AssetFolders()
_STAGING = ".iter_*.partial*"
"""Pattern of the hidden folders of a run directory."""


def save(
    folder: Path,
    state: TrainingState,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    assets: AssetFolders = NO_ASSETS,
    keep: int = 0,
    rope_tensors: dict[str, torch.Tensor] | None = None,
    *,
    values: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Path:
    """Write `folder/iter_NNNNNNN` and return it; every rank calls it. Then the oldest checkpoints beyond
    `keep` are removed (0 = keep all). rope_tensors: see rope_network.py. values: returns those of a tensor on
    the meta device, when it is written.

    UserError, on every rank, where it cannot be written; earlier checkpoints are then as they were, one of
    the same iteration too.
    """
    return start(
        folder, state, chunks, optimizer, assets, keep, rope_tensors, background=False, values=values
    ).finish()


def start(
    folder: Path,
    state: TrainingState,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    assets: AssetFolders = NO_ASSETS,
    keep: int = 0,
    rope_tensors: dict[str, torch.Tensor] | None = None,
    *,
    background: bool,
    good: Path | None = None,
    values: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Saving:
    """Begin what `save` does; every rank calls it. background: a thread of each rank writes, and weights and
    optimizer may change as soon as this returns, where every host has the memory for a copy. good: a
    checkpoint that is kept beyond `keep`."""
    final = folder / f"iter_{state.iteration:07d}"
    partial = folder / agreement.on_main_rank(lambda: _writing(final, lambda: _begin(final, assets)))
    try:
        with atomic_files.under_final_name(partial, final):
            agreement.on_main_rank(lambda: _writing(final, lambda: _add_state(partial, state, rope_tensors)))
            shards = shard_writer.Shards(
                partial,
                final,
                sharded.state_dict(chunks, optimizer),
                state.model.vocab_size,
                copied=background,
                values=values,
            )
        return Saving(final, partial, shards, keep, good)
    except UserError:
        _remove(partial)
        raise


def remove_interrupted(folder: Path, what: str) -> list[str]:
    """Remove what an interrupted process has left in a run directory that no other process writes, and return
    a line about it; none where there is nothing. what: what was interrupted, like "import"."""
    return atomic_files.remove_abandoned(folder, _STAGING, f"{what} to {folder}")


class Saving:
    """A checkpoint that is being written."""

    def __init__(
        self, final: Path, partial: Path, shards: shard_writer.Shards, keep: int, good: Path | None
    ) -> None:
        """partial: the folder that becomes `final`. keep: checkpoints kept besides `good`, 0 = all."""
        self.final = final
        self.in_background = shards.copied
        self._partial, self._shards, self._keep, self._good = partial, shards, keep, good
        self._files: dict[str, integrity.FileSum] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if shards.copied:
            # A process that ends for another reason does not wait for it.
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()

    def _write(self) -> None:
        """Write and hash this rank's files."""
        try:
            self._shards.write()
            self._files = integrity.hash_own(self._partial)
        except Exception as error:
            self._error = error

    def is_written(self) -> bool:
        """Whether every rank has written its files, so that `finish` need not wait. Every rank calls it."""
        writing = self._thread is not None and self._thread.is_alive()
        # On the host, which must not wait for the device.
        return agreement.first_rank_where(writing, torch.device("cpu")) is None

    def finish(self) -> Path:
        """Wait for the files of all ranks, complete the checkpoint and return its folder; every rank calls
        it. UserError, on every rank, where it cannot be written."""
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        try:
            with atomic_files.under_final_name(self._partial, self.final):
                agreement.on_every_rank(self._raise_error)
                tensors = self._shards.finish()
                files = integrity.hash_written(self._partial, self._files)
                agreement.on_main_rank(
                    lambda: _writing(self.final, lambda: integrity.write(self._partial, files, tensors))
                )
                agreement.on_main_rank(
                    lambda: _writing(
                        self.final, lambda: _publish(self._partial, self.final, self._keep, self._good)
                    )
                )
        except UserError:
            _remove(self._partial)
            raise
        return self.final

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _writing(final: Path, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as error:
        raise atomic_files.cannot_write(f"checkpoint {final}", error) from None
    except UserError as error:  # names one of its files
        raise UserError(f"checkpoint {final} cannot be written: {error}") from None


def _begin(final: Path, assets: AssetFolders) -> str:
    """Create a hidden folder with the small files in it and return its name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(_STAGING):
        # What cannot be removed (a file still open on NFS) costs space, but does not stop the run: the new
        # folder has another name.
        shutil.rmtree(stale, ignore_errors=True)
    partial = atomic_files.staging_folder(final)
    try:
        with atomic_files.under_final_name(partial, final):
            assets.copy_to(partial / "hf")
    except (OSError, UserError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial.name


def _add_state(partial: Path, state: TrainingState, rope_tensors: dict[str, torch.Tensor] | None) -> None:
    training_state.write(partial, state, integrity.ALGORITHM)
    if rope_tensors is not None:
        rope_network.write(partial, rope_tensors)


def _remove(partial: Path) -> None:
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, final: Path, keep: int, good: Path | None) -> None:
    """Make `partial` the complete checkpoint `final`, and remove old ones but `good`."""
    replaced = _hidden(final) if final.exists() else None
    try:
        atomic_files.publish(partial, final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    # The checkpoint is complete: what fails from here on is no reason to call the save failed.
    name_latest(final)
    old = run_directory.complete_checkpoints(final.parent)[:-keep] if keep else []
    old = [path for path in old if path != good]
    with contextlib.suppress(OSError):
        for path in [*([replaced] if replaced is not None else []), *map(_hidden, old)]:
            shutil.rmtree(path.parent, ignore_errors=True)


def name_latest(checkpoint: Path) -> None:
    """Write the file that names the newest checkpoint for Megatron-LM's tools, if it can be written."""
    with contextlib.suppress(OSError, UserError):
        latest = checkpoint.parent / "latest_checkpointed_iteration.txt"
        atomic_files.write_text(latest, str(int(checkpoint.name[5:])))


def _hidden(checkpoint: Path) -> Path:
    """Move a checkpoint into a hidden folder, and return where it is: a kill while it is removed must not
    leave a folder that looks complete."""
    hidden = atomic_files.staging_folder(checkpoint) / checkpoint.name
    os.rename(checkpoint, hidden)
    return hidden
