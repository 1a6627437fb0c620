"""What every benchmark's reader gives, and what it reads with: jsonl (plain, .gz, in a .zip), json, csv and
parquet.

Whatever a file lacks ends in one line that names the file, the line or row, and the field.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example of a benchmark, as its official files have it: nothing is rendered, shortened or
    normalised."""

    benchmark: str
    """Its name in `files.BENCHMARKS`."""
    task: str
    """The subject, set or task of the benchmark that it belongs to."""
    split: str
    """test, dev, validation or train."""
    id: str
    """The official id where there is one, else the number of the example, from 0, in its task and split."""
    question: str
    context: str = ""
    """The long text that the question is about, where the files keep the two apart (RULER's are taken apart:
    see ruler.py)."""
    answers: tuple[str, ...] = ()
    """Official answers: any of them is right, unless the reader of the benchmark says otherwise. Letters
    where choices are lettered."""
    choices: tuple[str, ...] = ()
    """Texts of the choices, A first."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further official fields, as read."""
    place: str = ""
    """Where it stands, for messages: file, and line or row."""


@dataclass(frozen=True)
class Record:
    """A line, row or file as read, and where it stands."""

    data: dict[str, Any]
    place: str

    def get(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """A field that must be there and of that kind, else UserError."""
        if name not in self.data:
            raise UserError(
                f"{self.place}: no field {name!r} among {', '.join(map(str, self.data)) or 'none'}; is this the official file?"
            )
        value = self.data[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{self.place}: field {name!r} holds {type(value).__name__}, not {wanted}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that holds a string, a number, or a list of those: as strings."""
        value = self.get(name, (str, int, float, list))
        values = value if isinstance(value, list) else [value]
        for item in values:
            if not isinstance(item, str | int | float):
                raise UserError(
                    f"{self.place}: field {name!r} holds {type(item).__name__} in its list, not text"
                )
        return tuple(map(str, values))

    def rest(self, *used: str) -> dict[str, Any]:
        """All fields but those."""
        return {name: value for name, value in self.data.items() if name not in used}


def letter(record: Record, name: str, choices: int) -> str:
    """A field that holds a choice, as its letter or its number from 0: the letter. UserError where there is
    no such choice."""
    value = record.get(name, (str, int))
    index = value if isinstance(value, int) else ord(value) - ord("A") if len(value) == 1 else -1
    if not 0 <= index < choices:
        raise UserError(f"{record.place}: field {name!r} holds {value!r}, not one of {choices} choices")
    return chr(ord("A") + index)


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a .jsonl file, plain or .gz; empty lines are passed over."""
    with readable(path), _opened(path) as stream:
        yield from _lines(stream, str(path))


def read_zip(path: Path, ends: str = ".jsonl") -> Iterator[tuple[str, Iterator[Record]]]:
    """(member's name, its objects) of each .jsonl file in a .zip, in the order of their names; each to be
    read before the next."""
    with readable(path), zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(ends) and not name.startswith("__MACOSX"):
                with archive.open(name) as stream:
                    yield name, _lines(stream, f"{path} ({name})")  # type: ignore[arg-type]


def _lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        place = f"{name}, line {number}"
        try:
            data = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise UserError(f"{place}: a JSON object is needed, not {type(data).__name__}")
        yield Record(data, place)


def read_json(path: Path) -> Record:
    """A file that holds one JSON object."""
    with readable(path):
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON object is needed, not {type(data).__name__}")
    return Record(data, str(path))


def read_csv(path: Path, names: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a .csv file without a header; UserError unless each has as many columns as `names`."""
    with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if len(row) != len(names):
                raise UserError(
                    f"{place}: {len(row)} columns, not the {len(names)} of {', '.join(names)}; is this the official file?"
                )
            yield Record(dict(zip(names, row)), place)


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    with readable(path):
        try:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}")
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}") from None


def read_any(path: Path) -> Iterator[Record]:
    """Rows of a .parquet, or lines of a .jsonl file."""
    return read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading `path` can raise into a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
