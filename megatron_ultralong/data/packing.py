"""Documents, tokenised and joined by a separator, to rows of exactly S + 1 tokens in Megatron's .bin/.idx.

    PREFIX.bin, .idx        the rows, disjoint: row k holds tokens k (S + 1) to (k + 1)(S + 1) - 1 of the joined documents
    PREFIX.mask.bin, .idx   uint8 a token: 1 where it counts as a target of the loss; only where some do not (padding)
    PREFIX.docs.bin, .idx   int32 a document: where in the row documents start, 0 first; only where asked for
    PREFIX.json             manifest: where each token came from

Everything is written in a hidden folder beside and renamed at the end, the manifest last: without it nothing counts as whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ultralong.config import UserError
from megatron_ultralong.data import documents, tokenise
from megatron_ultralong.data.dataset import FORMAT
from megatron_ultralong.data.tokenise import Ids, Tokenizer

SUFFIXES = (".bin", ".idx", ".mask.bin", ".mask.idx", ".docs.bin", ".docs.idx")
"""What may lie beside a manifest."""


@dataclass(frozen=True, kw_only=True)
class Separator:
    """What is put between two documents: a text, encoded alone, once; or ids; or a special token. Default: the paper's text."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    special: Literal["bos", "eos"] | None = None

    def resolve(self, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
        """(text, ids); an empty text means no separator. UserError for ids the tokenizer does not have."""
        if self.ids is not None:
            bad = [i for i in self.ids if not 0 <= i < tokenizer.vocab_size]
            if bad:
                raise UserError(f"--separator-id {bad[0]}: the tokenizer has ids 0 to {tokenizer.vocab_size - 1}")
            return None, list(self.ids)
        if self.special is not None:
            special = tokenizer.special[self.special]
            if special is None:
                raise UserError(f"--separator-token {self.special}: the tokenizer has none; use --separator or --separator-id")
            return None, [special]
        text = "<s>" if self.text is None else self.text
        ids = tokenizer.ids(text)
        if text and not ids:
            raise UserError(f"--separator {text!r}: the tokenizer makes no token of it; use --separator-id")
        return text, ids


def pack(inputs: list[Path], tokenizer_dir: Path, seq_length: int, output: str, *, text_key: str = "text",
         separator: Separator = Separator(), last_row: Literal["pad", "drop"] = "pad", document_starts: bool = False,
         workers: int = 0, show_progress: bool = True) -> dict[str, Any]:
    """Write `output`.bin, .idx, .json (and .mask) from raw documents; returns the manifest.

    document_starts: write .docs too, for attention inside documents; a separator ends the document before it. last_row: pad =
    fill it up and mask the padding's loss; drop = leave its tokens out. workers: processes that encode, 0 = this one. Files of an
    earlier run with the same prefix are replaced, at the end. UserError for what a user can mend; then nothing is written.
    """
    if seq_length < 1:
        raise UserError(f"--seq-length {seq_length}: must be at least 1")
    size = documents.check(inputs)
    tokenizer = tokenise.load(tokenizer_dir)
    text, separator_ids = separator.resolve(tokenizer)
    with _staged(output) as stage:
        rows = Rows(stage, seq_length + 1, tokenizer.vocab_size, separator_ids, document_starts)
        with tqdm(total=size, unit="B", unit_scale=True, desc="packing", disable=not show_progress) as bar:
            sources = _pack_all(inputs, text_key, tokenizer, workers, rows, bar)
        if not rows.documents:
            more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
            raise UserError(f"no text in {inputs[0]}{more}; nothing to pack")
        pad = next((i for i in (tokenizer.special["pad"], tokenizer.special["eos"]) if i is not None), 0)
        padding, dropped = rows.finish(pad if last_row == "pad" else None)
        if not rows.rows:
            raise UserError(f"the input makes {dropped} tokens, less than one row of {seq_length} + 1; "
                            "use --last-row pad, a shorter --seq-length or more text")
        manifest = {
            "format": FORMAT, "kind": "pretrain", "seq_length": seq_length, "rows": rows.rows, "documents": rows.documents,
            "tokens": rows.tokens - dropped, "separator_tokens": rows.separators, "padding": padding, "dropped": dropped,
            "skipped": {"empty": sum(source["skipped"]["empty"] for source in sources)}, "max_token_id": rows.largest,
            "dtype": numpy.dtype(rows.dtype).name, "mask": bool(padding), "document_starts": document_starts, "last_row": last_row,
            "separator": {"text": text, "ids": separator_ids},
            "tokenizer": {"name": tokenizer.path.resolve().name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            "sources": sources}
        assert sum(s["tokens"] for s in sources) + rows.separators == rows.tokens == rows.rows * rows.length - padding + dropped
        (stage / "manifest").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _pack_all(inputs: list[Path], text_key: str, tokenizer: Tokenizer, workers: int, rows: Rows,
              bar: Any) -> list[dict[str, Any]]:
    """Pack every document of every file; what the manifest says of each file. Its tokens are without separators."""
    sources: list[dict[str, Any]] = []
    owners: deque[dict[str, Any]] = deque()
    """The file of each document that is being encoded, in order."""

    def texts() -> Iterator[Iterable[str]]:
        for path in inputs:
            with documents.readable(path), path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                sources.append({"path": str(path), "sha256": sha256, "bytes": file.tell(), "documents": 0, "tokens": 0,
                                "skipped": {"empty": 0}})
            for document in documents.read(path, text_key, progress=bar.update):
                owners.append(sources[-1])
                yield document.pieces

    length = 0
    for ids, ends in tokenise.tokenise(texts(), tokenizer, workers):
        rows.add(ids)
        length += len(ids)
        if ends:
            rows.end_document()
            source = owners.popleft()
            source["tokens"] += length
            source["documents"] += length > 0
            source["skipped"]["empty"] += length == 0
            length = 0
            bar.set_postfix(rows=rows.rows, refresh=False)
    return sources


class Rows:
    """Writes a stream of token ids as rows of `length`; memory is one row."""

    def __init__(self, stage: Path, length: int, vocab_size: int, separator: list[int], document_starts: bool = False) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.stage, self.length = stage, length
        self.dtype = DType.optimal_dtype(vocab_size)
        """uint16 where every id fits, else int32."""
        self.separator = numpy.array(separator, dtype=numpy.int32)
        self.rows, self.documents, self.tokens, self.separators, self.largest = 0, 0, 0, 0, 0
        self._builder = IndexedDatasetBuilder(str(stage / ".bin"), dtype=self.dtype)
        self._row: NDArray[Any] = numpy.empty(length, dtype=self.dtype)
        self._filled = 0
        self._in_document = False
        self._starts = IndexedDatasetBuilder(str(stage / ".docs.bin"), dtype=numpy.int32) if document_starts else None
        self._row_starts = [0]

    def add(self, ids: Ids) -> None:
        """The next tokens of the document; before its first ones comes the separator, unless it is the first document."""
        if not len(ids):
            return
        if not self._in_document and self.documents:
            self._put(self.separator)
            self.separators += len(self.separator)
            if self._filled:  # a document at the start of a row, or that goes on there, is there already
                self._row_starts.append(self._filled)
        self._in_document = True
        self._put(ids)

    def end_document(self) -> None:
        """The document is over; one without tokens leaves no trace."""
        self.documents += self._in_document
        self._in_document = False

    def finish(self, pad: int | None) -> tuple[int, int]:
        """Fill the last row up with `pad`, or leave it out (None), and write index and mask. Returns (padding, dropped)."""
        padding, dropped = 0, 0
        if self._filled and pad is None:
            dropped = self._filled
        elif self._filled and pad is not None:
            padding = self.length - self._filled
            self._row[self._filled:] = pad
            self.largest = max(self.largest, pad)
            self._write()
        self._builder.finalize(str(self.stage / ".idx"))
        if self._starts is not None:
            self._starts.finalize(str(self.stage / ".docs.idx"))
        if padding:
            self._write_mask(padding)
        return padding, dropped

    def _put(self, ids: Ids) -> None:
        self.tokens += len(ids)
        self.largest = max(self.largest, int(ids.max(initial=0)))
        while len(ids):
            part = ids[:self.length - self._filled]
            self._row[self._filled:self._filled + len(part)] = part
            self._filled += len(part)
            ids = ids[len(part):]
            if self._filled == self.length:
                self._write()

    def _write(self) -> None:
        self._builder.add_item(torch.from_numpy(self._row))
        self._builder.end_document()
        if self._starts is not None:
            self._starts.add_item(torch.tensor(self._row_starts, dtype=torch.int32))
            self._starts.end_document()
        self.rows += 1
        self._filled, self._row_starts = 0, [0]

    def _write_mask(self, padding: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(str(self.stage / ".mask.bin"), dtype=numpy.uint8)
        mask = torch.ones(self.length, dtype=torch.uint8)
        for row in range(self.rows):
            if row == self.rows - 1:
                mask[self.length - padding:] = 0
            builder.add_item(mask)
            builder.end_document()
        builder.finalize(str(self.stage / ".mask.idx"))


@contextlib.contextmanager
def _staged(output: str) -> Iterator[Path]:
    """A hidden folder beside `output`; when all went well its files (named by suffix, and `manifest`) get the prefix `output`."""
    prefix = Path(output)
    if output.endswith(os.sep) or prefix.is_dir() or not prefix.name:
        raise UserError(f"--output {output}: is a directory; give the first part of the files' names, like {prefix / 'text'}")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.partial-", dir=prefix.parent))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    try:
        yield stage
        manifest = Path(f"{output}.json")
        for path in stage.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        manifest.unlink(missing_ok=True)
        for suffix in SUFFIXES:
            new, old = stage / suffix, Path(output + suffix)
            if new.exists():
                os.replace(new, old)
            else:
                old.unlink(missing_ok=True)
        os.replace(stage / "manifest", manifest)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
