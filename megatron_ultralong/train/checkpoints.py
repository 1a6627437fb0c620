"""The checkpoints of a run in training: when they are written, which one is good, and what a failed save
means."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megatron_ultralong.checkpoint import run_directory, saving
from megatron_ultralong.checkpoint.hf.assets import AssetFolders
from megatron_ultralong.checkpoint.saving import Saving
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement
from megatron_ultralong.runtime.heartbeat import Heartbeat
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.step import Trainer


class Checkpoints:
    """The checkpoints of a run directory. Every rank calls every method."""

    def __init__(self, folder: Path, assets: AssetFolders, train: Train, heartbeat: Heartbeat) -> None:
        """assets: small files to copy into each checkpoint. heartbeat: told of each save."""
        self._folder, self._assets, self._train = folder, assets, train
        self._heartbeat = heartbeat
        self._failed = 0
        """Saves in a row that have failed."""
        existing = agreement.on_main_rank(lambda: run_directory.complete_checkpoints(folder))
        self._newest = existing[-1] if existing else None
        self._good: Path | None = None
        self._finite = 0
        """The last finite iteration."""
        self._pending: Saving | None = None
        self._began = self._waited = 0.0
        self._said_no_room = False
        if assets != AssetFolders():
            # The folder they come from may be gone when the first checkpoint is saved, hours later.
            agreement.on_main_rank(lambda: _copy(assets, folder / _ASSETS))
            self._assets = AssetFolders(base=folder / _ASSETS)

    def confirm(self, iteration: int) -> None:
        """Note that an iteration was finite: the newest checkpoint before it is good."""
        self._finite = iteration
        if self._newest is not None and _iteration(self._newest) < iteration:
            self._good = self._newest

    def rewind(self) -> Path | None:
        """Return the last good checkpoint, or the newest one where none is known to be good; None where there
        is none. Newer ones are renamed, so that a restart does not take them."""
        target = self._good or self._newest
        if target is None:
            return None
        at = _iteration(target)

        def set_newer_aside() -> None:
            existing = run_directory.complete_checkpoints(self._folder)
            run_directory.set_aside([path for path in existing if _iteration(path) > at], "rewound")

        agreement.on_main_rank(set_newer_aside)
        # Its own file says the same to Megatron-LM's tools.
        agreement.on_main_rank(lambda: saving.name_latest(target))
        self._newest, self._finite = target, at
        return target

    def save(self, trainer: Trainer, state: TrainingState, log: Log, *, needed: bool) -> bool:
        """Save `state` and return whether nothing failed. The checkpoint is complete when this returns if it
        is needed, and otherwise written while training goes on (`train.async_save`), until `poll` or `finish`
        find it complete.

        UserError where one cannot be written, if it is needed or too many have failed; else a warning.
        """
        try:
            self.finish(log)
        except UserError as error:
            if not needed:
                raise
            log.note(f"warning: {error}")  # this one may be written all the same
        self._heartbeat.phase(f"saving iteration {state.iteration}")
        self._began = time.perf_counter()
        log.flush()  # a run that resumes from here does not log its iterations again
        try:
            self._pending = saving.start(
                self._folder,
                state,
                trainer.chunks,
                trainer.optimizer,
                self._assets,
                self._train.keep,
                trainer.ode.tensors() if trainer.ode else None,
                background=self._train.async_save and not needed,
                good=self._good,
            )
        except UserError as error:
            self._note_failure(error, state.iteration, log, needed)
            return False
        self._waited = time.perf_counter() - self._began
        if self._pending.in_background:
            return True
        if self._train.async_save and not needed and not self._said_no_room:
            self._said_no_room = True
            log.note(
                "host memory has no room for a copy of the checkpoint: training waits until it is written"
            )
        return self.finish(log, needed=needed)

    def poll(self, log: Log) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their files."""
        if self._pending is not None and self._pending.is_written():
            self.finish(log)

    def finish(self, log: Log, *, needed: bool = False) -> bool:
        """Wait for the checkpoint that is being written, if any, and complete it; return whether it, or none,
        was."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        self._heartbeat.phase(f"saving iteration {_iteration(pending.final)}")
        waiting = time.perf_counter()
        try:
            self._newest = pending.finish()
        except UserError as error:
            self._note_failure(error, _iteration(pending.final), log, needed)
            return False
        ended = time.perf_counter()
        self._failed = 0
        if _iteration(self._newest) < self._finite:
            self._good = self._newest
        if (self._newest / "hf").is_dir():  # the folder they came from may be a checkpoint removed by `keep`
            self._assets = AssetFolders(base=self._newest / "hf")
        log.saved(_iteration(self._newest), ended - self._began, self._waited + ended - waiting)
        return True

    def _note_failure(self, error: UserError, iteration: int, log: Log, needed: bool) -> None:
        self._failed += 1
        log.not_saved(iteration, str(error))
        allowed = self._train.save_failures
        if needed or self._failed >= allowed:
            raise UserError(f"{error}; {self}") from None
        log.note(
            f"warning: {error}; training goes on without it ({self._failed} of {allowed} saves failed), {self}"
        )

    def __str__(self) -> str:
        if self._newest is None:
            return "no checkpoint has been saved"
        if self._newest == self._good:
            return f"the last good checkpoint is {self._good}"
        good = (
            "none before it is known to be good"
            if self._good is None
            else f"the last good one is {self._good}"
        )
        return f"the newest checkpoint is {self._newest}, which no finite iteration has followed; {good}"


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


_ASSETS = ".assets"
"""Hidden folder of a run directory with the small files of its model."""


def _copy(assets: AssetFolders, target: Path) -> None:
    try:
        shutil.rmtree(target, ignore_errors=True)
        assets.copy_to(target)
    except OSError as error:
        raise atomic_files.cannot_write(str(target), error) from None
