"""What one process does of a folder of tokenised documents: a unit of the inputs to its files, or a file to
its hash. Files: token_cache.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents, megatron_index
from megatron_ultralong.data.documents import BrokenDocument, Part
from megatron_ultralong.data.pretrain import tokenise
from megatron_ultralong.errors import UserError

OK, EMPTY, BROKEN = 0, 1, 2
"""Status of a document."""
_GROUP = 1 << 16  # documents of a row group of a unit's table
_CORPUS_BLOCK = 4 << 20  # tokens of a Megatron corpus read at a time

Advance = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one process reads in one go."""

    source: int
    """Which of the sources it belongs to."""
    files: tuple[int, ...]
    """Number of the file of each part, over all sources."""
    parts: tuple[Part, ...]
    text_key: str
    id_key: str | None
    strip_id: int | None


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """What stops the work instead of being counted and left out."""

    broken: Literal["skip", "stop"] = "skip"
    empty: Literal["skip", "stop"] = "skip"


def data(path: Path) -> Path:
    """The file with an input's content: of a Megatron corpus, named by its index, the .bin."""
    return path.with_suffix(".bin") if path.suffix == ".idx" else path


def done(folder: Path, kind: str, number: int) -> Path:
    return folder / (f"{number:06d}.json" if kind == "unit" else f"file-{number:06d}.json")


@lru_cache(maxsize=1)
def _backend(text: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text)


def worker(*shared: Any) -> Callable[[tuple[str, int]], None]:
    """What a worker process does of each (kind, number): `work` with what all of them share."""
    *first, advance = shared
    return lambda task: work(*first, task[0], task[1], advance)


def work(
    folder: Path,
    units: list[Unit],
    files: list[Path],
    tokenizer: str,
    dtype: Any,
    strictness: Strictness,
    kind: str,
    number: int,
    advance: Advance,
) -> None:
    if kind == "file":
        path = data(files[number])
        write(done(folder, "file", number), {"path": str(path), "sha256": _sha256(path)})
        return
    unit = units[number]
    with _Table(folder / f"{number:06d}.parquet", unit, strictness) as table:
        if documents.kind(unit.parts[0].path)[0] == ".idx":
            totals = _scan_corpus(unit, table, advance)
        else:
            totals = _tokenise_unit(
                folder / f"{number:06d}", unit, _backend(tokenizer), dtype, table, advance
            )
    megatron_index.sync(table.path)
    totals["sha256"] = [_sha256(data(part.path)) if part.end is None else None for part in unit.parts]
    write(done(folder, "unit", number), totals | table.totals())


def _sha256(path: Path) -> str:
    with documents.readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_counts() -> dict[str, Any]:
    return {"lines": 0, "documents": 0, "empty": 0, "broken": 0, "tokens": 0, "first_broken": None}


def _tokenise_unit(
    prefix: Path, unit: Unit, backend: Any, dtype: Any, table: _Table, advance: Advance
) -> dict[str, Any]:
    waiting: deque[_Row] = deque()
    """Documents read and not yet encoded, in order; broken ones among them."""

    def texts() -> Iterator[Iterator[str]]:
        for which, part in enumerate(unit.parts):

            def on_broken(error: BrokenDocument, which: int = which) -> None:
                waiting.append(_Row(which, error.number, None, error.reason))

            def on_end(count: int, which: int = which) -> None:
                table.parts[which]["lines"] = count

            for document in documents.read(part, unit.text_key, unit.id_key, advance, on_broken, on_end):
                row = _Row(which, document.number, document.id)
                waiting.append(row)
                yield _guarded(document.pieces, row)

    partial = prefix.with_suffix(".bin.partial")
    with partial.open("wb") as file:
        hasher, begin = hashlib.blake2b(digest_size=16), 0
        for ids, ends in tokenise.tokenise(texts(), backend):
            file.write(ids.astype(dtype).tobytes())
            hasher.update(ids.tobytes())
            table.largest = max(table.largest, int(ids.max(initial=0)))
            if not ends:
                continue
            while waiting[0].encoded_apart:
                table.add(waiting.popleft(), 0, begin, b"")
            row, at = waiting.popleft(), file.tell() // numpy.dtype(dtype).itemsize
            if row.reason:  # found broken after some of it was written
                file.seek(begin * numpy.dtype(dtype).itemsize)
                file.truncate()
                at = begin
            table.add(row, at - begin, begin, hasher.digest())
            hasher, begin = hashlib.blake2b(digest_size=16), at
        while waiting:
            table.add(waiting.popleft(), 0, begin, b"")
        file.flush()
        os.fsync(file.fileno())
    megatron_index.write_index(prefix.with_suffix(".idx"), dtype, table.lengths())
    partial.rename(prefix.with_suffix(".bin"))
    return {"bin": None, "dtype": numpy.dtype(dtype).name}


