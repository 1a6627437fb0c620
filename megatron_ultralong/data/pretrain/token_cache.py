"""A folder of tokenised documents, made by all cores, which a run that was stopped resumes.

The inputs are divided into units of 8 to 128 MiB, independent of the number of processes. Each unit leaves

    000012.bin, .idx     its documents' tokens as a Megatron corpus (not where the input is one)
    000012.parquet       one row per document: number (line or row), id, status, reason, tokens, begin, hash
    000012.json          totals; written last: a unit without it is incomplete and is recomputed

and each input file NNN that is split over units, file-NNN.json with its SHA-256. plan.json says what the
folder was made from.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents, megatron_index
from megatron_ultralong.data.documents import FileRange
from megatron_ultralong.data.pretrain import tokenise_worker
from megatron_ultralong.data.pretrain.sources import DocumentSource
from megatron_ultralong.data.pretrain.tokenise_worker import (
    OK,
    BadDocuments,
    CacheUnit,
    Task,
    TokeniseJob,
    content_file,
    no_counts,
    result_file,
)
from megatron_ultralong.data.tokenizer import Tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.workers import WorkerPool

FORMAT = 3
"""Version of the folder, which must not mix several. 1: long documents were encoded in windows, which may
give other tokens. 2: special tokens spelled out in texts were control tokens."""
UNIT_SIZES = (8 << 20, 128 << 20)
"""Least and largest size of a unit, bytes of input."""
_UNITS = 256  # units of an input before they get larger
_OPEN_FILES = 256  # of a TokenReader


@dataclass
class TokenCache:
    """A complete folder. Arrays have one entry per document with tokens, in the order of the inputs."""

    folder: Path
    units: list[CacheUnit]
    totals: list[dict[str, Any]]
    """Of each unit, its .json."""
    hashes: list[str]
    """SHA-256 of each input file."""
    lengths: NDArray[numpy.int64]
    begins: NDArray[numpy.int64]
    """First token of each document in the .bin of its unit."""
    unit_of: NDArray[numpy.int32]

    @property
    def source_of(self) -> NDArray[numpy.int32]:
        """The source of each document."""
        return numpy.array([unit.source for unit in self.units], numpy.int32)[self.unit_of]

    def bin(self, unit: int) -> tuple[Path, numpy.dtype[Any]]:
        """The file with a unit's tokens, and their number type."""
        totals = self.totals[unit]
        path = Path(totals["bin"]) if totals["bin"] else self.folder / f"{unit:06d}.bin"
        return path, numpy.dtype(totals["dtype"])

    def counts_by_file(self) -> list[dict[str, Any]]:
        """Of each input file: lines or rows, documents, tokens, empty and broken documents, and the first
        broken one."""
        by_file = [no_counts() for _ in self.hashes]
        for unit, totals in zip(self.units, self.totals, strict=True):
            for file_range, number, counts in zip(unit.ranges, unit.files, totals["parts"], strict=True):
                own = by_file[number]
                if counts["first_broken"] and not own["first_broken"]:
                    line, reason = counts["first_broken"]
                    jsonl = documents.kind(file_range.path) == ".jsonl"
                    before = own["lines"] if file_range.begin and jsonl else 0
                    place = documents.location(FileRange(file_range.path), line + before)
                    own["first_broken"] = f"{place}: {reason}"
                for key in ("lines", "documents", "empty", "broken", "tokens", "special_tokens"):
                    own[key] += counts[key]
        return by_file

    def columns(self, *names: str, unit: int | None = None) -> list[Any]:
        """Columns of all units' tables (or of one), as numpy arrays: every document, also broken and
        empty."""
        import pyarrow
        import pyarrow.parquet

        units = range(len(self.units)) if unit is None else [unit]
        tables = [
            pyarrow.parquet.read_table(self.folder / f"{k:06d}.parquet", columns=list(names)) for k in units
        ]
        return [
            pyarrow.chunked_array(
                [chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type
            ).to_numpy()
            for name in names
        ]

    def location(self, document: int) -> str:
        """File, and line or row, of a document."""
        unit = int(self.unit_of[document])
        part, number, status = self.columns("part", "number", "status", unit=unit)
        within = document - int(numpy.searchsorted(self.unit_of, unit))
        row = numpy.flatnonzero(status == OK)[within]
        return documents.location(self.units[unit].ranges[part[row]], int(number[row]))


class TokenReader:
    """Reads tokens of documents from a cache; the files used last stay open."""

    def __init__(self, cache: TokenCache) -> None:
        self._cache = cache
        self._open: OrderedDict[int, tuple[BinaryIO, numpy.dtype[Any]]] = OrderedDict()

    def read_into(self, tokens: NDArray[Any], document: int, begin: int) -> None:
        """Fill `tokens` with a document's tokens from number `begin`."""
        unit = int(self._cache.unit_of[document])
        if unit not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
            path, dtype = self._cache.bin(unit)
            self._open[unit] = (path.open("rb", buffering=0), dtype)  # type: ignore[assignment]
        self._open.move_to_end(unit)
        file, dtype = self._open[unit]
        file.seek((int(self._cache.begins[document]) + begin) * dtype.itemsize)
        if dtype == tokens.dtype:
            tokenise_worker.read_into(file, tokens)
            return
        stored = numpy.empty(len(tokens), dtype)
        tokenise_worker.read_into(file, stored)
        if stored.min(initial=0) < 0 or stored.max(initial=0) > numpy.iinfo(tokens.dtype).max:
            raise UserError(f"{file.name} contains other tokens than before; was it changed meanwhile?")
        tokens[:] = stored


def plan(sources: tuple[DocumentSource, ...]) -> list[CacheUnit]:
    """The units of the sources' files, in order."""
    units: list[CacheUnit] = []
    number = 0
    total = sum(content_file(path).stat().st_size for source in sources for path in source.files)
    most = min(max(total // _UNITS, UNIT_SIZES[0]), UNIT_SIZES[1])
    for which, source in enumerate(sources):
        groups: list[list[tuple[int, FileRange]]] = []
        filled = most
        for path in source.files:
            corpus = documents.kind(path) == ".idx"
            for file_range in [FileRange(path)] if corpus else documents.split(path, most):
                # Small files share a unit; a range of a large one is a unit of its own.
                size = most if corpus or file_range.end is not None else max(path.stat().st_size, 1)
                if filled + size > most:
                    groups.append([])
                    filled = 0
                groups[-1].append((number, file_range))
                filled += size
            number += 1
        units += [
            CacheUnit(
                source=which,
                files=tuple(n for n, _ in group),
                ranges=tuple(file_range for _, file_range in group),
                text_key=source.text_key,
                id_key=source.id_key,
                strip_id=source.strip_id,
                special_tokens=source.special_tokens,
            )
            for group in groups
        ]
    return units


def check_folder(folder: Path) -> None:
    """UserError where a user's folder for tokens contains other files, which must not be removed."""
    if (
        folder.is_dir()
        and any(path.name != "lock" for path in folder.iterdir())
        and not (folder / "plan.json").is_file()
    ):
        raise UserError(
            f"--tokens-dir {folder}: contains other files; name a new folder, or one that an earlier run made"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. UserError where another process works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise atomic_files.cannot_write(str(folder), error) from None
    with file:
        atomic_files.lock(
            file, f"{folder}: another process prepares data in it; wait for it, or choose another folder"
        )
        yield


def make(
    folder: Path,
    sources: tuple[DocumentSource, ...],
    tokenizer: Tokenizer,
    bad: BadDocuments,
    *,
    workers: int,
    keep: bool,
    progress: tuple[Callable[[int], Any], Callable[[str], Any]] = (lambda n: None, lambda text: None),
) -> TokenCache:
    """Make the tokens of all sources in `folder`; finished units of an earlier run are reused.

    keep: the folder belongs to the user, so tokens of other inputs in it are refused, not removed. progress:
    called with bytes of input done, those done before included; and with a note for the user.
    """
    advance, note = progress
    units = plan(sources)
    files = [path for source in sources for path in source.files]
    _claim(folder, _identity(files, units, tokenizer, bad), keep, note)
    tasks: list[Task] = [("unit", k) for k in range(len(units))]
    tasks += [("file", k) for k in sorted(_split_files(units))]
    todo = [task for task in tasks if not result_file(folder, task).exists()]
    unfinished = {number for kind, k in todo if kind == "unit" for number in units[k].files}
    advance(sum(content_file(path).stat().st_size for k, path in enumerate(files) if k not in unfinished))
    job = TokeniseJob(
        folder,
        units,
        files,
        tokenizer.backend.to_str() if any(kind == "unit" for kind, _ in todo) else "",
        megatron_index.token_dtype(tokenizer.vocab_size),
        bad,
    )
    with WorkerPool(min(workers, len(todo)), tokenise_worker.worker, (job,), advance) as pool:
        for _ in pool.unordered(todo):
            pass
    return _open(job, tokenizer)


def _identity(
    files: list[Path], units: list[CacheUnit], tokenizer: Tokenizer, bad: BadDocuments
) -> dict[str, Any]:
    """The content of plan.json: a cache with another content cannot be used."""
    stats = [
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for file in files
        for path in {file, content_file(file)}
        for stat in [path.stat()]
    ]
    stats.sort()
    return {
        "format": FORMAT,
        "files": [list(stat) for stat in stats],
        "tokenizer": tokenizer.sha256,
        "broken": bad.broken,
        "empty": bad.empty,
        "special_tokens": [unit.special_tokens for unit in units],
        "units": [
            [u.source, list(u.files), [[r.begin, r.end] for r in u.ranges], u.text_key, u.id_key, u.strip_id]
            for u in units
        ],
    }


def _claim(folder: Path, identity: dict[str, Any], keep: bool, note: Callable[[str], Any]) -> None:
    """Prepare the folder for this identity; remove what unfinished units left."""
    path = folder / "plan.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        earlier = None
    except ValueError:
        earlier = {}
    if earlier is not None and earlier != identity:
        what = next(key for key in identity if earlier.get(key) != identity[key])
        other_format = what == "format" and "format" in earlier
        if keep:
            made = (
                f"of unsupported format version {earlier.get('format')} (expected {FORMAT})"
                if other_format
                else f"made from other inputs or settings ({what} differ)"
            )
            raise UserError(f"{folder} contains tokens {made}; name another folder, or remove it")
        why = f"unsupported format version {earlier.get('format')}" if other_format else f"{what} differ"
        note(f"tokens of an earlier run are recomputed ({why})")
    if earlier != identity:
        for old in folder.iterdir():
            if re.fullmatch(r"(\d{6}|file-\d{6}|plan)\.\w+(\.partial)?", old.name):
                old.unlink()
        atomic_files.write_text(path, json.dumps(identity))
    for old in folder.glob("*.partial"):
        old.unlink()


def _split_files(units: list[CacheUnit]) -> set[int]:
    """Files that are read in several ranges, and hashed by a task of their own."""
    return {
        number
        for unit in units
        for number, file_range in zip(unit.files, unit.ranges, strict=True)
        if file_range.end is not None
    }


def _open(job: TokeniseJob, tokenizer: Tokenizer) -> TokenCache:
    def result(task: Task) -> dict[str, Any]:
        return atomic_files.read_json(result_file(job.folder, task))

    units, all_totals = job.units, [result(("unit", k)) for k in range(len(job.units))]
    hashes = ["" for _ in job.files]
    for unit, totals in zip(units, all_totals, strict=True):
        if totals["largest"] >= tokenizer.vocab_size:
            raise UserError(
                f"{unit.ranges[0].path} contains token id {totals['largest']}, but the tokenizer has {tokenizer.vocab_size}: "
                "it was made with another tokenizer"
            )
        for number, sha256 in zip(unit.files, totals["sha256"], strict=True):
            hashes[number] = sha256 or hashes[number]
    for number in _split_files(units):
        hashes[number] = result(("file", number))["sha256"]
    no_number = numpy.empty(0, numpy.int64)
    cache = TokenCache(
        job.folder, units, all_totals, hashes, no_number, no_number, numpy.empty(0, numpy.int32)
    )
    for path, counts in zip(job.files, cache.counts_by_file(), strict=True):
        # No usable line at all: the key or the kind of file is wrong, rather than the content damaged.
        usable = counts["documents"] + counts["empty"]
        if counts["broken"] and not usable and documents.kind(path) != ".txt":
            raise UserError(counts["first_broken"])
    columns = [cache.columns("status", "tokens", "begin", unit=k) for k in range(len(units))]
    good = [status == OK for status, *_ in columns]
    cache.lengths = numpy.concatenate(
        [tokens[ok].astype(numpy.int64) for ok, (_, tokens, _) in zip(good, columns, strict=True)]
    )
    cache.begins = numpy.concatenate([begin[ok] for ok, (*_, begin) in zip(good, columns, strict=True)])
    cache.unit_of = numpy.repeat(numpy.arange(len(units), dtype=numpy.int32), [int(ok.sum()) for ok in good])
    return cache
