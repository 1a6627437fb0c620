"""Raw documents as streams: .txt (one document a file), .jsonl (one a line), both also as .gz and .zst; .parquet (one a row).

Whatever is wrong with a file ends in one line that names the file and the line or row.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_ultralong.config import UserError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
PIECE = 1 << 20
"""Bytes of a .txt file read at a time."""
_LARGEST_WINDOW = 1 << 31  # bytes a zstd decoder may look back: what `zstd --long=31` writes


@dataclass(frozen=True)
class Document:
    """One document, to be read before the next is asked for."""

    place: str
    """Where it stands, for messages: file, and line or row."""
    pieces: Iterable[str]
    """Its text, in pieces that join without anything between."""


def check(paths: Iterable[Path]) -> int:
    """Total size of the files, bytes. UserError for the first that is missing, not a file, unreadable or of no known kind."""
    total = 0
    for path in paths:
        _kind(path)
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it, like {path}/*.jsonl")
        with _opened(path) as file:
            total += os.fstat(file.fileno()).st_size
    return total


def read(path: Path, text_key: str = "text", progress: Callable[[int], Any] = lambda n: None) -> Iterator[Document]:
    """The documents of one file, in order. `text_key`: field of a .jsonl line or column of a .parquet file that holds the text.

    progress: called with the number of bytes of the file read since the last call. Memory: one document of .jsonl, some rows of
    .parquet, one piece of .txt. UserError where the file cannot be read or a document is not text.
    """
    kind, compression = _kind(path)
    with _opened(path) as file:
        done = 0

        def advance() -> None:
            nonlocal done
            at = file.tell()
            progress(at - done)
            done = at

        if kind == ".parquet":
            yield from _parquet(path, file, text_key, progress)
            return
        with readable(path):
            stream = _decompressed(file, compression)
            for document in _txt(path, stream, advance) if kind == ".txt" else _jsonl(path, stream, text_key):
                yield document
                advance()
            advance()


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl file (also .gz, .zst) that are not blank, each with its number, from 1. UserError where it cannot be read."""
    kind, compression = _kind(path)
    if kind != ".jsonl":
        raise UserError(f"{path}: a .jsonl file is needed here, also as .gz or .zst")
    with _opened(path) as file, readable(path):
        for number, line in enumerate(_decompressed(file, compression), 1):
            if not line.isspace():
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _txt(path: Path, stream: BinaryIO, advance: Callable[[], None]) -> Iterator[Document]:
    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with readable(path):
            while block := stream.read(PIECE):
                yield decoder.decode(block)
                advance()
            yield decoder.decode(b"", True)

    yield Document(str(path), pieces())


def _jsonl(path: Path, stream: BinaryIO, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: a JSON object is needed, like {{\"{text_key}\": \"...\"}}")
        if text_key not in record:
            raise UserError(f"{place}: no key {text_key!r} among {_listed(record)}; choose one with --text-key")
        yield Document(place, (_text(record[text_key], place, text_key),))


def _parquet(path: Path, file: BinaryIO, text_key: str, progress: Callable[[int], Any]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    size, done, number = os.fstat(file.fileno()).st_size, 0, 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            names = _listed(table.schema_arrow.names)
            raise UserError(f"{path}: no column {text_key!r} among {names}; choose one with --text-key")
        rows = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=64, columns=[text_key]):
            for value in batch.column(0):
                number += 1
                place = f"{path}, row {number}"
                yield Document(place, (_text(value.as_py(), place, text_key),))
            progress(size * number // rows - done)
            done = size * number // rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {_one_line(error)}") from None
    progress(size - done)


def _text(value: Any, place: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {text_key!r} holds {type(value).__name__ if value is not None else 'nothing'}, not text; "
                        "mend or remove it, or choose another with --text-key")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:  # JSON can say "\ud800", which no tokenizer takes
        raise UserError(f"{place}: {text_key!r} holds half of a surrogate pair, which is not text; mend or remove it") from None
    return value


# ---- files -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading `path` can raise into a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}") from None


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a .zst file. (zstandard's own stream reader takes a file that was cut short for a whole one.)"""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        """The frame being decoded; None between frames."""
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._input or self._file.read(1 << 16)
            if not block:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._decoder.decompressobj()
            self._output = memoryview(self._frame.decompress(block))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _kind(path: Path) -> tuple[str, str]:
    """(kind, compression) by the end of the file's name."""
    name = path.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    kind = next((end for end in KINDS if name.removesuffix(compression).endswith(end)), None)
    if kind is None or (kind == ".parquet" and compression):
        known = ", ".join([*KINDS, *(kind + end for end in COMPRESSIONS for kind in KINDS[:2])])
        raise UserError(f"{path}: kind of file not known by its name; known are {known}")
    return kind, compression


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if compression == ".zst":
        return io.BufferedReader(_Zstd(file), 1 << 20)  # type: ignore[return-value]
    return file


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "none"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
