"""Megatron's .bin/.idx written and read piece by piece, without importing Megatron: worker processes start in
a moment.

PREFIX.bin holds the numbers of all sequences one after another. PREFIX.idx, little-endian: the magic, uint64
version 1, uint8 code of the number type, uint64 sequences, uint64 documents + 1; then int32 length of each
sequence, int64 byte at which it starts, int64 first sequence of each document and, last, their number.
(megatron.core.datasets.indexed_dataset, whose IndexedDataset reads it.)
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from megatron_ultralong.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, number type, sequences, documents + 1."""
MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[str, int] = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
_BLOCK = 1 << 20  # numbers of an index written at a time


def token_dtype(vocab_size: int) -> type[numpy.uint16] | type[numpy.int32]:
    """The smallest number type that Megatron writes ids of such a vocabulary in."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def write_index(path: Path, dtype: Any, lengths: ArrayLike) -> None:
    """The index of a .bin file of sequences of these `lengths` [n], each a document of its own."""
    sizes = numpy.asarray(lengths, dtype=numpy.int32)
    kind = numpy.dtype(dtype)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, _CODES[kind.name], len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes())
        start = 0
        for first in range(0, len(sizes), _BLOCK):
            ends = start + numpy.cumsum(sizes[first : first + _BLOCK], dtype=numpy.int64) * kind.itemsize
            file.write(numpy.concatenate([[start], ends[:-1]]).astype(numpy.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, len(sizes) + 1, _BLOCK):
            file.write(numpy.arange(first, min(first + _BLOCK, len(sizes) + 1), dtype=numpy.int64).tobytes())


@dataclass(frozen=True)
class Index:
    """What PREFIX.idx says."""

    dtype: numpy.dtype[Any]
    lengths: NDArray[numpy.int32]
    """Numbers of each sequence [n]."""
    documents: NDArray[numpy.int64]
    """First sequence of each document, and at the end n [documents + 1]."""

    def document_lengths(self) -> NDArray[numpy.int64]:
        """Numbers of each document [documents]; its sequences lie one after another."""
        ends = numpy.concatenate([[0], numpy.cumsum(self.lengths, dtype=numpy.int64)])
        return numpy.diff(ends[self.documents])


def read_index(path: Path) -> Index:
    """The index at `path`; UserError where it is none, or does not fit the .bin file beside it."""
    data = path.with_suffix(".bin")
    try:
        size, whole = data.stat().st_size, path.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    if len(whole) < HEADER.size or not whole.startswith(MAGIC):
        raise UserError(f"{path}: is not a Megatron index")
    _, _, code, count, borders = HEADER.unpack_from(whole)
    name = next((name for name, value in _CODES.items() if value == code), None)
    if name is None or len(whole) < HEADER.size + 12 * count + 8 * borders:
        raise UserError(f"{path}: was cut short or damaged; make it again")
    lengths = numpy.frombuffer(whole, numpy.int32, count, HEADER.size)
    starts = numpy.frombuffer(whole, numpy.int64, count, HEADER.size + 4 * count)
    documents = numpy.frombuffer(whole, numpy.int64, borders, HEADER.size + 12 * count)
    dtype = numpy.dtype(name)
    total = int(lengths.sum(dtype=numpy.int64)) * dtype.itemsize
    in_order = not count or (
        starts[0] == 0
        and numpy.array_equal(numpy.diff(starts), lengths[:-1].astype(numpy.int64) * dtype.itemsize)
    )
    if lengths.min(initial=0) < 0 or not in_order or size != total:
        raise UserError(
            f"{data}: is not what {path.name} says ({size} bytes, expected {total}); make both again"
        )
    if not borders or documents[0] != 0 or documents[-1] != count or numpy.diff(documents).min(initial=0) < 0:
        raise UserError(f"{path}: its documents do not cover its sequences; make it again")
    return Index(dtype, lengths, documents)


def sync(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
