"""Documents to rows of exactly S + 1 tokens in Megatron's .bin/.idx: tokenised by all cores, selected by
length, joined, and accounted for.

    PREFIX.bin, .idx, .mask, .docs, .json     rows, masks, document starts and manifest: see row_writer.py
    PREFIX.documents.parquet                  one row per document: where it is, id, tokens, uses
    PREFIX.lengths.png                        tokens by length of document, before and after
    PREFIX.broken.jsonl                       documents that could not be read; only where some are

Intermediate files are in the hidden folder .PREFIX.work next to the output; a run that was stopped resumes
from them.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy

from megatron_ultralong.data import megatron_index, row_writer
from megatron_ultralong.data.packed_rows import FORMAT
from megatron_ultralong.data.pretrain import length_resampling, manifest, packing_report, token_cache
from megatron_ultralong.data.pretrain.manifest import DocumentUses
from megatron_ultralong.data.pretrain.row_layout import BestFitLayout, RowLayout, StreamLayout
from megatron_ultralong.data.pretrain.sources import DocumentMix
from megatron_ultralong.data.pretrain.token_cache import TokenCache
from megatron_ultralong.data.pretrain.tokenise_worker import OK, BadDocuments, content_file
from megatron_ultralong.data.pretrain.write_rows import RowContent, write_rows
from megatron_ultralong.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.progress import progress_bar
from megatron_ultralong.io.workers import cores

WORTH_KEEPING = 64 << 20
"""Bytes of intermediate files below which a run that fails removes them: making them again takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Separator:
    """What is inserted between two documents: a text, encoded alone, once; or ids; or a special token.
    Default: the paper's text."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    special: Literal["bos", "eos"] | None = None

    def resolve(self, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
        """(text, ids); an empty text means no separator. UserError for ids that the tokenizer does not
        have."""
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
    """cross: documents continue in the next row; best: complete in a row where they fit, by best fit
    decreasing."""
    last_row: Literal["pad", "drop"] = "pad"
    """With fit=cross: the last, incomplete row is filled with masked padding, or left out."""
    document_starts: bool = False
    """Write where documents start, for attention inside documents; a separator belongs to the document
    before."""
    duplicates: Literal["keep", "drop", "stop"] = "keep"
    """Documents with the same tokens as an earlier one, of any source."""
    broken: Literal["skip", "stop"] = "skip"
    """Documents that cannot be read: left out and counted, or UserError."""
    empty: Literal["skip", "stop"] = "skip"
    """Likewise documents without text."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise UserError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.fit == "best" and self.last_row == "drop":
            raise UserError("--last-row drop requires --fit cross; with --fit best any row may have padding")

    def layout(self, lengths: Any, separator: int) -> RowLayout:
        """Where documents of these lengths lie. UserError where they do not make a row."""
        row = self.seq_length + 1
        layout: RowLayout = (
            BestFitLayout(lengths, separator, row)
            if self.fit == "best"
            else StreamLayout(lengths, separator, row, self.last_row == "pad")
        )
        if not layout.rows:
            raise UserError(
                f"the input has {layout.dropped} tokens, less than one row of {self.seq_length} + 1; "
                "use --last-row pad, a shorter --seq-length or more text"
            )
        return layout


