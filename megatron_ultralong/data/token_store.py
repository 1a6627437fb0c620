"""A folder of tokenised documents, made by all cores, that an interrupted run goes on with.

The inputs are cut into units of 8 to 128 MiB, the same whatever the number of processes. Each unit leaves

    000012.bin, .idx     tokens of its documents: a Megatron corpus (not for a unit that is a Megatron corpus already)
    000012.parquet       a row a document: number (line or row), id, status, reason, tokens, begin (first token in the .bin), hash
    000012.json          totals; written last, so that a unit without it was not finished and is made again

and each file NNN of the inputs file-NNN.json with its SHA-256. plan.json says what the folder was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy
from numpy.typing import NDArray

from megatron_ultralong.config import UserError
from megatron_ultralong.data import documents, indexed, pool, tokenise
from megatron_ultralong.data.documents import BrokenDocument, Part
from megatron_ultralong.data.sources import Source
from megatron_ultralong.data.tokenise import Tokenizer

FORMAT = 1
UNITS = (8 << 20, 128 << 20)
"""Bytes of input of a unit: at least, and at most."""
_FEW = 256  # units that an input has before they get larger
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


@dataclass
class Store:
    """A whole folder. Arrays have one entry for each document with tokens, in the order of the inputs."""

    folder: Path
    units: list[Unit]
    totals: list[dict[str, Any]]
    """Of each unit, its NNN.json."""
    hashes: list[str]
    """SHA-256 of each input file."""
    lengths: NDArray[numpy.int64]
    begins: NDArray[numpy.int64]
    """First token of each document in the .bin of its unit."""
    unit_of: NDArray[numpy.int32]

    def bin(self, unit: int) -> tuple[Path, numpy.dtype[Any]]:
        """Where a unit's tokens lie, and as what numbers."""
        totals = self.totals[unit]
        return Path(totals["bin"]) if totals["bin"] else self.folder / f"{unit:06d}.bin", numpy.dtype(totals["dtype"])

    def counts_by_file(self) -> list[dict[str, Any]]:
        """Of each input file its lines or rows, documents, tokens, empty and broken ones, and the first of these."""
        found: list[dict[str, Any]] = [_no_counts() for _ in self.hashes]
        for unit, totals in zip(self.units, self.totals, strict=True):
            for part, number, counts in zip(unit.parts, unit.files, totals["parts"], strict=True):
                own = found[number]
                if counts["first_broken"] and not own["first_broken"]:
                    line, reason = counts["first_broken"]
                    before = own["lines"] if part.begin and documents.kind(part.path)[0] == ".jsonl" else 0
                    own["first_broken"] = f"{documents.place(Part(part.path), line + before)}: {reason}"
                for key in ("lines", "documents", "empty", "broken", "tokens"):
                    own[key] += counts[key]
        return found

    def column(self, *names: str, unit: int | None = None) -> list[Any]:
        """Columns of the units' tables (of one), over every document, broken and empty ones too, as numpy arrays."""
        import pyarrow
        import pyarrow.parquet

        which = range(len(self.units)) if unit is None else [unit]
        tables = [pyarrow.parquet.read_table(self.folder / f"{k:06d}.parquet", columns=list(names)) for k in which]
        return [pyarrow.chunked_array([chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type).to_numpy()
                for name in names]


def plan(sources: tuple[Source, ...]) -> list[Unit]:
    """The units of the sources' files, in order."""
    units: list[Unit] = []
    number = 0
    total = sum(data(path).stat().st_size for source in sources for path in source.files)
    most = min(max(total // _FEW, UNITS[0]), UNITS[1])
    for which, source in enumerate(sources):
        groups: list[list[tuple[int, Part]]] = []
        filled = most
        for path in source.files:
            corpus = documents.kind(path)[0] == ".idx"
            for part in [Part(path)] if corpus else documents.split(path, most):
                # Small files share a unit; a part of a large one is a unit of its own.
                size = most if corpus or part.end is not None else max(path.stat().st_size, 1)
                if filled + size > most:
                    groups.append([])
                    filled = 0
                groups[-1].append((number, part))
                filled += size
            number += 1
        units += [Unit(source=which, files=tuple(n for n, _ in group), parts=tuple(part for _, part in group), text_key=source.text_key,
                       id_key=source.id_key, strip_id=source.strip_id) for group in groups]
    return units


def data(path: Path) -> Path:
    """The file with an input's content: of a Megatron corpus, named by its index, the .bin."""
    return path.with_suffix(".bin") if path.suffix == ".idx" else path


def check_folder(folder: Path) -> None:
    """UserError where a user's folder for tokens holds something else: nothing of it may be removed."""
    if folder.is_dir() and any(path.name != "lock" for path in folder.iterdir()) and not (folder / "plan.json").is_file():
        raise UserError(f"--tokens-dir {folder}: holds other files; name a new folder, or one that an earlier run made")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone; UserError where another one works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is preparing data there; wait for it, or choose another place") from None
        yield


def make(folder: Path, sources: tuple[Source, ...], tokenizer: Tokenizer, *, strictness: Strictness, workers: int, keep: bool,
         advance: Advance = lambda n: None, note: Callable[[str], Any] = lambda text: None) -> Store:
    """The tokens of all sources in `folder`, where finished units of an earlier run are used again.

    advance: called with bytes of input done, those found done too. keep: the folder is the user's, and what it holds of other inputs is
    not thrown away but refused.
    """
    units = plan(sources)
    files = [path for source in sources for path in source.files]
    _claim(folder, _identity(files, units, tokenizer, strictness), keep, note)
    sizes = [data(path).stat().st_size for path in files]
    todo: list[tuple[str, int]] = []
    for kind, numbers in (("unit", range(len(units))), ("file", sorted(_apart(units)))):
        todo += [(kind, k) for k in numbers if not _done(folder, kind, k).exists()]
    unfinished = {number for kind, k in todo if kind == "unit" for number in units[k].files}
    advance(sum(size for number, size in enumerate(sizes) if number not in unfinished))
    shared = (folder, units, files, tokenizer.backend.to_str() if any(kind == "unit" for kind, _ in todo) else "",
              indexed.token_dtype(tokenizer.vocab_size), strictness)
    for _ in pool.spread(_task, todo, shared, workers, advance):
        pass
    return _open(folder, units, files, tokenizer)


def _identity(files: list[Path], units: list[Unit], tokenizer: Tokenizer, strictness: Strictness) -> dict[str, Any]:
    stats = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for one in files for path in {one, data(one)} for stat in [path.stat()]]
    stats.sort()
    return {"format": FORMAT, "files": [list(stat) for stat in stats], "tokenizer": tokenizer.sha256, "broken": strictness.broken,
            "empty": strictness.empty,
            "units": [[u.source, list(u.files), [[p.begin, p.end] for p in u.parts], u.text_key, u.id_key, u.strip_id] for u in units]}


def _claim(folder: Path, identity: dict[str, Any], keep: bool, note: Callable[[str], Any]) -> None:
    """Make the folder this identity's; what an unfinished unit left is removed."""
    path = folder / "plan.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except ValueError:
        found = {}
    if found is not None and found != identity:
        what = next(key for key in identity if found.get(key) != identity[key])
        if keep:
            raise UserError(f"{folder}: holds tokens made from others ({what} differ); name another folder, or remove it")
        note(f"tokens of an earlier run are made anew ({what} differ)")
    if found != identity:
        for old in folder.iterdir():
            if re.fullmatch(r"(\d{6}|file-\d{6}|plan)\.\w+(\.partial)?", old.name):
                old.unlink()
        _write(path, identity)
    for old in folder.glob("*.partial"):
        old.unlink()


def _apart(units: list[Unit]) -> set[int]:
    """Files that are read in several parts, and hashed apart."""
    return {number for unit in units for number, part in zip(unit.files, unit.parts, strict=True) if part.end is not None}


def _done(folder: Path, kind: str, number: int) -> Path:
    return folder / (f"{number:06d}.json" if kind == "unit" else f"file-{number:06d}.json")


def _open(folder: Path, units: list[Unit], files: list[Path], tokenizer: Tokenizer) -> Store:
    totals = [json.loads(_done(folder, "unit", k).read_text(encoding="utf-8")) for k in range(len(units))]
    for unit, told in enumerate(totals):
        if told["largest"] >= tokenizer.vocab_size:
            raise UserError(f"{units[unit].parts[0].path}: holds token id {told['largest']}, but the tokenizer has {tokenizer.vocab_size}: "
                            "it was made with another one")
    hashes = ["" for _ in files]
    for one, told in zip(units, totals, strict=True):
        for number, sha256 in zip(one.files, told["sha256"], strict=True):
            hashes[number] = sha256 or hashes[number]
    for number in _apart(units):
        hashes[number] = json.loads(_done(folder, "file", number).read_text(encoding="utf-8"))["sha256"]
    store = Store(folder, units, totals, hashes, *(numpy.empty(0, numpy.int64),) * 2, numpy.empty(0, numpy.int32))
    for path, counts in zip(files, store.counts_by_file(), strict=True):
        # Not one line of it: no damage, but the wrong key or kind of file.
        if counts["broken"] and not counts["documents"] + counts["empty"] and documents.kind(path)[0] != ".txt":
            raise UserError(counts["first_broken"])
    columns = [store.column("status", "tokens", "begin", unit=unit) for unit in range(len(units))]
    good = [status == OK for status, *_ in columns]
    store.lengths = numpy.concatenate([tokens[ok].astype(numpy.int64) for ok, (_, tokens, _) in zip(good, columns, strict=True)])
    store.begins = numpy.concatenate([begin[ok] for ok, (*_, begin) in zip(good, columns, strict=True)])
    store.unit_of = numpy.repeat(numpy.arange(len(units), dtype=numpy.int32), [int(ok.sum()) for ok in good])
    return store


# ---- what a process does -----------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def _backend(text: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text)


def _task(folder: Path, units: list[Unit], files: list[Path], tokenizer: str, dtype: Any, strictness: Strictness, kind: str, number: int,
          advance: Advance) -> None:
    if kind == "file":
        path = data(files[number])
        _write(_done(folder, "file", number), {"path": str(path), "sha256": _sha256(path)})
        return
    unit = units[number]
    with _Table(folder / f"{number:06d}.parquet", unit, strictness) as table:
        if documents.kind(unit.parts[0].path)[0] == ".idx":
            totals = _scan_corpus(unit, table, advance)
        else:
            totals = _tokenise_unit(folder / f"{number:06d}", unit, _backend(tokenizer), dtype, table, advance)
    indexed.sync(table.path)
    totals["sha256"] = [_sha256(data(part.path)) if part.end is None else None for part in unit.parts]
    _write(_done(folder, "unit", number), totals | table.totals())


def _sha256(path: Path) -> str:
    with documents.readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_counts() -> dict[str, Any]:
    return {"lines": 0, "documents": 0, "empty": 0, "broken": 0, "tokens": 0, "first_broken": None}


def _tokenise_unit(prefix: Path, unit: Unit, backend: Any, dtype: Any, table: _Table, advance: Advance) -> dict[str, Any]:
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
    indexed.write_index(prefix.with_suffix(".idx"), dtype, table.lengths())
    partial.rename(prefix.with_suffix(".bin"))
    return {"bin": None, "dtype": numpy.dtype(dtype).name}


def _scan_corpus(unit: Unit, table: _Table, advance: Advance) -> dict[str, Any]:
    path = unit.parts[0].path
    index = indexed.read_index(path)
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
                hasher.update((ids[:-1] if ends and last == unit.strip_id else ids).astype(numpy.int32).tobytes())
            table.add(_Row(0, number, None), length - (last == unit.strip_id and length > 0), begin, hasher.digest())
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
        self.schema = pyarrow.schema([
            ("part", pyarrow.int32()), ("number", pyarrow.int64()), ("id", pyarrow.string()), ("status", pyarrow.int8()),
            ("reason", pyarrow.string()), ("tokens", pyarrow.int64()), ("begin", pyarrow.int64()), ("hash_low", pyarrow.uint64()),
            ("hash_high", pyarrow.uint64())])
        self.largest = 0
        self.last_ids: set[int] = set()
        self.parts = [_no_counts() for _ in unit.parts]
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
            raise UserError(f"{documents.place(self.unit.parts[row.part], row.number)}: has no text; fill or remove it, or use --empty skip")
        if tokens >= 1 << 31:
            raise UserError(f"{documents.place(self.unit.parts[row.part], row.number)}: has {tokens} tokens, more than Megatron's index can say; cut it")
        counts[("documents", "empty", "broken")[status]] += 1
        counts["tokens"] += tokens
        low, high = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")) if status == OK else (0, 0)
        self._rows.append((row.part, row.number, row.id, status, row.reason or None, tokens, begin, low, high))
        if len(self._rows) >= _GROUP:
            self._flush()

    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each document that has some."""
        self._flush()
        return numpy.concatenate(self._lengths) if self._lengths else numpy.empty(0, numpy.int32)

    def totals(self) -> dict[str, Any]:
        return {"parts": self.parts, "largest": self.largest, "last_id": next(iter(self.last_ids)) if len(self.last_ids) == 1 else None}

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        self._writer.write_table(pyarrow.table([pyarrow.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)],
                                               schema=self.schema))
        tokens = numpy.array(columns[5], dtype=numpy.int32)
        self._lengths.append(tokens[tokens > 0])
        self._rows = []


def _write(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    indexed.sync(partial)
    partial.rename(path)
