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
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents, megatron_index
from megatron_ultralong.data.documents import Part
from megatron_ultralong.data.pretrain import tokenise_worker
from megatron_ultralong.data.pretrain.sources import Source
from megatron_ultralong.data.pretrain.tokenise_worker import (
    OK,
    Advance,
    Strictness,
    Unit,
    data,
    done,
    no_counts,
    write,
)
from megatron_ultralong.data.tokenizer import Tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.workers import WorkerPool

FORMAT = 1
UNITS = (8 << 20, 128 << 20)
"""Bytes of input of a unit: at least, and at most."""
_FEW = 256  # units that an input has before they get larger


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
        return Path(totals["bin"]) if totals["bin"] else self.folder / f"{unit:06d}.bin", numpy.dtype(
            totals["dtype"]
        )

    def counts_by_file(self) -> list[dict[str, Any]]:
        """Of each input file its lines or rows, documents, tokens, empty and broken ones, and the first of
        these."""
        found: list[dict[str, Any]] = [no_counts() for _ in self.hashes]
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
        """Columns of the units' tables (of one), over every document, broken and empty ones too, as numpy
        arrays."""
        import pyarrow
        import pyarrow.parquet

        which = range(len(self.units)) if unit is None else [unit]
        tables = [
            pyarrow.parquet.read_table(self.folder / f"{k:06d}.parquet", columns=list(names)) for k in which
        ]
        return [
            pyarrow.chunked_array(
                [chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type
            ).to_numpy()
            for name in names
        ]


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
        units += [
            Unit(
                source=which,
                files=tuple(n for n, _ in group),
                parts=tuple(part for _, part in group),
                text_key=source.text_key,
                id_key=source.id_key,
                strip_id=source.strip_id,
            )
            for group in groups
        ]
    return units


def check_folder(folder: Path) -> None:
    """UserError where a user's folder for tokens holds something else: nothing of it may be removed."""
    if (
        folder.is_dir()
        and any(path.name != "lock" for path in folder.iterdir())
        and not (folder / "plan.json").is_file()
    ):
        raise UserError(
            f"--tokens-dir {folder}: holds other files; name a new folder, or one that an earlier run made"
        )


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
            raise UserError(
                f"{folder}: another process is preparing data there; wait for it, or choose another place"
            ) from None
        yield


def make(
    folder: Path,
    sources: tuple[Source, ...],
    tokenizer: Tokenizer,
    *,
    strictness: Strictness,
    workers: int,
    keep: bool,
    advance: Advance = lambda n: None,
    note: Callable[[str], Any] = lambda text: None,
) -> Store:
    """The tokens of all sources in `folder`, where finished units of an earlier run are used again.

    advance: called with bytes of input done, those found done too. keep: the folder is the user's, and what
    it holds of other inputs is not thrown away but refused.
    """
    units = plan(sources)
    files = [path for source in sources for path in source.files]
    _claim(folder, _identity(files, units, tokenizer, strictness), keep, note)
    sizes = [data(path).stat().st_size for path in files]
    todo: list[tuple[str, int]] = []
    for kind, numbers in (("unit", range(len(units))), ("file", sorted(_apart(units)))):
        todo += [(kind, k) for k in numbers if not done(folder, kind, k).exists()]
    unfinished = {number for kind, k in todo if kind == "unit" for number in units[k].files}
    advance(sum(size for number, size in enumerate(sizes) if number not in unfinished))
    shared = (
        folder,
        units,
        files,
        tokenizer.backend.to_str() if any(kind == "unit" for kind, _ in todo) else "",
        megatron_index.token_dtype(tokenizer.vocab_size),
        strictness,
    )
    with WorkerPool(min(workers, len(todo)), tokenise_worker.worker, shared, advance) as pool:
        for _ in pool.unordered(todo):
            pass
    return _open(folder, units, files, tokenizer)


def _identity(
    files: list[Path], units: list[Unit], tokenizer: Tokenizer, strictness: Strictness
) -> dict[str, Any]:
    stats = [
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for one in files
        for path in {one, data(one)}
        for stat in [path.stat()]
    ]
    stats.sort()
    return {
        "format": FORMAT,
        "files": [list(stat) for stat in stats],
        "tokenizer": tokenizer.sha256,
        "broken": strictness.broken,
        "empty": strictness.empty,
        "units": [
            [u.source, list(u.files), [[p.begin, p.end] for p in u.parts], u.text_key, u.id_key, u.strip_id]
            for u in units
        ],
    }


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
            raise UserError(
                f"{folder}: holds tokens made from others ({what} differ); name another folder, or remove it"
            )
        note(f"tokens of an earlier run are made anew ({what} differ)")
    if found != identity:
        for old in folder.iterdir():
            if re.fullmatch(r"(\d{6}|file-\d{6}|plan)\.\w+(\.partial)?", old.name):
                old.unlink()
        write(path, identity)
    for old in folder.glob("*.partial"):
        old.unlink()


def _apart(units: list[Unit]) -> set[int]:
    """Files that are read in several parts, and hashed apart."""
    return {
        number
        for unit in units
        for number, part in zip(unit.files, unit.parts, strict=True)
        if part.end is not None
    }


def _open(folder: Path, units: list[Unit], files: list[Path], tokenizer: Tokenizer) -> Store:
    totals = [json.loads(done(folder, "unit", k).read_text(encoding="utf-8")) for k in range(len(units))]
    for unit, told in enumerate(totals):
        if told["largest"] >= tokenizer.vocab_size:
            raise UserError(
                f"{units[unit].parts[0].path}: holds token id {told['largest']}, but the tokenizer has {tokenizer.vocab_size}: "
                "it was made with another one"
            )
    hashes = ["" for _ in files]
    for one, told in zip(units, totals, strict=True):
        for number, sha256 in zip(one.files, told["sha256"], strict=True):
            hashes[number] = sha256 or hashes[number]
    for number in _apart(units):
        hashes[number] = json.loads(done(folder, "file", number).read_text(encoding="utf-8"))["sha256"]
    store = Store(
        folder, units, totals, hashes, *(numpy.empty(0, numpy.int64),) * 2, numpy.empty(0, numpy.int32)
    )
    for path, counts in zip(files, store.counts_by_file(), strict=True):
        # Not one line of it: no damage, but the wrong key or kind of file.
        if (
            counts["broken"]
            and not counts["documents"] + counts["empty"]
            and documents.kind(path)[0] != ".txt"
        ):
            raise UserError(counts["first_broken"])
    columns = [store.column("status", "tokens", "begin", unit=unit) for unit in range(len(units))]
    good = [status == OK for status, *_ in columns]
    store.lengths = numpy.concatenate(
        [tokens[ok].astype(numpy.int64) for ok, (_, tokens, _) in zip(good, columns, strict=True)]
    )
    store.begins = numpy.concatenate([begin[ok] for ok, (*_, begin) in zip(good, columns, strict=True)])
    store.unit_of = numpy.repeat(numpy.arange(len(units), dtype=numpy.int32), [int(ok.sum()) for ok in good])
    return store
