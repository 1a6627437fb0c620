"""Megatron's files of a checkpoint, written by threads of each rank."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint import tensor_sums
from megatron_ultralong.errors import UserError, first_line
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement


def write(partial: Path, final: Path, state: dict[str, Any], vocab_size: int) -> dict[str, str]:
    """Write Megatron's files of a sharded state dict, and return the sums of its tensors. UserError, on every
    rank, where that fails."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from torch.distributed.checkpoint.api import CheckpointException

    size = sum(agreement.gather(_bytes_to_write(state)))
    agreement.on_main_rank(lambda: check_space(final, size))
    sums = tensor_sums.Sums(vocab_size)
    strategy = sums.while_saving(serialization.get_default_save_sharded_strategy())

    def write_mine() -> None:
        try:
            with _writers():
                dist_checkpointing.save(state, str(partial), strategy, validate_access_integrity=True)
        # Whatever a failed writer makes torch or Megatron raise.
        except (Exception, CheckpointException) as error:
            raise _failed(final, error, size) from None

    agreement.on_every_rank(write_mine)
    return sums.on_all_ranks()


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    leaves = (x for x in nested_values(state) if isinstance(x, (ShardedTensor, ShardedTensorFactory)))
    return sum(x.data.nbytes for x in leaves if x.data is not None and is_main_replica(x.replica_id))


def check_space(final: Path, size: int) -> None:
    """UserError where `size` bytes of tensors, and what describes them, do not fit."""
    try:
        total, _, free = shutil.disk_usage(final.parent)
    except OSError as error:
        raise atomic_files.cannot_write(f"checkpoint {final}", error) from None
    size = size + size // 100 + (1 << 20)
    if total and free < size:  # some file systems report nothing
        raise UserError(
            f"checkpoint {final} cannot be written: it needs {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free"
        )


def _failed(final: Path, error: BaseException, size: int) -> UserError:
    """The error of a save that failed on a rank. Megatron wraps the first cause, and torch loses it where a
    file could not be completed."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        text = error.strerror or first_line(error)
    elif _is_full(final.parent, size):
        text = os.strerror(errno.ENOSPC)
    else:
        text = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"checkpoint {final} cannot be written: {text}")


def _is_full(folder: Path, size: int) -> bool:
    """Whether there is no space left for what remains of `size` bytes."""
    with contextlib.suppress(OSError):
        total, _, free = shutil.disk_usage(folder)
        return bool(total) and free < min(size, 16 << 20)
    return False


@contextlib.contextmanager
def _writers() -> Iterator[None]:
    """Have Megatron write with threads of this process in the block.

    Releases up to 0.18 fork a process for each file, and have a further one for their results: these would
    die of a SIGTERM to the process group, outlive a killed rank, and may never return from a fork of a
    process with threads.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    by_processes = getattr(writer, "write_preloaded_data_multiproc", None)
    if by_processes is not None:
        writer.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        if by_processes is not None:
            writer.write_preloaded_data_multiproc = staticmethod(by_processes)


def _write_in_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """Takes the place of `FileSystemWriterAsync.write_preloaded_data_multiproc`, whose arguments these are:
    puts the results of all buckets by number, or the first exception, into `results`."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write_bucket(number: int) -> tuple[int, Any]:
        mine: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], mine, running, use_fsync=True, use_msc=use_msc
        )
        return mine.get_nowait()

    with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint") as pool:
        written = dict(pool.map(write_bucket, range(len(buckets))))
    failed = next((result for result in written.values() if isinstance(result, Exception)), None)
    results.put(written if failed is None else failed)
