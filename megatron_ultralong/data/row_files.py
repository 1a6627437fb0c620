"""Reading the files of packed rows (row_writer.py), and their checksums.

Files are read with pread, not mapped into memory: a file that is cut short while a run reads it is an error
in one line instead of a signal.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import megatron_index
from megatron_ultralong.errors import UserError

BLOCK = 4 << 20
"""Bytes with a checksum of their own."""
_DIGITS = 16
"""Hexadecimal digits of SHA-256 that are kept of each block."""


class SequenceFile:
    """The sequences of PREFIX.bin/.idx. Can be pickled. UserError where a file is missing or damaged, or has
    no sequences."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.path = prefix, Path(f"{prefix}.bin")
        index_file = Path(f"{prefix}.idx")
        header = megatron_index.read_header(index_file)
        try:
            self._size = self.path.stat().st_size
            with self.path.open("rb"):
                pass
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if header.sequences == 0 or not self._size:
            raise UserError(f"{prefix} contains no rows; prepare the data again")
        if index_file.stat().st_size < header.index_size:
            raise UserError(f"{index_file} was cut short; prepare the data again")
        index = megatron_index.read_index(index_file, check_size=False)
        self.dtype, self._lengths = index.dtype, index.lengths
        self._file: tuple[int, int] | None = None  # process, descriptor

    def __len__(self) -> int:
        return len(self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Sequence `number`, [n]. UserError where the file is shorter than it was, or cannot be read."""
        length = int(self._lengths[number])
        data = self._read(self._start(number), length * self.dtype.itemsize)
        return numpy.frombuffer(data, self.dtype)

    def first_length_other_than(self, length: int) -> int | None:
        """The first sequence's length that is not `length`."""
        others = self._lengths[self._lengths != length]
        return int(others[0]) if len(others) else None

    def check_size(self) -> None:
        """UserError where the data file does not have the size that the index says."""
        if self._size != int(self._lengths.sum(dtype=numpy.int64)) * self.dtype.itemsize:
            raise UserError(
                f"{self.path} does not have the length that {Path(self.prefix).name}.idx says; prepare the data again"
            )

    def _start(self, number: int) -> int:
        """The byte at which a sequence starts."""
        if not hasattr(self, "_starts"):
            lengths = self._lengths.astype(numpy.int64)
            self._starts = numpy.concatenate([[0], numpy.cumsum(lengths)[:-1]]) * self.dtype.itemsize
        return int(self._starts[number])

    def _read(self, start: int, count: int) -> bytes:
        parts, missing = [], count
        try:
            if self._file is None or self._file[0] != os.getpid():
                self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
            while missing:
                part = os.pread(self._file[1], missing, start + count - missing)
                if not part:
                    raise UserError(f"{self.path} was cut short while it was in use; prepare the data again")
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return b"".join(parts)


# ---- checksums ---------------------------------------------------------------------------------


def checksums(files: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """What the manifest records of files, by suffix: bytes, and a checksum for each block of them."""
    made: dict[str, Any] = {}
    for suffix, path in files:
        hashes = [_hash(block) for block in _blocks(path)]
        made[suffix] = {"bytes": path.stat().st_size, "block": BLOCK, "sha256": hashes}
    return made


def check(prefix: str, recorded: dict[str, Any], sample: int | None = None, seed: int = 0) -> None:
    """Compare files with their manifest's checksums: all blocks, or the sizes, all blocks of the indices and
    `sample` random ones of each other file. UserError names the first file that differs, and where."""
    for suffix, sums in recorded.items():
        path = Path(prefix + suffix)
        try:
            size = path.stat().st_size
            if size != sums["bytes"]:
                raise UserError(
                    f"{path} has {size:,} bytes, but its manifest says {sums['bytes']:,}; prepare the data again"
                )
            numbers: Sequence[int] = range(len(sums["sha256"]))
            if sample is not None and not suffix.endswith(".idx"):
                numbers = sorted(random.Random(f"{seed} {suffix}").sample(numbers, min(sample, len(numbers))))
            with path.open("rb") as file:
                for number in numbers:
                    file.seek(number * sums["block"])
                    if _hash(file.read(sums["block"])) != sums["sha256"][number]:
                        raise UserError(
                            f"{path} is not the file that its manifest describes (its {sums['block']:,} bytes from "
                            f"{number * sums['block']:,} on differ); prepare the data again"
                        )
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{prefix}.json has checksums of an unknown form; prepare the data again"
            ) from None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _hash(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()[:_DIGITS]
