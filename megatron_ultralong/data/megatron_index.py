"""Megatron's .idx files, written and read without importing Megatron, so that worker processes start quickly.

PREFIX.bin contains the numbers of all sequences one after another. PREFIX.idx, little-endian: the magic,
uint64 version 1, uint8 code of the number type, uint64 sequences, uint64 documents + 1; then the int32 length
of each sequence, the int64 byte at which it starts, and the int64 first sequence of each document, followed
by their number. Megatron's own reader is megatron.core.datasets.indexed_dataset.IndexedDataset.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from megatron_ultralong.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
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
    """The number type in which Megatron writes ids of such a vocabulary."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def write_index(path: Path, dtype: Any, lengths: ArrayLike) -> None:
    """Write the index of a .bin file of sequences of these `lengths` [n], each of them a document."""
    sizes = numpy.asarray(lengths, dtype=numpy.int32)
    kind = numpy.dtype(dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[kind.name], len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes())
        start = 0
        for first in range(0, len(sizes), _BLOCK):
            ends = start + numpy.cumsum(sizes[first : first + _BLOCK], dtype=numpy.int64) * kind.itemsize
            file.write(numpy.concatenate([[start], ends[:-1]]).astype(numpy.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, len(sizes) + 1, _BLOCK):
            file.write(numpy.arange(first, min(first + _BLOCK, len(sizes) + 1), dtype=numpy.int64).tobytes())


@dataclass(frozen=True)
class IndexHeader:
    """The beginning of a PREFIX.idx."""

    type_code: int
    sequences: int
    borders: int
    """Documents + 1."""

    @property
    def index_size(self) -> int:
        """Bytes of the complete PREFIX.idx."""
        return _HEADER.size + 12 * self.sequences + 8 * self.borders


def read_header(path: Path) -> IndexHeader:
    """The header of the index at `path`. UserError where it cannot be read or is not an index."""
    try:
        with path.open("rb") as file:
            begin = file.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(begin) < _HEADER.size or not begin.startswith(_MAGIC):
        raise UserError(f"{path} is not a Megatron index")
    return IndexHeader(*_HEADER.unpack(begin)[2:])


@dataclass(frozen=True)
class CorpusIndex:
    """The content of a PREFIX.idx."""

    dtype: numpy.dtype[Any]
    lengths: NDArray[numpy.int32]
    """Numbers of each sequence [n]."""
    documents: NDArray[numpy.int64]
    """First sequence of each document, and at the end n [documents + 1]."""

    def document_lengths(self) -> NDArray[numpy.int64]:
        """Numbers of each document [documents], whose sequences follow one another."""
        ends = numpy.concatenate([[0], numpy.cumsum(self.lengths, dtype=numpy.int64)])
        return numpy.diff(ends[self.documents])


def read_index(path: Path, *, check_size: bool = True) -> CorpusIndex:
    """The index at `path`. UserError where it is damaged, or does not fit the .bin file next to it (unless
    check_size is false)."""
    header, data = read_header(path), path.with_suffix(".bin")
    try:
        size, content = data.stat().st_size, path.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from None
    count = header.sequences
    name = next((name for name, code in _CODES.items() if code == header.type_code), None)
    if name is None or len(content) < header.index_size:
        raise UserError(f"{path} was cut short or damaged; make it again")
    lengths = numpy.frombuffer(content, numpy.int32, count, _HEADER.size)
    starts = numpy.frombuffer(content, numpy.int64, count, _HEADER.size + 4 * count)
    documents = numpy.frombuffer(content, numpy.int64, header.borders, _HEADER.size + 12 * count)
    dtype = numpy.dtype(name)
    total = int(lengths.sum(dtype=numpy.int64)) * dtype.itemsize
    in_order = not count or (
        starts[0] == 0
        and numpy.array_equal(numpy.diff(starts), lengths[:-1].astype(numpy.int64) * dtype.itemsize)
    )
    if lengths.min(initial=0) < 0 or not in_order or (check_size and size != total):
        raise UserError(f"{data} does not fit {path.name} ({size} bytes, expected {total}); make both again")
    if (
        not header.borders
        or documents[0] != 0
        or documents[-1] != count
        or numpy.diff(documents).min(initial=0) < 0
    ):
        raise UserError(f"{path}: its documents do not cover its sequences; make it again")
    return CorpusIndex(dtype, lengths, documents)
