"""Checkpoints that are written while training goes on: they hold what was trained at their iteration, and
fail as others do."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.checkpoint import integrity, run_directory, shard_writer
from megatron_ultralong.config import Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import memory
from megatron_ultralong.train.bad_steps import TrainingStopped
from megatron_ultralong.train.checkpoints import Checkpoints
from tests.distributed.test_resume import MODEL, Losses, _train
from tests.spawn import run_ranks

WAITING = {"schedule": "constant", "async_save": False}
IN_BACKGROUND = {"schedule": "constant", "async_save": True}
ITERATIONS, LATE = 6, 2
"""A slow disk has written a checkpoint LATE iterations later."""


def test_saving_while_training_goes_on(tmp_path: Path) -> None:
    run_ranks(_saving, 2, str(tmp_path))


def _saving(rank: int, world: int, name: str) -> None:
    folder = Path(name)
    for parallel in (Parallel(), Parallel(pp=2)):
        _holds_its_iteration(folder / f"pp{parallel.pp}", parallel)
    _fails_late(rank, folder / "fails")
    _is_completed_before_a_stop(folder / "stops")
    _without_room(folder / "room")
    _first_file_fails(rank, folder / "common")
    _index_fails(rank, folder / "index")


class _SlowDisk(Losses):
    """Holds back the writing of each checkpoint until `LATE` iterations later."""

    def __init__(self, patch: pytest.MonkeyPatch, save: Path) -> None:
        super().__init__()
        self.save = save
        self.complete: dict[int, list[int]] = {}
        """Iteration -> checkpoints that are complete after it."""
        self._iteration, self._next = 0, threading.Condition()
        write = shard_writer.Shards.write

        def late(shards: Any) -> None:
            with self._next:
                until = min(self._iteration + LATE, ITERATIONS)
                assert self._next.wait_for(lambda: self._iteration >= until, 60), "training does not go on"
            write(shards)

        patch.setattr(shard_writer.Shards, "write", late)

    def step(self, state: Any, *, mean: Any, **unused: Any) -> None:
        super().step(state, mean=mean)
        self.complete[state.iteration] = _complete(self.save)
        with self._next:
            self._iteration = state.iteration
            self._next.notify_all()


def _complete(save: Path) -> list[int]:
    return [int(path.name[5:]) for path in run_directory.complete_checkpoints(save)]


def _holds_its_iteration(folder: Path, parallel: Parallel) -> None:
    fixed = _train(MODEL, parallel, "fp32", folder / "a", iterations=6, save_every=2, settings=WAITING)
    with pytest.MonkeyPatch.context() as patch:
        log = _SlowDisk(patch, folder / "b")
        got = _train(
            MODEL,
            parallel,
            "fp32",
            folder / "b",
            iterations=6,
            save_every=2,
            settings={**IN_BACKGROUND, "keep": 2},
            log=log,
        )
    assert got["losses"] == fixed["losses"]
    # A checkpoint is not there before it is complete, and older ones stay until then.
    assert log.complete[3] == log.complete[4] == [] and log.complete[5] == [2] and log.complete[6] == [2]
    torch.distributed.barrier()
    assert _complete(folder / "b") == [4, 6]
    for n in (4, 6):
        name = f"iter_{n:07d}"
        one, other = (integrity.read(folder / run / name) for run in "ab")
        assert one is not None and other is not None
        assert one.tensors == other.tensors, f"{name} holds what was trained later"
        assert integrity.fault_on_all_ranks(folder / "b" / name) is None
    _nothing_left(folder / "b")


def _nothing_left(save: Path) -> None:
    torch.distributed.barrier()
    assert not list(save.glob(".iter_*")), "something half-written is left"


def _fails_late(rank: int, save: Path) -> None:
    """A disk that fills while training goes on costs that checkpoint, and no more."""
    write = shard_writer.Shards.write
    fails = [False, True, False]

    def full(shards: Any) -> None:
        if fails.pop(0) and rank == 1:
            raise UserError("no space")
        write(shards)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.Shards, "write", full)
        got = _train(MODEL, Parallel(), "fp32", save, iterations=6, save_every=2, settings=IN_BACKGROUND)
    assert _complete(save) == [2, 6]
    (line,) = got["lines"]
    assert line == (
        f"warning: no space; training goes on without it (1 of 3 saves failed), the last good checkpoint is "
        f"{save}/iter_0000002"
    )
    _nothing_left(save)

    fails = [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.Shards, "write", full)
        with pytest.raises(UserError, match="^no space; the last good checkpoint is .*/iter_0000006$"):
            _train(
                MODEL,
                Parallel(),
                "fp32",
                save,
                iterations=12,
                save_every=2,
                resume=save / "iter_0000006",
                settings={**IN_BACKGROUND, "save_failures": 1},
            )
    assert _complete(save) == [2, 6]
    _nothing_left(save)

    # The last checkpoint is written although the one before it could not be.
    fails = [True, False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.Shards, "write", full)
        patch.setattr(Checkpoints, "poll", lambda checkpoints, log: None)  # noticed when the last one begins
        settings = {**IN_BACKGROUND, "save_failures": 1}
        got = _train(MODEL, Parallel(), "fp32", save / "x", iterations=3, save_every=2, settings=settings)
    assert got["lines"] == ["warning: no space; no checkpoint has been saved"]
    assert _complete(save / "x") == [3]


def _is_completed_before_a_stop(save: Path) -> None:
    """A checkpoint that is being written when the loss is not finite is completed first."""
    with pytest.MonkeyPatch.context() as patch:
        write = shard_writer.Shards.write
        patch.setattr(shard_writer.Shards, "write", lambda shards: (time.sleep(0.5), write(shards)))
        with pytest.raises(TrainingStopped, match=f"; the last good checkpoint is {save}/iter_0000002$"):
            _train(
                MODEL,
                Parallel(),
                "fp32",
                save,
                iterations=6,
                save_every=2,
                spoilt=(4, float("inf")),
                settings=IN_BACKGROUND,
            )
    assert _complete(save) == [2]


def _without_room(save: Path) -> None:
    """Where the host has no memory for a copy, training waits, and says so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "host_bytes", lambda: 1000)
        got = _train(MODEL, Parallel(), "fp32", save, iterations=6, save_every=2, settings=IN_BACKGROUND)
    assert _complete(save) == [2, 4, 6]
    assert got["lines"] == [
        "host memory has no room for a copy of the checkpoint: training waits until it is written"
    ]


def _index_fails(rank: int, save: Path) -> None:
    """What rank 0 alone writes between collectives is missed by all ranks."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((serialization, "save_config"), (FileSystemWriterAsync, "finish")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(owner, name, full)
            with pytest.raises(UserError, match="iter_0000001 cannot be written: No space left on device"):
                _train(MODEL, Parallel(), "fp32", save, iterations=1)
        _nothing_left(save)
    assert _complete(save) == []


def _first_file_fails(rank: int, save: Path) -> None:
    """Rank 0 alone writes the first file; where it cannot, the others do not wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            write = torch.save

            def full(value: Any, file: Any, *arguments: Any, **named: Any) -> None:
                if str(file).endswith("common.pt"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                write(value, file, *arguments, **named)

            patch.setattr(torch, "save", full)
        try:
            _train(MODEL, Parallel(), "fp32", save, iterations=1)
        except UserError as error:
            assert (
                "iter_0000001 cannot be written: No space left on device; no checkpoint has been saved"
                in str(error)
            )
            assert _complete(save) == []
        else:  # newer releases of Megatron-Core have no such file
            assert not (save / "iter_0000001" / "common.pt").exists()
    _nothing_left(save)