def _scan_corpus(unit: Unit, table: _Table, advance: Advance) -> dict[str, Any]:
    path = unit.parts[0].path
    index = megatron_index.read_index(path)
    if index.dtype.kind not in "iu":
        raise UserError(f"{path}: holds {index.dtype}, not token ids")
    lengths = index.document_lengths()
    with path.with_suffix(".bin").open("rb", buffering=0) as file:
        begin = 0
        for number, length in enumerate(lengths.tolist(), 1):
            hasher, last = hashlib.blake2b(digest_size=16), -1
            for ids, ends in _blocks(file, index.dtype, length):
                if ids.min(initial=0) < 0:
                    raise UserError(f"{path}, document {number}: holds token id {ids.min()}")
                advance(ids.nbytes)
                last = int(ids[-1])
                table.largest = max(table.largest, int(ids.max()))
                hasher.update(
                    (ids[:-1] if ends and last == unit.strip_id else ids).astype(numpy.int32).tobytes()
                )
            table.add(
                _Row(0, number, None), length - (last == unit.strip_id and length > 0), begin, hasher.digest()
            )
            if length:
                table.last_ids.add(last)
            begin += length
    return {"bin": str(path.with_suffix(".bin").resolve()), "dtype": index.dtype.name}


def _blocks(file: BinaryIO, dtype: numpy.dtype[Any], length: int) -> Iterator[tuple[NDArray[Any], bool]]:
    for at in range(0, length, _CORPUS_BLOCK):
        count = min(_CORPUS_BLOCK, length - at)
        yield numpy.frombuffer(read_exactly(file, count * dtype.itemsize), dtype), at + count == length


def read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise UserError(f"{file.name}: ended early; was it changed meanwhile?")
        data += more
    return data


@dataclass
class _Row:
    """A document on its way into the table."""

    part: int
    number: int
    id: str | None
    reason: str = ""
    started: bool = False
    """Whether the tokenizer was given it."""

    @property
    def encoded_apart(self) -> bool:
        return bool(self.reason) and not self.started


def _guarded(pieces: Any, row: _Row) -> Iterator[str]:
    """The pieces, which end early where the document turns out broken."""
    row.started = True
    try:
        yield from pieces
    except BrokenDocument as broken:
        row.reason = broken.reason


class _Table:
    """Writes a unit's .parquet, some documents at a time, and counts."""

    def __init__(self, path: Path, unit: Unit, strictness: Strictness) -> None:
        import pyarrow

        self.path, self.unit, self.strictness = path, unit, strictness
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
        self.parts = [no_counts() for _ in unit.parts]
        self._lengths: list[NDArray[numpy.int32]] = []
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> _Table:
        import pyarrow.parquet

        self._writer = pyarrow.parquet.ParquetWriter(self.path, self.schema)
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()
        self._writer.close()

    def add(self, row: _Row, tokens: int, begin: int, digest: bytes) -> None:
        status = BROKEN if row.reason else OK if tokens else EMPTY
        counts = self.parts[row.part]
        if status == BROKEN and not counts["first_broken"]:
            counts["first_broken"] = (row.number, row.reason)
            if self.strictness.broken == "stop":
                raise UserError(f"{documents.place(self.unit.parts[row.part], row.number)}: {row.reason}")
        if status == EMPTY and self.strictness.empty == "stop":
            raise UserError(
                f"{documents.place(self.unit.parts[row.part], row.number)}: has no text; fill or remove it, or use --empty skip"
            )
        if tokens >= 1 << 31:
            raise UserError(
                f"{documents.place(self.unit.parts[row.part], row.number)}: has {tokens} tokens, more than Megatron's index can say; cut it"
            )
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
        if len(self._rows) >= _GROUP:
            self._flush()

    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each document that has some."""
        self._flush()
        return numpy.concatenate(self._lengths) if self._lengths else numpy.empty(0, numpy.int32)

    def totals(self) -> dict[str, Any]:
        return {
            "parts": self.parts,
            "largest": self.largest,
            "last_id": next(iter(self.last_ids)) if len(self.last_ids) == 1 else None,
        }

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        self._writer.write_table(
            pyarrow.table(
                [
                    pyarrow.array(values, field.type)
                    for values, field in zip(columns, self.schema, strict=True)
                ],
                schema=self.schema,
            )
        )
        tokens = numpy.array(columns[5], dtype=numpy.int32)
        self._lengths.append(tokens[tokens > 0])
        self._rows = []


def write(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    megatron_index.sync(partial)
    partial.rename(path)
