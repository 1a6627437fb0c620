"""Raw documents as streams: .txt (one document per file), .jsonl (one per line), both also as .gz and .zst;
.parquet (one per row). A Megatron corpus, .bin/.idx, contains tokens: tokenise_worker.py reads it.

A broken document is reported in one line that names the file and the line or row, and may be skipped. A
broken file raises an error.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ultralong.data.input_files import (
    COMPRESSIONS,
    compression,
    decompressed,
    one_line,
    opened,
    printable,
    readable,
)
from megatron_ultralong.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet", ".idx")
_BLOCK = 1 << 20  # bytes read at a time to count lines


class BrokenDocument(UserError):
    """One document that cannot be used, in a file whose other documents may be."""

    def __init__(self, file_range: FileRange, number: int, reason: str) -> None:
        self.file_range, self.number, self.reason = file_range, number, printable(reason)
        super().__init__()

    def __str__(self) -> str:  # made on demand: counting the lines may mean reading the file up to here
        return f"{location(self.file_range, self.number)}: {self.reason}"


@dataclass(frozen=True)
class FileRange:
    """A file or a part of it that is read on its own."""

    path: Path
    begin: int = 0
    """First byte of a .jsonl (lines that begin there or later), first row group of a .parquet."""
    end: int | None = None
    """As begin, exclusive; None = to the end of the file."""


@dataclass(frozen=True)
class Document:
    """One document."""

    number: int
    """Its line within the range, or row within the file, from 1."""
    text: str
    id: str | None = None


def kind(path: Path) -> str:
    """One of KINDS, by the end of the file's name. UserError for any other name."""
    packed = compression(path)
    known = KINDS[:2] if packed else KINDS
    name = path.name.lower().removesuffix(packed)
    if (match := next((end for end in known if name.endswith(end)), None)) is not None:
        return match
    names = ", ".join([*KINDS, *(kind + end for end in COMPRESSIONS for kind in KINDS[:2])])
    raise UserError(f"{path}: unknown kind of file; the name must end in one of {names}")


