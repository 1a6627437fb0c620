"""The work of one process on a token cache: the documents of a unit to its files, or a file to its hash. The
files: token_cache.py."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents, input_files, megatron_index
from megatron_ultralong.data.documents import BrokenDocument, FileRange
from megatron_ultralong.data.special_tokens import SpecialTokenMode, load_backend, spelled_pattern
from megatron_ultralong.data.tokenizer import encode_all
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files

OK, EMPTY, BROKEN = 0, 1, 2
"""Status of a document."""
_ROW_GROUP = 1 << 16  # documents of a row group of a unit's table
_CORPUS_BLOCK = 4 << 20  # tokens of a Megatron corpus read at a time

Task = tuple[Literal["unit", "file"], int]
"""What one process does at a time, and the number of the unit or file."""


@dataclass(frozen=True, kw_only=True)
class CacheUnit:
    """Input that one process reads at a time."""

    source: int
    """The number of its source."""
    files: tuple[int, ...]
    """The number of each range's file, over all sources."""
    ranges: tuple[FileRange, ...]
    text_key: str
    id_key: str | None
    strip_id: int | None
    special_tokens: SpecialTokenMode


@dataclass(frozen=True, kw_only=True)
class BadDocuments:
    """What happens to documents that cannot be read, and to empty ones: skip = left out and counted; stop =
    UserError."""

    broken: Literal["skip", "stop"] = "skip"
    empty: Literal["skip", "stop"] = "skip"


@dataclass(frozen=True)
class TokeniseJob:
    """What all processes of a cache have in common."""

    folder: Path
    units: list[CacheUnit]
    files: list[Path]
    tokenizer: str
    """JSON of a tokenizers.Tokenizer; "" where no unit is left to do."""
    dtype: Any
    bad: BadDocuments


def worker(job: TokeniseJob, advance: Callable[[int], Any]) -> Callable[[Task], None]:
    """The function of a worker process. advance: called with bytes of input done."""
    backends = functools.cache(functools.partial(load_backend, job.tokenizer))

    def work(task: Task) -> None:
        kind, number = task
        if kind == "unit":
            _make_unit(job, number, backends, advance)
        else:
            path = content_file(job.files[number])
            values = {"path": str(path), "sha256": _sha256(path)}
            atomic_files.write_text(result_file(job.folder, task), json.dumps(values))

    return work


def content_file(path: Path) -> Path:
    """The file with an input's content: of a Megatron corpus, which is named by its index, the .bin."""
    return path.with_suffix(".bin") if path.suffix == ".idx" else path


def result_file(folder: Path, task: Task) -> Path:
    """The file that a task writes last."""
    kind, number = task
    return folder / (f"{number:06d}.json" if kind == "unit" else f"file-{number:06d}.json")


def no_counts() -> dict[str, Any]:
    """Counts of an input file or range, in the form of a unit's .json."""
    counts = dict.fromkeys(("lines", "documents", "empty", "broken", "tokens", "special_tokens"), 0)
    return {**counts, "first_broken": None}


def _make_unit(
    job: TokeniseJob,
    number: int,
    backends: Callable[[SpecialTokenMode], Any],
    advance: Callable[[int], Any],
) -> None:
    unit = job.units[number]
    with _DocumentTable(job.folder / f"{number:06d}.parquet", unit, job.bad) as table:
        if documents.kind(unit.ranges[0].path) == ".idx":
            totals = _scan_corpus(unit, table, advance)
        else:
            totals = _tokenise_unit(job, number, backends(unit.special_tokens), table, advance)
    atomic_files.sync(table.path)
    totals["sha256"] = [_sha256(content_file(r.path)) if r.end is None else None for r in unit.ranges]
    atomic_files.write_text(result_file(job.folder, ("unit", number)), json.dumps(totals | table.totals()))


