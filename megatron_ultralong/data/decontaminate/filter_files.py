"""Files of documents read in batches and rewritten with some documents replaced or left out; everything else
is copied unchanged, byte for byte.

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
from typing import IO, Any, BinaryIO

from megatron_ultralong.data import conversations, input_files
from megatron_ultralong.errors import UserError

KINDS = (".jsonl", ".txt", ".parquet")
BATCH_BYTES = 1 << 21
"""A batch is complete when it reaches this size; a longer line is a separate batch."""
_ROWS = 64
"""Rows of a .parquet read at a time."""
_ROW_GROUP_BYTES = 1 << 26
"""Size of the row groups that are written."""


@dataclass(frozen=True)
class DocumentBatch:
    """Some consecutive documents of a file."""

    path: str
    kind: str
    """One of KINDS, or messages."""
    first: int
    """Number of the first one's line or row, from 1."""
    items: list[Any]
    """The bytes of each line (of the complete .txt), or the text of each row; a conversations.Refused for a
    record that is no conversation."""


def kind_of(path: Path) -> tuple[str, str]:
    """Return (kind, compression) by the file's name. UserError for unknown kinds."""
    compression = input_files.compression(path)
    name = path.name.lower().removesuffix(compression)
    kind = next((end for end in KINDS if name.endswith(end)), None)
    if kind is None or (kind == ".parquet" and compression):
        raise UserError(
            f"{path}: unknown kind of file; known are .txt and .jsonl, also as .gz or .zst, and .parquet"
        )
    return kind, compression


def output_name(path: Path, form: str | None) -> str:
    """Return the name of the file that is written for the input `path`."""
    if form is not None and path.suffix.lower() in (".json", ".parquet"):
        return path.with_suffix(".jsonl").name
    return path.name


# ---- reading -----------------------------------------------------------------------------------


def read_batches(
    path: Path, text_key: str, form: str | None, progress: Callable[[int], Any]
) -> Iterator[tuple[DocumentBatch, Any]]:
    """Yield the file's batches, each with the `rows` argument of the writer's `write`.

    form: of conversations (conversations.py); None = documents, with their text under `text_key`. progress:
    called with the bytes of the file read since the last call.
    """
    if form is not None:
        yield from _read_conversations(path, form, progress)
        return
    kind, compression = kind_of(path)
    with input_files.readable(path), path.open("rb") as file:
        if kind == ".parquet":
            yield from _read_rows(path, file, text_key, progress)
            return
        stream, done = input_files.decompressed(file, compression), 0
        items: list[bytes] = []
        first, size = 1, 0
        for line in [stream.read()] if kind == ".txt" else stream:
            items.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                progress(file.tell() - done)
                done = file.tell()
                yield DocumentBatch(str(path), kind, first, items), None
                first, items, size = first + len(items), [], 0
        progress(file.tell() - done)
        if items:
            yield DocumentBatch(str(path), kind, first, items), None


def _read_conversations(
    path: Path, form: str, progress: Callable[[int], Any]
) -> Iterator[tuple[DocumentBatch, Any]]:
    items: list[Any] = []
    first, size = 1, 0
    for number, record in conversations.records(path, progress):
        # A batch also ends at a blank line: the line numbers of its items have no gaps.
        if items and (size >= BATCH_BYTES or number != first + len(items)):
            yield DocumentBatch(str(path), "messages", first, items), None
            items, size = [], 0
        first = first if items else number
        try:
            messages = conversations.as_messages(record, form, f"{path.name}:{number}")
            # Parquet columns next to the messages may have no form in JSON: such values are written as text.
            line = json.dumps(messages, ensure_ascii=False, default=str)
            items.append(line.encode(errors="backslashreplace") + b"\n")
        except conversations.Refused as refused:
            items.append(refused)
        size += len(items[-1]) if isinstance(items[-1], bytes) else 100
    if items:
        yield DocumentBatch(str(path), "messages", first, items), None


