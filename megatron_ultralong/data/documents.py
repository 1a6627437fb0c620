"""Raw documents as streams: .txt (one document a file), .jsonl (one a line), both also as .gz and .zst;
.parquet (one a row). A Megatron corpus, .bin/.idx, is a kind too, but holds tokens: token_cache.py reads it.

Whatever is wrong with a document is one line that names the file and the line or row; what is wrong with a
file stops.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_ultralong.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet", ".idx")
COMPRESSIONS = (".gz", ".zst")
REPORTS = ("report.json", "matches.jsonl", "broken.jsonl")
"""What decontamination writes beside its output: they quote what was taken out."""
PIECE = 1 << 20
"""Bytes of a .txt file read at a time."""
_LARGEST_WINDOW = 1 << 31  # bytes a zstd decoder may look back: what `zstd --long=31` writes


class BrokenDocument(UserError):
    """One document that cannot be used, in a file whose others may be."""

    def __init__(self, part: Part, number: int, reason: str) -> None:
        self.part, self.number, self.reason = part, number, printable(reason)
        super().__init__()

    def __str__(
        self,
    ) -> str:  # made when it is asked for: to find the line in the file may mean reading all before it
        return f"{place(self.part, self.number)}: {self.reason}"


@dataclass(frozen=True)
class Part:
    """A file or a range of it, read as one."""

    path: Path
    begin: int = 0
    """First byte of a .jsonl (lines that begin from there on), first row group of a .parquet."""
    end: int | None = None
    """As begin, exclusive; None = to the end of the file."""


@dataclass(frozen=True)
class Document:
    """One document, to be read before the next is asked for."""

    number: int
    """Its line or row within the part, from 1 on; of a .parquet within the file."""
    pieces: Iterable[str]
    """Its text, in pieces that join without anything between. BrokenDocument while they are read where it is
    no text."""
    id: str | None = None


def kind(path: Path) -> tuple[str, str]:
    """(kind, compression) by the end of the file's name; UserError where it is none of the known."""
    name = path.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    found = next((end for end in KINDS if name.removesuffix(compression).endswith(end)), None)
    if found is None or (found in (".parquet", ".idx") and compression):
        known = ", ".join([*KINDS, *(kind + end for end in COMPRESSIONS for kind in KINDS[:2])])
        raise UserError(f"{path}: kind of file not known by its name; known are {known}")
    return found, compression


