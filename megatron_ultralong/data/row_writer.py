"""Packed rows of exactly S + 1 tokens as files, written whole or not at all.

    PREFIX.bin, .idx        the rows
    PREFIX.mask.bin, .idx   uint8 a token: 1 where it counts as a target of the loss; only where some do not
    PREFIX.docs.bin, .idx   int32 a document: where in the row documents start, 0 first; only where asked for
    PREFIX.json             manifest: where each token came from

Everything is written in a hidden folder beside and renamed at the end, the manifest last: without it nothing
counts as whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import megatron_index
from megatron_ultralong.errors import UserError

SUFFIXES = (".bin", ".idx", ".mask.bin", ".mask.idx", ".docs.bin", ".docs.idx")
"""What the trainer reads beside a manifest."""
EXTRAS = (".documents.parquet", ".broken.jsonl", ".lengths.png")
"""What people read beside a manifest."""


class RowWriter:
    """Rows of `length` tokens into a staging folder. Masks and starts are written whole or not at all: all
    rows have them, or none.

    masked: rows have a mask; starts: rows say where documents start.
    """

    def __init__(self, stage: Path, length: int, dtype: Any, *, masked: bool, starts: bool) -> None:
        self.stage, self.length, self.dtype = stage, length, numpy.dtype(dtype)
        self.rows, self.largest = 0, 0
        self._starts_of_row: list[int] = []
        self._tokens = (stage / ".bin").open("ab")
        self._mask = (stage / ".mask.bin").open("ab") if masked else None
        self._starts = (stage / ".docs.bin").open("ab") if starts else None

    def add(
        self, tokens: NDArray[Any], mask: NDArray[Any] | None = None, starts: Sequence[int] = (0,)
    ) -> None:
        """One row: tokens [length]; mask [length], 1 = the token counts as a target (None = all do); starts:
        0 first, rising."""
        assert tokens.shape == (self.length,) and starts[0] == 0
        self.largest = max(self.largest, int(tokens.max()))
        self._tokens.write(tokens.astype(self.dtype, copy=False).tobytes())
        if self._mask is not None:
            row = (
                numpy.ones(self.length, numpy.uint8) if mask is None else mask.astype(numpy.uint8, copy=False)
            )
            assert row.shape == (self.length,)
            self._mask.write(row.tobytes())
        else:
            assert mask is None
        if self._starts is not None:
            self._starts.write(numpy.asarray(starts, numpy.int32).tobytes())
            self._starts_of_row.append(len(starts))
        self.rows += 1

    def finish(self) -> None:
        """Write the indices; no row can be added after."""
        parts: list[tuple[str, Any, Any, Any]] = [
            ("", self._tokens, self.dtype, numpy.full(self.rows, self.length, numpy.int32)),
            (".mask", self._mask, numpy.uint8, numpy.full(self.rows, self.length, numpy.int32)),
            (".docs", self._starts, numpy.int32, self._starts_of_row),
        ]
        for name, file, dtype, lengths in parts:
            if file is not None:
                file.close()
                megatron_index.write_index(self.stage / f"{name}.idx", dtype, lengths)


@contextlib.contextmanager
def staged(output: str) -> Iterator[Path]:
    """A hidden folder beside `output`; when all went well its files (named by suffix, and `manifest`) get the
    prefix `output`, and those of an earlier run are gone. UserError where that cannot be written."""
    prefix = check_output(output)
    stage = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.partial-", dir=prefix.parent))
    try:
        yield stage
        publish(stage, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_output(output: str) -> Path:
    """The prefix as a path, whose folder exists from now on. UserError where it is no prefix of files, or
    nothing can be written."""
    prefix = Path(output)
    if output.endswith(os.sep) or prefix.is_dir() or not prefix.name:
        raise UserError(
            f"--output {output}: is a directory; give the first part of the files' names, like {prefix / 'text'}"
        )
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=prefix.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    return prefix


def is_manifest(path: Path) -> bool:
    """Whether it is what `write_manifest` wrote, by how it begins."""
    try:
        with path.open(encoding="utf-8") as file:
            begin = file.read(400)
    except (OSError, UnicodeDecodeError):
        return False
    return '"format": ' in begin and '"kind": ' in begin and '"seq_length": ' in begin


def write_manifest(stage: Path, values: dict[str, Any]) -> None:
    (stage / "manifest").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(stage: Path, output: str) -> None:
    """Give what a staging folder holds its names, the manifest last."""
    manifest = Path(f"{output}.json")
    for path in stage.iterdir():
        megatron_index.sync(path)
    manifest.unlink(missing_ok=True)
    for suffix in (*SUFFIXES, *EXTRAS):
        new, old = stage / suffix, Path(output + suffix)
        if new.exists():
            os.replace(new, old)
        else:
            old.unlink(missing_ok=True)
    os.replace(stage / "manifest", manifest)
