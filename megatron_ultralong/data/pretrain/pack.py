"""Documents to rows of exactly S + 1 tokens in Megatron's .bin/.idx: tokenised by all cores, chosen by
length, joined, accounted for.

    PREFIX.bin, .idx, .mask, .docs, .json     rows, masks, document starts and manifest, as row_writer.py says
    PREFIX.documents.parquet                  a line for each document of the inputs: its place, id, tokens, and how often it was used
    PREFIX.lengths.png                        tokens by length of document, before and after
    PREFIX.broken.jsonl                       documents that could not be read: file, line, reason; only where there are any

Work goes on in the hidden folder .PREFIX.work beside the output: a run that was stopped finds there what was
done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ultralong.data import megatron_index, row_writer
from megatron_ultralong.data.packed_rows import FORMAT
from megatron_ultralong.data.pretrain import length_resampling, packing_report, token_cache, tokenise_worker
from megatron_ultralong.data.pretrain.row_layout import SEPARATOR, BestFit, Crossing, Placement
from megatron_ultralong.data.pretrain.sources import Source, Sources
from megatron_ultralong.data.pretrain.token_cache import Store
from megatron_ultralong.data.pretrain.tokenise_worker import Strictness
from megatron_ultralong.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.workers import cores

WORTH_KEEPING = 64 << 20
"""Bytes of work below which a run that fails leaves nothing: making it again takes seconds."""
_BLOCK = 32 << 20  # bytes of rows written at a time
_SYNC = 1 << 30  # bytes of rows after which the disk is waited for and the place is noted


@dataclass(frozen=True, kw_only=True)
class Separator:
    """What is put between two documents: a text, encoded alone, once; or ids; or a special token. Default:
    the paper's text."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    special: Literal["bos", "eos"] | None = None

    def resolve(self, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
        """(text, ids); an empty text means no separator. UserError for ids the tokenizer does not have."""
        if self.ids is not None:
            bad = [i for i in self.ids if not 0 <= i < tokenizer.vocab_size]
            if bad:
                raise UserError(
                    f"--separator-id {bad[0]}: the tokenizer has ids 0 to {tokenizer.vocab_size - 1}"
                )
            return None, list(self.ids)
        if self.special is not None:
            special = tokenizer.special[self.special]
            if special is None:
                raise UserError(
                    f"--separator-token {self.special}: the tokenizer has none; use --separator or --separator-id"
                )
            return None, [special]
        text = "<s>" if self.text is None else self.text
        ids = tokenizer.ids(text)
        if text and not ids:
            raise UserError(f"--separator {text!r}: the tokenizer makes no token of it; use --separator-id")
        return text, ids


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows."""

    seq_length: int
    """S; a row has S + 1 tokens."""
    separator: Separator = Separator()
    fit: Literal["cross", "best"] = "cross"
    """cross: documents go on in the next row; best: whole in a row where they fit, by best fit decreasing."""
    last_row: Literal["pad", "drop"] = "pad"
    """Of documents that cross: the last row, not full, is filled up with masked padding, or left out."""
    document_starts: bool = False
    """Write where documents start, for attention inside documents; a separator ends the document before it."""
    duplicates: Literal["keep", "drop", "stop"] = "keep"
    """Documents with the same tokens as one before them, in any source."""
    broken: Literal["skip", "stop"] = "skip"
    """Documents that cannot be read: left out and counted, or refused."""
    empty: Literal["skip", "stop"] = "skip"
    """The same of documents without text."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise UserError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.fit == "best" and self.last_row == "drop":
            raise UserError("--last-row drop goes with --fit cross; with --fit best any row may have padding")


def pack(
    wanted: Sources,
    tokenizer_dir: Path,
    packing: Packing,
    output: str,
    *,
    workers: int | None = None,
    tokens_dir: Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write `output`.bin, .idx, .json and what else belongs to them; returns the manifest.

    workers: processes (None = a core each); the files are the same whatever their number. tokens_dir: where
    tokens of the documents are kept for other sequence lengths and mixes. Files of an earlier run with the
    same prefix are replaced, at the end. UserError for what a user can mend; then the output is as before.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    text, separator = packing.separator.resolve(tokenizer)
    prefix = row_writer.check_output(output)
    work = prefix.parent / f".{prefix.name}.work"
    tokens = tokens_dir or work / "tokens"
    _check_places(wanted, output, work, tokens_dir)
    with token_cache.locked(work), token_cache.locked(tokens):
        try:
            size = sum(
                tokenise_worker.data(path).stat().st_size
                for source in wanted.sources
                for path in source.files
            )
            with tqdm(
                total=size, unit="B", unit_scale=True, desc="tokenising", disable=not show_progress
            ) as bar:
                strictness = Strictness(broken=packing.broken, empty=packing.empty)
                store = token_cache.make(
                    tokens,
                    wanted.sources,
                    tokenizer,
                    strictness=strictness,
                    workers=workers or cores(),
                    keep=tokens_dir is not None,
                    advance=bar.update,
                    note=bar.write,
                )
            times, duplicate = _choose(store, wanted, packing)
            order = length_resampling.order(times, wanted.shuffle, wanted.seed)
            pad = next((i for i in (tokenizer.special["pad"], tokenizer.special["eos"]) if i is not None), 0)
            placement = _place(store.lengths[order], len(separator), packing)
            stage = work / "rows"
            _write_rows(
                work, stage, store, order, placement, packing, separator, pad, tokenizer, show_progress
            )
            manifest = _manifest(
                store, wanted, packing, tokenizer, times, duplicate, placement, (text, separator), pad
            )
            packing_report.write(stage, store, wanted, times, duplicate, manifest)
            row_writer.write_manifest(stage, manifest)
            row_writer.publish(stage, output)
            shutil.rmtree(work)
        except BaseException as error:
            kept = _keep_or_remove(work, output)
            if isinstance(error, OSError):
                raise UserError(
                    f"{error.filename or f'--output {output}'}: cannot be written: {error.strerror or error}{kept}"
                ) from None
            if isinstance(error, UserError | KeyboardInterrupt) and kept:
                raise type(error)(f"{error}{kept}") from None
            raise
    return manifest


def _check_places(wanted: Sources, output: str, work: Path, tokens_dir: Path | None) -> None:
    """UserError where the output would take the place of an input or of somebody else's files, or be taken
    for an input."""
    prefix = Path(output).resolve()
    written = {Path(f"{prefix}{suffix}") for suffix in (*row_writer.SUFFIXES, *row_writer.EXTRAS, ".json")}
    for source in wanted.sources:
        for path in source.files:
            if written & {path.resolve(), tokenise_worker.data(path).resolve()}:
                raise UserError(
                    f"--output {output}: would take the place of the input {path}; choose another"
                )
        for folder in source.folders:
            if folder.resolve() in prefix.parents:
                raise UserError(
                    f"--output {output}: lies in the input directory {folder}; choose a place outside"
                )
    manifest = Path(f"{output}.json")
    if (manifest.exists() and not row_writer.is_manifest(manifest)) or (
        Path(f"{output}.idx").exists() and not manifest.exists() and not work.exists()
    ):
        raise UserError(
            f"--output {output}: files of that name are there which no earlier run made; choose another, or move them away"
        )
    if tokens_dir is not None:
        token_cache.check_folder(tokens_dir)


def _keep_or_remove(work: Path, output: str) -> str:
    """What an error says of the work that is kept; nothing where it is too little and was removed."""
    size = (
        sum(path.stat().st_size for path in work.rglob("*") if path.is_file() and path.suffix != ".partial")
        if work.exists()
        else 0
    )
    half_published = Path(f"{output}.idx").exists() and not Path(f"{output}.json").exists()
    if size >= WORTH_KEEPING or half_published:
        return f" (finished parts are kept in {work}; the same command goes on with them)"
    shutil.rmtree(work, ignore_errors=True)
    return ""


def _choose(
    store: Store, wanted: Sources, packing: Packing
) -> tuple[NDArray[numpy.int32], NDArray[numpy.bool_]]:
    """(times each document is used, whether it has the same tokens as one before)."""
    source_of = numpy.array([unit.source for unit in store.units], numpy.int32)[store.unit_of]
    status, low, high = store.column("status", "hash_low", "hash_high")
    good = status == tokenise_worker.OK
    duplicate = ~length_resampling.first_of_equal(low[good], high[good])
    if packing.duplicates == "stop" and duplicate.any():
        place, earlier = packing_report.equal_pair(store, low[good], high[good], int(numpy.argmax(duplicate)))
        raise UserError(
            f"{place}: has the same tokens as {earlier}; remove it, or use --duplicates keep or drop"
        )
    usable = ~duplicate if packing.duplicates == "drop" else numpy.ones(len(duplicate), numpy.bool_)
    if not usable.any():
        files = [path for source in wanted.sources for path in source.files]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(f"no text in {files[0]}{more}; nothing to pack")
    times = length_resampling.copies(store.lengths, source_of, usable, wanted)
    if not times.any():
        raise UserError(
            "of no source so many tokens are wanted that one document is worth taking; ask for more tokens, or raise the rates"
        )
    return times, duplicate


def _place(lengths: NDArray[numpy.int64], separator: int, packing: Packing) -> Placement:
    row = packing.seq_length + 1
    placement: Placement = (
        BestFit(lengths, separator, row)
        if packing.fit == "best"
        else Crossing(lengths, separator, row, packing.last_row == "pad")
    )
    if not placement.rows:
        raise UserError(
            f"the input makes {placement.dropped} tokens, less than one row of {packing.seq_length} + 1; "
            "use --last-row pad, a shorter --seq-length or more text"
        )
    return placement


# ---- rows --------------------------------------------------------------------------------------


def _write_rows(
    work: Path,
    stage: Path,
    store: Store,
    order: NDArray[numpy.int64],
    placement: Placement,
    packing: Packing,
    separator: list[int],
    pad: int,
    tokenizer: Tokenizer,
    show_progress: bool,
) -> None:
    """All rows into `stage`, from the last one on that an earlier run of the same is known to have written."""
    length, dtype = packing.seq_length + 1, numpy.dtype(megatron_index.token_dtype(tokenizer.vocab_size))
    identity = hashlib.sha256(
        json.dumps(
            [(store.folder / "plan.json").read_text(encoding="utf-8"), asdict(packing), separator, pad]
        ).encode()
        + order.tobytes()
    ).hexdigest()
    progress = work / "progress.json"
    done = _resumed(progress, stage, identity)
    if done is None:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        done = {"rows": 0, "": 0, ".mask": 0, ".docs": 0}
    names = ["", *([".mask"] if placement.padding else []), *([".docs"] if packing.document_starts else [])]
    files = {name: (stage / f"{name}.bin").open("ab") for name in names}
    for name, file in files.items():
        file.truncate(done[name])
        file.seek(done[name])
    between = numpy.array(separator, dtype)
    reader = _Reader(store)
    many = max(1, _BLOCK // (length * dtype.itemsize))
    unsynced = 0
    with tqdm(
        total=placement.rows, initial=done["rows"], unit="row", desc="packing", disable=not show_progress
    ) as bar:
        for first in range(done["rows"], placement.rows, many):
            count = min(many, placement.rows - first)
            block = numpy.full((count, length), pad, dtype)
            filled = numpy.empty(count, numpy.int64)
            for k in range(count):
                for piece in placement.pieces(first + k):
                    part = block[k, piece.at : piece.at + piece.length]
                    if piece.document == SEPARATOR:
                        part[:] = between[piece.begin : piece.begin + piece.length]
                    else:
                        reader.into(part, int(order[piece.document]), piece.begin)
                filled[k] = piece.at + piece.length
                if ".docs" in files:
                    files[".docs"].write(numpy.array(placement.starts(first + k), numpy.int32).tobytes())
            files[""].write(block.data)
            if ".mask" in files:
                files[".mask"].write((numpy.arange(length) < filled[:, None]).astype(numpy.uint8).data)
            bar.update(count)
            unsynced += block.nbytes
            if unsynced >= _SYNC:
                unsynced = 0
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                at = {name: file.tell() for name, file in files.items()}
                progress.write_text(
                    json.dumps(
                        {"identity": identity, "rows": first + count, "": 0, ".mask": 0, ".docs": 0} | at
                    )
                )
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    at = {name: file.tell() for name, file in files.items()}
    progress.write_text(
        json.dumps({"identity": identity, "rows": placement.rows, "": 0, ".mask": 0, ".docs": 0} | at)
    )
    for name, file in files.items():
        file.close()
        starts = (len(placement.starts(row)) for row in range(placement.rows))
        sizes = (
            numpy.fromiter(starts, numpy.int32)
            if name == ".docs"
            else numpy.full(placement.rows, length, numpy.int32)
        )
        megatron_index.write_index(
            stage / f"{name}.idx", {"": dtype, ".mask": numpy.uint8, ".docs": numpy.int32}[name], sizes
        )


def _resumed(progress: Path, stage: Path, identity: str) -> dict[str, int] | None:
    """Rows and bytes that are on the disk for sure; None = nothing of this run is."""
    try:
        done = json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    sizes = {
        name: (stage / f"{name}.bin").stat().st_size if (stage / f"{name}.bin").exists() else 0
        for name in ("", ".mask", ".docs")
    }
    return (
        done
        if done.pop("identity") == identity and all(sizes[name] >= done[name] for name in sizes)
        else None
    )


class _Reader:
    """Tokens of documents out of a store; the files used last stay open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[int, tuple[Any, numpy.dtype[Any]]] = OrderedDict()

    def into(self, part: NDArray[Any], document: int, begin: int) -> None:
        """Fill `part` with a document's tokens from `begin` on."""
        unit = int(self._store.unit_of[document])
        if unit not in self._open:
            if len(self._open) >= 256:
                self._open.popitem(last=False)[1][0].close()
            path, dtype = self._store.bin(unit)
            self._open[unit] = (path.open("rb", buffering=0), dtype)
        self._open.move_to_end(unit)
        file, dtype = self._open[unit]
        file.seek((int(self._store.begins[document]) + begin) * dtype.itemsize)
        if dtype == part.dtype:
            view, got = memoryview(part.view(numpy.uint8)), 0  # type: ignore[arg-type]
            while got < len(view):
                count = file.readinto(view[got:])
                if not count:
                    raise UserError(f"{file.name}: ended early; was it changed meanwhile?")
                got += count
        else:
            found = numpy.frombuffer(tokenise_worker.read_exactly(file, len(part) * dtype.itemsize), dtype)
            if found.min(initial=0) < 0 or found.max(initial=0) > numpy.iinfo(part.dtype).max:
                raise UserError(f"{file.name}: holds other tokens than before; was it changed meanwhile?")
            part[:] = found


# ---- manifest ----------------------------------------------------------------------------------


def _manifest(
    store: Store,
    wanted: Sources,
    packing: Packing,
    tokenizer: Tokenizer,
    times: NDArray[numpy.int32],
    duplicate: NDArray[numpy.bool_],
    placement: Placement,
    separator: tuple[str | None, list[int]],
    pad: int,
) -> dict[str, Any]:
    sources = packing_report.sources(store, wanted, times, duplicate, dropped=packing.duplicates == "drop")
    packed = sum(source["packed"]["tokens"] for source in sources)
    largest = max(
        [
            *(totals["largest"] for totals in store.totals),
            *separator[1],
            *([pad] if placement.padding else []),
        ]
    )
    length = packing.seq_length + 1
    assert packed + placement.separators == placement.rows * length - placement.padding + placement.dropped
    return {
        "format": FORMAT,
        "kind": "pretrain",
        "seq_length": packing.seq_length,
        "rows": placement.rows,
        "documents": int(times.sum()),
        "tokens": packed + placement.separators - placement.dropped,
        "separator_tokens": placement.separators,
        "padding": placement.padding,
        "dropped": placement.dropped,
        "skipped": {
            key: sum(source["skipped"][key] for source in sources) for key in ("empty", "broken", "duplicate")
        },
        "first_broken": next(
            (counts["first_broken"] for counts in store.counts_by_file() if counts["first_broken"]), None
        ),
        "duplicates": int(duplicate.sum()),
        "max_token_id": largest,
        "dtype": numpy.dtype(megatron_index.token_dtype(tokenizer.vocab_size)).name,
        "mask": bool(placement.padding),
        "document_starts": packing.document_starts,
        "fit": packing.fit,
        "last_row": packing.last_row,
        "separator": {"text": separator[0], "ids": separator[1]},
        "tokenizer": {
            "name": tokenizer.path.resolve().name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "seed": wanted.seed,
        "shuffle": wanted.shuffle,
        "tokens_wanted": wanted.tokens,
        "max_repeats": wanted.max_repeats,
        "sources": sources,
    }


def plain(inputs: list[Path], text_key: str = "text", id_key: str | None = None) -> Sources:
    """Files as one source, every document once, in order."""
    from megatron_ultralong.data.pretrain import sources

    folders = tuple(path for path in inputs if path.is_dir())
    return Sources(
        sources=(
            Source(
                name="input", files=sources.expand(inputs), text_key=text_key, id_key=id_key, folders=folders
            ),
        )
    )