def check(paths: Iterable[Path]) -> int:
    """Total size of the files, bytes. UserError for the first that is missing, not a file, unreadable or of
    no known kind."""
    total = 0
    for path in paths:
        kind(path)
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it, like {path}/*.jsonl")
        with opened(path) as file:
            total += os.fstat(file.fileno()).st_size
    return total


def below(folder: Path) -> list[Path]:
    """All files below a folder, links followed, sorted; but hidden ones and decontamination's reports."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = (
            [] if os.path.realpath(place) in seen else [name for name in folders if not name.startswith(".")]
        )
        seen.add(os.path.realpath(place))
        reports = REPORTS if Path(place, ".decontaminate").is_dir() else ()
        found += [Path(place, name) for name in names if not name.startswith(".") and name not in reports]
    return sorted(set(found))


def split(path: Path, size: int) -> list[Part]:
    """The file in parts of about `size` bytes that can be read apart; compressed files and .txt are one.
    Their order is the file's."""
    found, compression = kind(path)
    with opened(path) as file:
        total = os.fstat(file.fileno()).st_size
        if total <= size or compression or found == ".txt":
            return [Part(path)]
        if found == ".jsonl":
            borders = [*range(0, total, size), total]
        else:
            import pyarrow
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.ParquetFile(file).metadata
            except pyarrow.ArrowException as error:
                raise UserError(f"{path}: cannot be read as parquet: {_one_line(error)}") from None
            borders, filled = [0], 0
            for group in range(table.num_row_groups):
                filled += table.row_group(group).total_byte_size
                if filled >= size or group == table.num_row_groups - 1:
                    borders.append(group + 1)
                    filled = 0
    return [Part(path, begin, end) for begin, end in itertools.pairwise(borders)]


def read(
    part: Part,
    text_key: str = "text",
    id_key: str | None = None,
    progress: Callable[[int], Any] = lambda n: None,
    on_broken: Callable[[BrokenDocument], Any] | None = None,
    on_end: Callable[[int], Any] = lambda n: None,
) -> Iterator[Document]:
    """The documents of one part of a file, in order. `text_key`, `id_key`: fields of a .jsonl line or columns
    of a .parquet file.

    progress: called with the number of bytes of the file read since the last call. on_broken: told of each
    document that is no text (None = it is raised). on_end: told the part's number of lines or rows. Memory:
    one document of .jsonl, some rows of .parquet, one piece of .txt. UserError where the file cannot be read.
    """
    found, compression = kind(part.path)
    with opened(part.path) as file:
        done = part.begin if found == ".jsonl" else 0

        def advance() -> None:
            nonlocal done
            at = file.tell()
            progress(at - done)
            done = at

        with readable(part.path):
            if found == ".parquet":
                yield from _parquet(part, file, text_key, id_key, progress, on_broken, on_end)
                return
            stream = decompressed(file, compression)
            documents = (
                _txt(part, stream, advance)
                if found == ".txt"
                else _jsonl(part, stream, text_key, id_key, on_broken, on_end)
            )
            for document in documents:
                yield document
                advance()
            advance()


def printable(text: str) -> str:
    """The text as UTF-8 can say it: of a lone half of a surrogate pair, its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def place(part: Part, number: int) -> str:
    """Where a document stands, for people: file, and line or row. Counts the lines before a part in the
    middle of a file."""
    found, _ = kind(part.path)
    if found == ".txt":
        return str(part.path)
    if found == ".jsonl" and part.begin:
        with part.path.open("rb") as file:
            # Lines that begin before the part: the first, and one behind each line end that is not the byte
            # just before it.
            number += 1 + sum(block.count(b"\n") for block in _blocks(file, part.begin - 1))
    return f"{part.path}, {'row' if found == '.parquet' else 'line'} {number}"


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, PIECE))):
        size -= len(block)
        yield block


def _txt(part: Part, stream: BinaryIO, advance: Callable[[], None]) -> Iterator[Document]:
    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with readable(part.path):
            try:
                while block := stream.read(PIECE):
                    yield decoder.decode(block)
                    advance()
                yield decoder.decode(b"", True)
            except UnicodeDecodeError as error:
                raise BrokenDocument(
                    part, 1, f"not UTF-8 text ({error.reason}); convert it to UTF-8"
                ) from None

    yield Document(1, pieces(), str(part.path))


def _jsonl(
    part: Part,
    stream: BinaryIO,
    text_key: str,
    id_key: str | None,
    on_broken: Callable[[BrokenDocument], Any] | None,
    on_end: Callable[[int], Any],
) -> Iterator[Document]:
    at = part.begin
    if part.begin:  # the line that is cut by the part's begin belongs to the part before
        stream.seek(part.begin - 1)
        at += len(stream.readline()) - 1
    number = 0
    while part.end is None or at < part.end:
        line = stream.readline()
        if not line:
            break
        at += len(line)
        number += 1
        if line.isspace():
            continue
        try:
            yield _record(
                part,
                number,
                line.removeprefix(b"\xef\xbb\xbf") if at == len(line) else line,
                text_key,
                id_key,
            )
        except BrokenDocument as broken:
            if on_broken is None:
                raise
            on_broken(broken)
    on_end(number)


def _record(part: Part, number: int, line: bytes, text_key: str, id_key: str | None) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise BrokenDocument(
            part, number, f"not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(part, number, f"not JSON ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise BrokenDocument(part, number, f'a JSON object is needed, like {{"{text_key}": "..."}}')
    if text_key not in record:
        raise BrokenDocument(
            part, number, f"no key {text_key!r} among {_listed(record)}; choose one with --text-key"
        )
    if id_key is not None and id_key not in record:
        raise BrokenDocument(
            part, number, f"no key {id_key!r} among {_listed(record)}; choose one with --id-key"
        )
    return Document(
        number,
        (_text(record[text_key], part, number, text_key),),
        None if id_key is None else printable(str(record[id_key])),
    )


def _parquet(
    part: Part,
    file: BinaryIO,
    text_key: str,
    id_key: str | None,
    progress: Callable[[int], Any],
    on_broken: Callable[[BrokenDocument], Any] | None,
    on_end: Callable[[int], Any],
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [text_key] if id_key is None else [text_key, id_key]
        for name, flag in zip(columns, ("--text-key", "--id-key"), strict=False):
            if name not in table.schema_arrow.names:
                raise UserError(
                    f"{part.path}: no column {name!r} among {_listed(table.schema_arrow.names)}; choose one with {flag}"
                )
        groups = range(table.metadata.num_row_groups)[part.begin : part.end]
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        share = len(groups) / max(table.metadata.num_row_groups, 1)
        size, done, first = int(os.fstat(file.fileno()).st_size * share), 0, number
        for batch in table.iter_batches(batch_size=64, columns=columns, row_groups=list(groups)):
            for value, name in zip(batch.column(text_key), batch.column(id_key or text_key), strict=True):
                number += 1
                try:
                    try:
                        found = value.as_py()
                    except UnicodeDecodeError as error:
                        raise BrokenDocument(
                            part,
                            number,
                            f"{text_key!r} is not UTF-8 text ({error.reason}); mend or remove it",
                        ) from None
                    text = _text(found, part, number, text_key)
                    yield Document(number, (text,), None if id_key is None else str(name.as_py()))
                except BrokenDocument as broken:
                    if on_broken is None:
                        raise
                    on_broken(broken)
            progress(size * (number - first) // rows - done)
            done = size * (number - first) // rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{part.path}: cannot be read as parquet: {_one_line(error)}") from None
    progress(size - done)
    on_end(rows)


def _text(value: Any, part: Part, number: int, text_key: str) -> str:
    if not isinstance(value, str):
        raise BrokenDocument(
            part,
            number,
            f"{text_key!r} holds {type(value).__name__ if value is not None else 'nothing'}, not text; "
            "mend or remove it, or choose another with --text-key",
        )
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:  # JSON can say "\ud800", which no tokenizer takes
        raise BrokenDocument(
            part, number, f"{text_key!r} holds half of a surrogate pair, which is not text; mend or remove it"
        ) from None
    return value


# ---- files -------------------------------------------------------------------------------------


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
    """Decompressed bytes of a .zst file. (zstandard's own stream reader takes a file that was cut short for a
    whole one.)"""

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


def opened(path: Path) -> BinaryIO:
    """The file, for reading; UserError where it cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    """The bytes of an open file whose name ends in `compression`, one of COMPRESSIONS or nothing."""
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