def _read_rows(
    path: Path, file: BinaryIO, text_key: str, progress: Callable[[int], Any]
) -> Iterator[tuple[DocumentBatch, Any]]:
    import pyarrow.parquet

    with _parquet_errors(path):
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_key!r} among {', '.join(table.schema_arrow.names[:8])}; choose one with --text-key"
            )
        size, total, done, number = path.stat().st_size, table.metadata.num_rows, 0, 0
        for rows in table.iter_batches(batch_size=_ROWS):
            texts, begin, length = rows.column(text_key).to_pylist(), 0, 0
            for i, text in enumerate(texts, 1):
                length += len(text) if isinstance(text, str) else 0
                if length >= BATCH_BYTES or i == len(texts):
                    batch = DocumentBatch(str(path), ".parquet", number + begin + 1, texts[begin:i])
                    yield batch, rows.slice(begin, i - begin)
                    begin, length = i, 0
            number += rows.num_rows
            progress(size * number // total - done)
            done = size * number // total


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None


# ---- writing -----------------------------------------------------------------------------------


def open_writer(
    source: Path, file: IO[bytes], text_key: str, form: str | None
) -> LineFileWriter | ParquetFileWriter:
    """Return a writer to `file` in the format and compression of `source`; for conversations, a writer of
    lines."""
    if form is None and kind_of(source)[0] == ".parquet":
        return ParquetFileWriter(source, file, text_key)
    return LineFileWriter(file, input_files.compression(Path(output_name(source, form))))


class LineFileWriter:
    """Writes lines, or a .txt."""

    def __init__(self, file: IO[bytes], compression: str) -> None:
        self._file = file
        self._stream: Any = file
        if compression == ".gz":  # without name and time: the same bytes each time
            self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6)
        elif compression == ".zst":
            import zstandard

            self._stream = zstandard.ZstdCompressor().stream_writer(file, closefd=False)

    def write(self, batch: DocumentBatch, rows: None, edits: dict[int, list[Any]]) -> None:
        """Write the batch, with item i replaced by those of edits[i]."""
        for i, line in enumerate(batch.items):
            for new in edits.get(i, (line,)):
                self._stream.write(new)

    def close(self) -> None:
        """End the compressed stream; the file stays open."""
        if self._stream is not self._file:
            self._stream.close()


class ParquetFileWriter:
    """Writes the rows of a .parquet."""

    def __init__(self, source: Path, file: IO[bytes], text_key: str) -> None:
        import pyarrow.parquet

        with input_files.readable(source), _parquet_errors(source):
            metadata = pyarrow.parquet.read_metadata(source)
            self._schema = pyarrow.parquet.read_schema(source)
        self._text_key = text_key
        codec = metadata.row_group(0).column(0).compression if metadata.num_row_groups else "SNAPPY"
        self._writer = pyarrow.parquet.ParquetWriter(
            file, self._schema, compression="NONE" if codec == "UNCOMPRESSED" else codec
        )
        self._waiting: list[Any] = []
        self._size = 0

    def write(self, batch: DocumentBatch, rows: Any, edits: dict[int, list[Any]]) -> None:
        """Write the batch, whose rows are `rows`, with row i repeated for each of the texts of edits[i]."""
        import pyarrow

        if edits:
            numbers, texts = [], []
            for i, text in enumerate(batch.items):
                new = edits.get(i, [text])
                numbers += [i] * len(new)
                texts += new
            column = self._schema.get_field_index(self._text_key)
            field = self._schema.field(column)
            rows = rows.take(pyarrow.array(numbers, type=pyarrow.int64()))
            rows = rows.set_column(column, field, pyarrow.array(texts, type=field.type))
        if rows.num_rows:
            self._waiting.append(rows)
            self._size += rows.nbytes
        if self._size >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        import pyarrow

        if self._waiting:
            self._writer.write_table(pyarrow.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._size = [], 0

    def close(self) -> None:
        self._write_row_group()
        self._writer.close()
