"""Writing the weights of a Hugging Face Llama directory: safetensors, streamed tensor by tensor.

Everything goes into a hidden folder next to the output directory, which is renamed once all of it is on the
disk; an interrupted export, even a killed one, leaves no directory that looks complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from megatron_ultralong.checkpoint.hf import dtypes
from megatron_ultralong.checkpoint.hf.assets import to_json
from megatron_ultralong.checkpoint.hf.weight_files import INDEX, SINGLE
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files

SHARD_BYTES = 5 * 10**9  # the usual size in transformers and on the hub

_SAFETENSORS = {dtype: name for name, dtype in dtypes.SAFETENSORS.items()}


class HFWriter:
    """Streams tensors into `out_dir`: `add` each of `shapes` in order, put small files into `folder`, then
    `finish`.

    Use it in a `with` block: leaving the block without `finish` removes what was written. One tensor is in
    memory at a time. UserError before any work where `out_dir` is not empty, cannot be written or has too
    little space.
    """

    def __init__(
        self,
        out_dir: Path | str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | Mapping[str, torch.dtype],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """dtype: of all tensors, or by name."""
        self.out_dir = Path(out_dir).resolve()
        self._shapes = dict(shapes)
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dict(dtype)
        self._sizes = {name: prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()}
        self._shards = plan_shards(self._sizes, shard_bytes)
        self._remaining = [(number, name) for number, names in enumerate(self._shards) for name in names]
        self._remaining.reverse()  # the next one is last
        self._file: BinaryIO | None = None
        check_output(self.out_dir)
        self.notes: list[str] = []
        """What its user should know, in lines."""
        self._lock: int | None = None
        self.folder = self._stage(sum(self._sizes.values()))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, converted to its dtype. ValueError if it is not the next one, or of another
        shape; UserError where it cannot be converted or written."""
        number, expected = self._remaining.pop() if self._remaining else (0, "none")
        if name != expected or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(
                f"next tensor should be {expected} {self._shapes.get(expected)}, not {name} {tuple(tensor.shape)}"
            )
        stored = dtypes.converted(tensor.detach().cpu(), self._dtypes[name], name).contiguous()
        try:
            if name == self._shards[number][0]:
                self._file = self._begin(number)
            assert self._file is not None
            self._file.write(memoryview(stored.flatten().view(torch.uint8).numpy()))
            if name == self._shards[number][-1]:
                self._file.close()
                self._file = None
        except OSError as error:
            raise atomic_files.cannot_write(str(self.out_dir), error) from None

    def finish(self) -> Path:
        """Write the index, sync everything to the disk, and rename the directory. Returns it."""
        if self._remaining:
            raise ValueError(f"{len(self._remaining)} tensors were not added, next {self._remaining[-1][1]}")
        try:
            if len(self._shards) > 1:
                total = sum(prod(shape) for shape in self._shapes.values())
                index = {
                    "metadata": {"total_parameters": total, "total_size": sum(self._sizes.values())},
                    "weight_map": {
                        name: self._shard_name(i) for i, names in enumerate(self._shards) for name in names
                    },
                }
                (self.folder / INDEX).write_text(to_json(index), encoding="utf-8")
            check_output(self.out_dir)  # again: it may have been filled meanwhile
            atomic_files.publish(self.folder, self.out_dir)
        except OSError as error:
            raise atomic_files.cannot_write(str(self.out_dir), error) from None
        return self.out_dir

    def abandon(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered does not fit on a full disk either
                self._file.close()
            self._file = None
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _stage(self, size: int) -> Path:
        parent = self.out_dir.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            pattern = atomic_files.staging_pattern(self.out_dir)
            self.notes = atomic_files.remove_abandoned(parent, pattern, f"export to {self.out_dir}")
            total, _, free = shutil.disk_usage(parent)
            if total and free < size:  # some file systems report nothing
                raise UserError(
                    f"{self.out_dir}: the export needs {size / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free"
                )
            folder = atomic_files.staging_folder(self.out_dir)
            self._lock = atomic_files.lock_folder(folder)
            return folder
        except OSError as error:
            raise atomic_files.cannot_write(str(self.out_dir), error) from None

    def _shard_name(self, number: int) -> str:
        total = len(self._shards)
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors" if total > 1 else SINGLE

    def _begin(self, number: int) -> BinaryIO:
        """Open a shard and write its header: length (8 bytes, little endian), then JSON padded to 8 bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in self._shards[number]:
            shape = self._shapes[name]
            end = start + self._sizes[name]
            header[name] = {
                "dtype": _SAFETENSORS[self._dtypes[name]],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self.folder / self._shard_name(number)).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        return file


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensor names per shard, in order, each shard at most `shard_bytes` of data (a larger tensor has one to
    itself)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def check_output(out_dir: Path) -> None:
    """UserError unless `out_dir` does not exist or is an empty directory."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(
            f"{out_dir} already exists and is not an empty directory; choose another or remove it"
        )
