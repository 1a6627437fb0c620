"""Megatron's files of a checkpoint, written by threads of each rank."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ultralong.checkpoint import tensor_sums
from megatron_ultralong.errors import UserError, first_line
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement, memory


class Shards:
    """Megatron's files of a sharded state dict: every rank plans them together, each writes its own, and rank
    0 writes their index."""

    def __init__(
        self,
        partial: Path,
        final: Path,
        state: dict[str, Any],
        vocab_size: int,
        *,
        copied: bool,
        values: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Plan the files, and write Megatron's small ones; every rank calls it. copied: copy this rank's
        tensors, so that they may change before `write`, where every host has the memory for it. values:
        returns the values of a tensor on the meta device, when it is written, in several threads.

        UserError, on every rank, where that fails."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import serialization
        from torch.distributed.checkpoint.api import CheckpointException

        mine = _bytes_to_write(state)
        sizes = agreement.gather((mine, memory.host_bytes(), socket.gethostname()))
        self._final, self._size = final, sum(size for size, _, _ in sizes)
        self.copied = copied and _have_room(sizes)
        """Whether the tensors were copied."""
        agreement.on_main_rank(lambda: check_space(final, self._size))
        self._sums = tensor_sums.Sums(vocab_size)
        self._values = values
        self._leaves: list[Any] = []
        self._request: Any = None
        strategy = self._planned(serialization.get_default_save_sharded_strategy())

        def plan() -> None:
            try:
                with _writers():
                    dist_checkpointing.save(state, str(partial), strategy, validate_access_integrity=True)
                _rank_zero_files.raise_error()
            # Whatever torch or Megatron raise.
            except (Exception, CheckpointException) as error:
                raise self._failed(error) from None

        agreement.on_every_rank(plan)

    def _planned(self, strategy: Any) -> Any:
        """Megatron's strategy for saving, which then plans what this rank writes, and keeps it for `write`
        and `finish`."""
        planned = copy.copy(strategy)

        def save(state: Any, *arguments: Any, **named: Any) -> Any:  # they differ by release
            # Before, rank 0 has written Megatron's small files, and may have failed.
            agreement.on_every_rank(_rank_zero_files.raise_error)
            self._leaves = list(tensor_sums.saved_tensors(state))
            if self.copied:
                agreement.on_every_rank(self._copy)
            return type(strategy).save(planned, state, *arguments, **named)

        def async_save(*arguments: Any, **named: Any) -> _NotYet:
            self._request = type(strategy).async_save(planned, *arguments, **named)
            return _NotYet()

        planned.save, planned.async_save = save, async_save
        return planned

    def _copy(self) -> None:
        """Copy this rank's tensors to the host. Those of a GPU are summed there first: it is faster, and the
        sums then tell a wrong copy too."""
        not_summed = []
        for leaf in self._leaves:
            if leaf.data.is_cuda:
                self._sums.add_all([(leaf, leaf.data)])
            else:
                not_summed.append(leaf)
            leaf.data = leaf.data.detach().to("cpu", copy=True)
        self._leaves = not_summed

    def write(self) -> None:
        """Write this rank's files, and sum its tensors. UserError where that fails; no other rank is waited
        for."""
        request = self._request
        late = None if self._values is None else _Late(self._values, self._leaves, self._sums)
        try:
            arguments = list(request.async_fn_args)
            if late is not None:
                arguments[1:2] = [late.buckets(buckets) for buckets in arguments[1:2]]
            else:
                self._sums.add_all((leaf, leaf.data) for leaf in self._leaves)
                if request.preload_fn is not None and not self.copied:
                    arguments[1] = request.preload_fn()  # tensors that are still on a GPU
            if request.async_fn is not None:
                request.async_fn(*arguments, **request.async_fn_kwargs)
            if late is not None and late.error is not None:  # the writer has kept it for the other ranks
                raise late.error
        except UserError:
            raise
        except Exception as error:  # whatever a failed writer makes torch or Megatron raise
            raise self._failed(error) from None
        finally:
            self._leaves = []

    def finish(self) -> dict[str, str]:
        """Write the index of all ranks' files, and return the sums of the tensors; every rank calls it.
        UserError, on every rank, where that fails."""
        from torch.distributed.checkpoint.api import CheckpointException

        def complete() -> None:
            try:
                with _rank_zero_files.errors_kept():
                    for act in self._request.finalize_fns:
                        act()
                _rank_zero_files.raise_error()
            except (Exception, CheckpointException) as error:
                raise self._failed(error) from None

        try:
            agreement.on_every_rank(complete)
        finally:
            self._request = None  # and the copies
        return self._sums.on_all_ranks()

    def _failed(self, error: BaseException) -> UserError:
        return _failed(self._final, error, self._size)


class _Late:
    """Tensors whose values are asked for when it is their turn to be written."""

    def __init__(self, values: Callable[[Tensor], Tensor], leaves: list[Any], sums: tensor_sums.Sums) -> None:
        """leaves: Megatron's sharded tensors that this rank writes. sums: their sums are added to these."""
        self.error: Exception | None = None
        """What has kept a value from being read."""
        self._values, self._sums = values, sums
        self._leaves = {(leaf.key, tuple(leaf.global_offset)): leaf for leaf in leaves}
        self._lock = threading.Lock()

    def buckets(self, planned: list[Any]) -> list[Any]:
        """Megatron's plan of this rank's files, with values."""
        return [
            (file, key, (objects, self._filled(tensors))) for file, key, (objects, tensors) in planned or []
        ]

    def _filled(self, tensors: list[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
        for item, tensor in tensors:
            leaf = self._leaves[item.index.fqn, tuple(item.index.offset)]
            try:
                values = self._values(tensor)
            except Exception as error:
                self.error = error
                raise
            with self._lock:
                self._sums.add_all([(leaf, values)])
            yield item, values


class _NotYet:
    """Takes the place of Megatron's request to write, which `Shards.write` carries out."""

    def execute_sync(self) -> None:
        pass


def _have_room(sizes: list[tuple[int, int, str]]) -> bool:
    """Whether each host has the memory for a copy of what its ranks write, and as much again.

    sizes: of each rank, the bytes that it writes, those available on its host, and the host's name."""
    needed: dict[str, int] = {}
    for size, _, host in sizes:
        needed[host] = needed.get(host, 0) + size
    return all(2 * needed[host] <= available for _, available, host in sizes)


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


class _RankZeroFiles:
    """Megatron's files that rank 0 alone writes, between collectives: an error of one is kept until all ranks
    can be told."""

    error: Exception | None = None

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def errors_kept(self) -> Iterator[None]:
        from megatron.core.dist_checkpointing import serialization
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        written_by: list[tuple[Any, str]] = [
            (serialization, "save_config"),
            (FileSystemWriterAsync, "finish"),
        ]
        with contextlib.suppress(ImportError):  # newer releases have no common.pt
            from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

            written_by.append((TorchCommonSaveStrategy, "save_common"))
        originals = [getattr(owner, name) for owner, name in written_by]
        for (owner, name), original in zip(written_by, originals, strict=True):
            setattr(owner, name, self._keeping(original))
        try:
            yield
        finally:
            for (owner, name), original in zip(written_by, originals, strict=True):
                setattr(owner, name, original)

    def _keeping(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def keeping(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except Exception as error:
                self.error = self.error or error

        return keeping


_rank_zero_files = _RankZeroFiles()


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
        with _rank_zero_files.errors_kept():
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