def pack(
    mix: DocumentMix,
    tokenizer_dir: Path,
    packing: Packing,
    output: str,
    *,
    workers: int | None = None,
    tokens_dir: Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write `output`.bin, .idx, .json and the files that belong to them; returns the manifest.

    workers: processes (None = one per core); the files do not depend on it. tokens_dir: where the documents'
    tokens are kept for other sequence lengths and mixes. Files of an earlier run with the same prefix are
    replaced at the end. UserError for what a user can fix; the output is then as before.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    separator_text, separator = packing.separator.resolve(tokenizer)
    prefix = row_writer.check_output(output)
    work = prefix.parent / f".{prefix.name}.work"
    tokens = tokens_dir or work / "tokens"
    _check_places(mix, output, work, tokens_dir)
    with token_cache.locked(work), token_cache.locked(tokens):
        try:
            size = sum(content_file(path).stat().st_size for path in mix.files)
            with progress_bar("tokenising", size, "B", hidden=not show_progress) as bar:
                cache = token_cache.make(
                    tokens,
                    mix.sources,
                    tokenizer,
                    BadDocuments(broken=packing.broken, empty=packing.empty),
                    workers=workers or cores(),
                    keep=tokens_dir is not None,
                    progress=(bar.update, bar.write),
                )
            uses = _uses(cache, mix, packing)
            order = length_resampling.order(uses.uses, mix.shuffle, mix.seed)
            content = RowContent(
                cache=cache,
                order=order,
                layout=packing.layout(cache.lengths[order], len(separator)),
                length=packing.seq_length + 1,
                dtype=numpy.dtype(megatron_index.token_dtype(tokenizer.vocab_size)),
                separator=separator,
                pad=next(
                    (i for i in (tokenizer.special["pad"], tokenizer.special["eos"]) if i is not None), 0
                ),
                document_starts=packing.document_starts,
            )
            stage = write_rows(work, content, [asdict(packing)], show_progress)
            made = _manifest(uses, packing, tokenizer, content, separator_text)
            packing_report.write(stage, uses, made)
            made = row_writer.write_manifest(stage, made)
            row_writer.publish(stage, output)
            shutil.rmtree(work)
        except BaseException as error:
            kept = _keep_or_remove(work, output)
            if isinstance(error, OSError):
                what = str(error.filename or f"--output {output}")
                raise UserError(f"{atomic_files.cannot_write(what, error)}{kept}") from None
            if isinstance(error, UserError | KeyboardInterrupt) and kept:
                raise type(error)(f"{error}{kept}") from None
            raise
    return made


def _check_places(mix: DocumentMix, output: str, work: Path, tokens_dir: Path | None) -> None:
    """UserError where the output would replace an input or unrelated files, or become an input itself."""
    prefix = Path(output).resolve()
    written = {Path(f"{prefix}{suffix}") for suffix in (*row_writer.SUFFIXES, *row_writer.EXTRAS, ".json")}
    for path in mix.files:
        if written & {path.resolve(), content_file(path).resolve()}:
            raise UserError(f"--output {output}: would replace the input {path}; choose another")
    for source in mix.sources:
        for folder in source.folders:
            if folder.resolve() in prefix.parents:
                raise UserError(
                    f"--output {output}: is in the input directory {folder}; choose a place outside"
                )
    manifest_file = Path(f"{output}.json")
    if (manifest_file.exists() and not row_writer.is_manifest(manifest_file)) or (
        Path(f"{output}.idx").exists() and not manifest_file.exists() and not work.exists()
    ):
        raise UserError(
            f"--output {output}: files of that name exist which no earlier run made; choose another, or move them"
        )
    if tokens_dir is not None:
        token_cache.check_folder(tokens_dir)


def _keep_or_remove(work: Path, output: str) -> str:
    """What an error message adds about intermediate files that are kept; "" where they are small, and
    removed."""
    size = (
        sum(path.stat().st_size for path in work.rglob("*") if path.is_file() and path.suffix != ".partial")
        if work.exists()
        else 0
    )
    half_published = Path(f"{output}.idx").exists() and not Path(f"{output}.json").exists()
    if size >= WORTH_KEEPING or half_published:
        return f" (finished work is kept in {work}; run the same command again to resume)"
    shutil.rmtree(work, ignore_errors=True)
    return ""


def _uses(cache: TokenCache, mix: DocumentMix, packing: Packing) -> DocumentUses:
    """How often each document is used. UserError where no document is used, and for duplicates with
    --duplicates stop."""
    status, low, high = cache.columns("status", "hash_low", "hash_high")
    low, high = low[status == OK], high[status == OK]
    duplicate = ~length_resampling.first_of_equal(low, high)
    if packing.duplicates == "stop" and duplicate.any():
        second = int(numpy.argmax(duplicate))
        first = int(numpy.flatnonzero((low == low[second]) & (high == high[second]))[0])
        raise UserError(
            f"{cache.location(second)}: has the same tokens as {cache.location(first)}; remove it, or use "
            "--duplicates keep or drop"
        )
    usable = ~duplicate if packing.duplicates == "drop" else numpy.ones(len(duplicate), numpy.bool_)
    if not usable.any():
        more = f" and {len(mix.files) - 1} more" if len(mix.files) > 1 else ""
        broken = next((c["first_broken"] for c in cache.counts_by_file() if c["first_broken"]), None)
        reason = f"; the first document that cannot be read: {broken}" if broken else ""
        raise UserError(f"no text in {mix.files[0]}{more}; nothing to pack{reason}")
    uses = length_resampling.count_uses(cache.lengths, cache.source_of, usable, mix)
    if not uses.any():
        raise UserError(
            "the tokens requested of each source are less than half of one document; request more tokens, or raise the rates"
        )
    return DocumentUses(cache, mix, uses, duplicate, packing.duplicates == "drop")


def _manifest(
    uses: DocumentUses, packing: Packing, tokenizer: Tokenizer, rows: RowContent, separator_text: str | None
) -> dict[str, Any]:
    mix, layout, sources = uses.mix, rows.layout, manifest.of_sources(uses)
    packed = sum(source["packed"]["tokens"] for source in sources)
    broken = [counts["first_broken"] for counts in uses.cache.counts_by_file() if counts["first_broken"]]
    inserted = [*rows.separator, *([rows.pad] if layout.padding else [])]
    assert packed + layout.separators == layout.rows * rows.length - layout.padding + layout.dropped
    return {
        "format": FORMAT,
        "kind": "pretrain",
        "seq_length": packing.seq_length,
        "rows": layout.rows,
        "documents": int(uses.uses.sum()),
        "tokens": packed + layout.separators - layout.dropped,
        "separator_tokens": layout.separators,
        "padding": layout.padding,
        "dropped": layout.dropped,
        "skipped": {
            key: sum(source["skipped"][key] for source in sources) for key in ("empty", "broken", "duplicate")
        },
        "first_broken": next(iter(broken), None),
        "duplicates": int(uses.duplicate.sum()),
        "max_token_id": max([*(totals["largest"] for totals in uses.cache.totals), *inserted]),
        "dtype": rows.dtype.name,
        "mask": bool(layout.padding),
        "document_starts": packing.document_starts,
        "fit": packing.fit,
        "last_row": packing.last_row,
        "separator": {"text": separator_text, "ids": rows.separator},
        "tokenizer": {
            "name": tokenizer.path.resolve().name,
            "sha256": tokenizer.sha256,
            "encoding_sha256": tokenizer.encoding_sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "seed": mix.seed,
        "shuffle": mix.shuffle,
        "tokens_wanted": mix.tokens,
        "max_repeats": mix.max_repeats,
        "sources": sources,
    }