def _sha256(path: Path) -> str:
    with input_files.opened(path) as file, input_files.readable(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenise_unit(
    job: TokeniseJob, number: int, backend: Any, table: _DocumentTable, advance: Callable[[int], Any]
) -> dict[str, Any]:
    unit, dtype, prefix = job.units[number], numpy.dtype(job.dtype), job.folder / f"{number:06d}"
    waiting: deque[_TableRow] = deque()
    """Documents read and not yet in the table, in order, broken ones included."""
    special = spelled_pattern(backend.get_added_tokens_decoder().values())

    def texts() -> Iterator[str]:
        for which, file_range in enumerate(unit.ranges):

            def on_broken(error: BrokenDocument, which: int = which) -> None:
                waiting.append(_TableRow(which, error.number, None, error.reason))

            def on_end(count: int, which: int = which) -> None:
                table.counts[which]["lines"] = count

            for document in documents.read(
                file_range, unit.text_key, unit.id_key, advance, on_broken, on_end
            ):
                waiting.append(_TableRow(which, document.number, document.id))
                table.counts[which]["special_tokens"] += len(special.findall(document.text))
                yield document.text

    partial = prefix.with_suffix(".bin.partial")
    with partial.open("wb") as file:
        begin = 0
        for ids in encode_all(texts(), backend):
            while waiting[0].reason:
                table.add(waiting.popleft(), 0, begin, b"")
            file.write(ids.astype(dtype).tobytes())
            table.largest = max(table.largest, int(ids.max(initial=0)))
            digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
            table.add(waiting.popleft(), len(ids), begin, digest)
            begin += len(ids)
        while waiting:
            table.add(waiting.popleft(), 0, begin, b"")
        file.flush()
        os.fsync(file.fileno())
    megatron_index.write_index(prefix.with_suffix(".idx"), dtype, table.lengths())
    partial.rename(prefix.with_suffix(".bin"))
    return {"bin": None, "dtype": dtype.name}


def _scan_corpus(unit: CacheUnit, table: _DocumentTable, advance: Callable[[int], Any]) -> dict[str, Any]:
    path = unit.ranges[0].path
    index = megatron_index.read_index(path)
    if index.dtype.kind not in "iu":
        raise UserError(f"{path} contains {index.dtype} numbers, not token ids")
    with path.with_suffix(".bin").open("rb", buffering=0) as file:
        begin = 0
        for number, length in enumerate(index.document_lengths().tolist(), 1):
            hasher, last = hashlib.blake2b(digest_size=16), -1
            for ids, ends in _blocks(file, index.dtype, length):
                if ids.min(initial=0) < 0:
                    raise UserError(f"{path}, document {number}: contains token id {ids.min()}")
                advance(ids.nbytes)
                last = int(ids[-1])
                table.largest = max(table.largest, int(ids.max()))
                kept = ids[:-1] if ends and last == unit.strip_id else ids
                hasher.update(kept.astype(numpy.int32).tobytes())
            tokens = length - (last == unit.strip_id and length > 0)
            table.add(_TableRow(0, number, None), tokens, begin, hasher.digest())
            if length:
                table.last_ids.add(last)
            begin += length
    return {"bin": str(path.with_suffix(".bin").resolve()), "dtype": index.dtype.name}


def _blocks(file: BinaryIO, dtype: numpy.dtype[Any], length: int) -> Iterator[tuple[NDArray[Any], bool]]:
    """The next `length` tokens in blocks, and whether each is the last."""
    for at in range(0, length, _CORPUS_BLOCK):
        block = numpy.empty(min(_CORPUS_BLOCK, length - at), dtype)
        read_into(file, block)
        yield block, at + len(block) == length


def read_into(file: BinaryIO, numbers: NDArray[Any]) -> None:
    """Fill an array from an unbuffered file. UserError where the file ends early."""
    view, done = memoryview(numbers.view(numpy.uint8)), 0  # type: ignore[arg-type]
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name} ended early; was it changed meanwhile?")
        done += count


@dataclass(frozen=True)
class _TableRow:
    """A document that is not yet in the table."""

    part: int
    """Which of the unit's ranges it is in."""
    number: int
    id: str | None
    reason: str = ""
    """Why it is broken."""


class _DocumentTable:
    """Writes a unit's .parquet, some documents at a time, and counts."""

    def __init__(self, path: Path, unit: CacheUnit, bad: BadDocuments) -> None:
        import pyarrow

        self.path, self.unit, self.bad = path, unit, bad
        self.schema = pyarrow.schema(
            [
                ("part", pyarrow.int32()),
                ("number", pyarrow.int64()),
                ("id", pyarrow.string()),
                ("status", pyarrow.int8()),
                ("reason", pyarrow.string()),
                ("tokens", pyarrow.int64()),
                ("begin", pyarrow.int64()),
                ("hash_low", pyarrow.uint64()),
                ("hash_high", pyarrow.uint64()),
            ]
        )
        self.largest = 0
        self.last_ids: set[int] = set()
        """Last tokens of a Megatron corpus's documents."""
        self.counts = [no_counts() for _ in unit.ranges]
        self._lengths: list[NDArray[numpy.int32]] = []
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> _DocumentTable:
        import pyarrow.parquet

        self._writer = pyarrow.parquet.ParquetWriter(self.path, self.schema)
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()
        self._writer.close()

    def add(self, row: _TableRow, tokens: int, begin: int, digest: bytes) -> None:
        """Add a document. begin: its first token in the .bin; digest: hash of its tokens."""
        status = BROKEN if row.reason else OK if tokens else EMPTY
        counts = self.counts[row.part]
        if status == BROKEN and not counts["first_broken"]:
            counts["first_broken"] = (row.number, row.reason)
            if self.bad.broken == "stop":
                raise self._error(row, row.reason)
        if status == EMPTY and self.bad.empty == "stop":
            raise self._error(row, "has no text; fill or remove it, or use --empty skip")
        if tokens >= 1 << 31:
            raise self._error(row, f"has {tokens} tokens, more than Megatron's index allows; split it")
        counts[("documents", "empty", "broken")[status]] += 1
        counts["tokens"] += tokens
        low, high = (
            (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))
            if status == OK
            else (0, 0)
        )
        self._rows.append(
            (row.part, row.number, row.id, status, row.reason or None, tokens, begin, low, high)
        )
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _error(self, row: _TableRow, what: str) -> UserError:
        return UserError(f"{documents.location(self.unit.ranges[row.part], row.number)}: {what}")

    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each document that has some."""
        self._flush()
        return numpy.concatenate(self._lengths) if self._lengths else numpy.empty(0, numpy.int32)

    def totals(self) -> dict[str, Any]:
        """The counts of a unit's .json."""
        return {
            "parts": self.counts,
            "largest": self.largest,
            "last_id": next(iter(self.last_ids)) if len(self.last_ids) == 1 else None,
        }

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        arrays = [
            pyarrow.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)
        ]
        self._writer.write_table(pyarrow.table(arrays, schema=self.schema))
        tokens = numpy.array(columns[5], dtype=numpy.int32)
        self._lengths.append(tokens[tokens > 0])
        self._rows = []