def check(paths: Iterable[Path]) -> int:
    """Total size of the files, bytes. UserError for the first that is missing, a directory, unreadable or of
    an unknown kind."""
    total = 0
    for path in paths:
        kind(path)
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it, like {path}/*.jsonl")
        with opened(path) as file:
            total += os.fstat(file.fileno()).st_size
    return total


def split(path: Path, size: int) -> list[FileRange]:
    """Split a file into ranges of about `size` bytes, in order. Compressed files and .txt stay whole."""
    with opened(path) as file:
        total = os.fstat(file.fileno()).st_size
        if total <= size or compression(path) or kind(path) == ".txt":
            return [FileRange(path)]
        if kind(path) == ".jsonl":
            borders = [*range(0, total, size), total]
        else:
            import pyarrow
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.ParquetFile(file).metadata
            except pyarrow.ArrowException as error:
                raise UserError(f"{path}: cannot be read as parquet: {one_line(error)}") from None
            borders, filled = [0], 0
            for group in range(table.num_row_groups):
                filled += table.row_group(group).total_byte_size
                if filled >= size or group == table.num_row_groups - 1:
                    borders.append(group + 1)
                    filled = 0
    return [FileRange(path, begin, end) for begin, end in itertools.pairwise(borders)]


def read(
    file_range: FileRange,
    text_key: str = "text",
    id_key: str | None = None,
    progress: Callable[[int], Any] = lambda n: None,
    on_broken: Callable[[BrokenDocument], Any] | None = None,
    on_end: Callable[[int], Any] = lambda n: None,
) -> Iterator[Document]:
    """Yield the documents of a range of a file, in order.

    text_key, id_key: fields of a .jsonl line or columns of a .parquet file. progress: called with the bytes
    of the file read since the last call. on_broken: called with each document that is not text (None = raise
    it). on_end: called with the range's number of lines or rows. Memory: one document, or some rows of
    .parquet. UserError where the file cannot be read.
    """
    reading = _Reading(file_range, text_key, id_key, on_broken, on_end)
    with opened(file_range.path) as file:
        lines = kind(file_range.path) == ".jsonl"
        done = file_range.begin if lines else 0
        # A range's last line may end far behind it, inside or after the next ranges, which count those bytes.
        limit = math.inf if file_range.end is None or not lines else file_range.end

        def advance() -> None:
            nonlocal done
            at = int(min(file.tell(), limit))
            progress(at - done)
            done = at

        with readable(file_range.path):
            if kind(file_range.path) == ".parquet":
                yield from _parquet(reading, file, progress)
                return
            stream = decompressed(file, compression(file_range.path))
            documents = _txt(reading, stream) if kind(file_range.path) == ".txt" else _jsonl(reading, stream)
            for document in documents:
                yield document
                advance()
            advance()


def location(file_range: FileRange, number: int) -> str:
    """File, and line or row, of a document, for messages. Counts the lines before a range."""
    if kind(file_range.path) == ".txt":
        return str(file_range.path)
    if kind(file_range.path) == ".jsonl" and file_range.begin:
        with file_range.path.open("rb") as file:
            # Lines that begin before the range: the first, and one after each line end but the byte just
            # before the range.
            number += 1 + sum(block.count(b"\n") for block in _blocks(file, file_range.begin - 1))
    return f"{file_range.path}, {'row' if kind(file_range.path) == '.parquet' else 'line'} {number}"


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, _BLOCK))):
        size -= len(block)
        yield block


class _NotText(Exception):
    """Why a line or row is not a document."""


@dataclass(frozen=True)
class _Reading:
    """The arguments of `read`."""

    file_range: FileRange
    text_key: str
    id_key: str | None
    on_broken: Callable[[BrokenDocument], Any] | None
    on_end: Callable[[int], Any]

    def broken(self, number: int, reason: object) -> None:
        error = BrokenDocument(self.file_range, number, str(reason))
        if self.on_broken is None:
            raise error from None
        self.on_broken(error)


def _txt(reading: _Reading, stream: BinaryIO) -> Iterator[Document]:
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reading.broken(1, f"not UTF-8 text ({error.reason}); convert it to UTF-8")
    else:
        yield Document(1, text, str(reading.file_range.path))


def _jsonl(reading: _Reading, stream: BinaryIO) -> Iterator[Document]:
    begin, end = reading.file_range.begin, reading.file_range.end
    at, number = begin, 0
    if begin:  # a line that begins before the range belongs to the range before
        stream.seek(begin - 1)
        at += len(stream.readline()) - 1
    while end is None or at < end:
        line = stream.readline()
        if not line:
            break
        at += len(line)
        number += 1
        if line.isspace():
            continue
        try:
            text, id = _record(reading, line.removeprefix(codecs.BOM_UTF8) if at == len(line) else line)
        except _NotText as reason:
            reading.broken(number, reason)
        else:
            yield Document(number, text, id)
    reading.on_end(number)


def _record(reading: _Reading, line: bytes) -> tuple[str, str | None]:
    """(text, id) of a line of .jsonl."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise _NotText(f"not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _NotText(f"not JSON ({error}); fix or remove the line") from None
    if not isinstance(record, dict):
        raise _NotText(f'expected a JSON object like {{"{reading.text_key}": "..."}}, not {_type(record)}')
    for key, flag in ((reading.text_key, "--text-key"), (reading.id_key, "--id-key")):
        if key is not None and key not in record:
            raise _NotText(f"no key {key!r} among {_listed(record)}; choose one with {flag}")
    id = None if reading.id_key is None else printable(str(record[reading.id_key]))
    return _text(reading, record[reading.text_key]), id


def _parquet(reading: _Reading, file: BinaryIO, progress: Callable[[int], Any]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    file_range, text_key, id_key = reading.file_range, reading.text_key, reading.id_key
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [text_key] if id_key is None else [text_key, id_key]
        for name, flag in zip(columns, ("--text-key", "--id-key"), strict=False):
            if name not in table.schema_arrow.names:
                raise UserError(
                    f"{file_range.path}: no column {name!r} among {_listed(table.schema_arrow.names)}; choose one with {flag}"
                )
        groups = range(table.metadata.num_row_groups)[file_range.begin : file_range.end]
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        share = len(groups) / max(table.metadata.num_row_groups, 1)
        size, done, first = int(os.fstat(file.fileno()).st_size * share), 0, number
        for batch in table.iter_batches(batch_size=64, columns=columns, row_groups=list(groups)):
            for value, id in zip(batch.column(text_key), batch.column(id_key or text_key), strict=True):
                number += 1
                try:
                    text = _text(reading, value.as_py())
                except UnicodeDecodeError as error:
                    reading.broken(
                        number, f"{text_key!r} is not UTF-8 text ({error.reason}); fix or remove it"
                    )
                except _NotText as reason:
                    reading.broken(number, reason)
                else:
                    yield Document(number, text, None if id_key is None else str(id.as_py()))
            progress(size * (number - first) // rows - done)
            done = size * (number - first) // rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{file_range.path}: cannot be read as parquet: {one_line(error)}") from None
    progress(size - done)
    reading.on_end(rows)


def _text(reading: _Reading, value: Any) -> str:
    key = repr(reading.text_key)
    if not isinstance(value, str):
        raise _NotText(
            f"{key} contains {_type(value)}, not text; fix or remove it, or choose another with --text-key"
        )
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:  # JSON can spell "\ud800", which no tokenizer accepts
        raise _NotText(f"{key} contains a lone surrogate, which is not text; fix or remove it") from None
    return value


def _type(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "none"
