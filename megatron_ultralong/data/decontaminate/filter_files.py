"""Files of documents read as batches and written again, with some documents replaced or left out and all else
byte for byte the same.

.jsonl and .txt (one document), also as .gz and .zst; .parquet, with all columns and the compression it had.
Conversations, in any of the forms that conversations.py reads, are written as .jsonl in its form `messages`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_ultralong.data import conversations, input_files
from megatron_ultralong.errors import UserError

KINDS = (".jsonl", ".txt", ".parquet")
BATCH = 1 << 21
"""Bytes of lines together in a batch; a line of more is one alone."""
_ROWS = 64  # rows of a .parquet read at a time
_GROUP = 1 << 26  # bytes of a row group that is written


@dataclass(frozen=True)
class Batch:
    """Some documents of a file, one after another."""

    path: str
    kind: str
    """One of KINDS, or messages."""
    first: int
    """Number of the first one's line or row, from 1."""
    items: list[Any]
    """bytes of each line (of the whole .txt), or the text of each row; a conversations.Refused for what is no
    conversation."""


def kind(path: Path) -> tuple[str, str]:
    """(kind, compression) by the file's name; UserError for others."""
    name = path.name.lower()
    compression = next((end for end in input_files.COMPRESSIONS if name.endswith(end)), "")
    found = next((end for end in KINDS if name.removesuffix(compression).endswith(end)), None)
    if found is None or (found == ".parquet" and compression):
        raise UserError(
            f"{path}: kind of file not known by its name; known are .txt and .jsonl, also as .gz or .zst, and .parquet"
        )
    return found, compression


def output_name(path: Path, form: str | None) -> str:
    """The name of the file that is written for one that is read."""
    if form is not None and path.suffix.lower() in (".json", ".parquet"):
        return path.with_suffix(".jsonl").name
    return path.name


def batches(
    path: Path, text_key: str, form: str | None, progress: Callable[[int], Any]
) -> Iterator[tuple[Batch, Any]]:
    """The file's batches, each with what `Writer.write` wants back. progress: called with the bytes of the
    file read since last time.

    form: of conversations (conversations.py); None = documents. text_key: of documents.
    """
    if form is not None:
        yield from _conversations(path, form, progress)
        return
    found, compression = kind(path)
    with input_files.readable(path), path.open("rb") as file:
        if found == ".parquet":
            yield from _rows(path, file, text_key, progress)
            return
        stream, done = input_files.decompressed(file, compression), 0
        items: list[bytes] = []
        first, size = 1, 0
        for line in [stream.read()] if found == ".txt" else stream:
            items.append(line)
            size += len(line)
            if size >= BATCH:
                progress(file.tell() - done)
                done = file.tell()
                yield Batch(str(path), found, first, items), None
                first, items, size = first + len(items), [], 0
        progress(file.tell() - done)
        if items:
            yield Batch(str(path), found, first, items), None


def _conversations(path: Path, form: str, progress: Callable[[int], Any]) -> Iterator[tuple[Batch, Any]]:
    items: list[Any] = []
    first, size = 1, 0
    for number, record in conversations.records(path, progress):
        if items and (
            size >= BATCH or number != first + len(items)
        ):  # a blank line between: items count on without a gap
            yield Batch(str(path), "messages", first, items), None
            items, size = [], 0
        first = first if items else number
        try:
            found = conversations.as_messages(record, form, f"{path.name}:{number}")
            # Not all that parquet can hold beside the messages has a form in JSON: such values are written as
            # text.
            items.append(
                json.dumps(found, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n"
            )
        except conversations.Refused as refused:
            items.append(refused)
        size += len(items[-1]) if isinstance(items[-1], bytes) else 100
    if items:
        yield Batch(str(path), "messages", first, items), None


def _rows(
    path: Path, file: BinaryIO, text_key: str, progress: Callable[[int], Any]
) -> Iterator[tuple[Batch, Any]]:
    import pyarrow.parquet

    with _parquet(path):
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_key!r} among {', '.join(table.schema_arrow.names[:8])}; choose one with --text-key"
            )
        size, rows, done, number = path.stat().st_size, table.metadata.num_rows, 0, 0
        for batch in table.iter_batches(batch_size=_ROWS):
            texts, begin, length = batch.column(text_key).to_pylist(), 0, 0
            for i, text in enumerate(texts, 1):
                length += len(text) if isinstance(text, str) else 0
                if length >= BATCH or i == len(texts):
                    yield (
                        Batch(str(path), ".parquet", number + begin + 1, texts[begin:i]),
                        batch.slice(begin, i - begin),
                    )
                    begin, length = i, 0
            number += batch.num_rows
            progress(size * number // rows - done)
            done = size * number // rows


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None


def writer(source: Path, target: Path, text_key: str, form: str | None) -> Lines | Table:
    """What writes `target` as a file of the kind and compression of `source`; as lines where that holds
    conversations."""
    if form is not None:
        return Lines(
            target, next((end for end in input_files.COMPRESSIONS if target.name.lower().endswith(end)), "")
        )
    found, compression = kind(source)
    return Table(source, target, text_key) if found == ".parquet" else Lines(target, compression)


class Lines:
    """Writes lines, or a .txt."""

    def __init__(self, target: Path, compression: str) -> None:
        self._file = target.open("wb")
        self._stream: Any = self._file
        if compression == ".gz":  # without name and time: the same bytes each time
            self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, mtime=0, compresslevel=6)
        elif compression == ".zst":
            self._stream = zstandard.ZstdCompressor().stream_writer(self._file, closefd=False)

    def write(self, batch: Batch, rest: Any, edits: dict[int, list[Any]]) -> None:
        """The batch, with item i replaced by those of edits[i]."""
        for i, line in enumerate(batch.items):
            for new in edits.get(i, (line,)):
                self._stream.write(new)

    def close(self) -> None:
        if self._stream is not self._file:
            self._stream.close()
        self._file.close()


class Table:
    """Writes rows of a .parquet."""

    def __init__(self, source: Path, target: Path, text_key: str) -> None:
        import pyarrow.parquet

        with input_files.readable(source), _parquet(source):
            metadata, self._schema = (
                pyarrow.parquet.read_metadata(source),
                pyarrow.parquet.read_schema(source),
            )
        self._text_key = text_key
        codec = metadata.row_group(0).column(0).compression if metadata.num_row_groups else "SNAPPY"
        self._writer = pyarrow.parquet.ParquetWriter(
            target, self._schema, compression="NONE" if codec == "UNCOMPRESSED" else codec
        )
        self._waiting: list[Any] = []
        self._size = 0

    def write(self, batch: Batch, rest: Any, edits: dict[int, list[Any]]) -> None:
        """The batch, with the text of row i replaced by those of edits[i], in as many rows."""
        import pyarrow

        if edits:
            rows, texts = [], []
            for i, text in enumerate(batch.items):
                new = edits.get(i, [text])
                rows += [i] * len(new)
                texts += new
            place = self._schema.get_field_index(self._text_key)
            rest = rest.take(pyarrow.array(rows, type=pyarrow.int64()))
            rest = rest.set_column(
                place, self._schema.field(place), pyarrow.array(texts, type=self._schema.field(place).type)
            )
        if rest.num_rows:
            self._waiting.append(rest)
            self._size += rest.nbytes
        if self._size >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._waiting:
            self._writer.write_table(pyarrow.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._size = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
