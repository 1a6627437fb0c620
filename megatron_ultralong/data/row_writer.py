"""Packed rows of exactly S + 1 tokens as files, which appear complete or not at all.

    PREFIX.bin, .idx        the rows
    PREFIX.mask.bin, .idx   uint8 per token: 1 where it counts as a target of the loss; only where some do not
    PREFIX.docs.bin, .idx   int32 per document: where documents start in the row, 0 first; optional
    PREFIX.json             manifest: where each token came from

Everything is written in a hidden folder next to them and renamed at the end, the manifest last: without it
the rows are incomplete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import megatron_index, row_files
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files

SUFFIXES = (".bin", ".idx", ".mask.bin", ".mask.idx", ".docs.bin", ".docs.idx")
"""Files next to a manifest that the trainer reads."""
EXTRAS = (".documents.parquet", ".broken.jsonl", ".lengths.png")
"""Files next to a manifest that people read."""


class RowWriter:
    """Writes rows of `length` tokens into a staging folder. All rows have masks, or none; likewise starts."""

    def __init__(
        self,
        stage: Path,
        length: int,
        dtype: Any,
        *,
        masks: bool,
        starts: bool,
        position: dict[str, int] | None = None,
    ) -> None:
        """position: of an earlier writer of the same rows, which is resumed there."""
        self.stage, self.length, self.dtype = stage, length, numpy.dtype(dtype)
        self.rows, self.largest = (position or {}).get("rows", 0), 0
        self._dtypes = {"": self.dtype}
        self._dtypes |= {".mask": numpy.dtype(numpy.uint8)} if masks else {}
        self._dtypes |= {".docs": numpy.dtype(numpy.int32)} if starts else {}
        self._files = {name: (stage / f"{name}.bin").open("ab") for name in self._dtypes}
        for name, file in self._files.items():
            file.truncate((position or {}).get(name, 0))
            file.seek(0, os.SEEK_END)

    def add(
        self,
        tokens: NDArray[Any],
        masks: NDArray[Any] | None = None,
        starts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add n rows: tokens [n, length]; masks [n, length], 1 = the token counts as a target; starts: of
        each row, 0 first, ascending."""
        assert tokens.shape[1:] == (self.length,) and all(of_row[0] == 0 for of_row in starts or ())
        self.largest = max(self.largest, int(tokens.max()))
        self._write("", tokens)
        if ".mask" in self._files:
            assert masks is not None and masks.shape == tokens.shape
            self._write(".mask", masks)
        if ".docs" in self._files:
            assert starts is not None and len(starts) == len(tokens)
            self._write(".docs", numpy.concatenate([numpy.asarray(of_row) for of_row in starts]))
        self.rows += len(tokens)

    def sync(self) -> dict[str, int]:
        """The position up to which all rows are on the disk: rows, and bytes of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {"rows": self.rows, "": 0, ".mask": 0, ".docs": 0} | {
            name: file.tell() for name, file in self._files.items()
        }

    def finish(self) -> None:
        """Write the indices; no row can be added after."""
        for name, file in self._files.items():
            file.close()
            lengths = numpy.full(self.rows, self.length, numpy.int32)
            if name == ".docs":
                starts = numpy.fromfile(self.stage / ".docs.bin", numpy.int32)
                lengths = numpy.diff(numpy.flatnonzero(starts == 0), append=len(starts))
            megatron_index.write_index(self.stage / f"{name}.idx", self._dtypes[name], lengths)

    def _write(self, name: str, numbers: NDArray[Any]) -> None:
        self._files[name].write(numpy.ascontiguousarray(numbers, self._dtypes[name]).data)


@contextlib.contextmanager
def staged(output: str) -> Iterator[Path]:
    """Yield a hidden folder next to `output` to fill with files named by suffix, and `manifest`. They get the
    prefix `output` when the block ends without an exception, and replace those of an earlier run. UserError
    where they cannot be written."""
    prefix = check_output(output)
    stage: Path | None = None
    try:
        stage = atomic_files.staging_folder(prefix)
        yield stage
        publish(stage, output)
    except OSError as error:
        raise atomic_files.cannot_write(f"--output {output}", error) from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def check_output(output: str) -> Path:
    """The prefix as a path, whose folder is created if missing. UserError where it is a directory, or nothing
    can be written."""
    prefix = Path(output)
    if output.endswith(os.sep) or prefix.is_dir() or not prefix.name:
        raise UserError(
            f"--output {output}: is a directory; give a prefix of the files' names, like {prefix / 'text'}"
        )
    atomic_files.check_writable(prefix.parent, f"--output {output}")
    return prefix


def is_manifest(path: Path) -> bool:
    """Whether it begins like a file that `write_manifest` wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            begin = file.read(400)
    except (OSError, UnicodeDecodeError):
        return False
    return '"format": ' in begin and '"kind": ' in begin and '"seq_length": ' in begin


def write_manifest(stage: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest into a staging folder, with the checksums of the other files, and return it."""
    files = [(suffix, stage / suffix) for suffix in SUFFIXES if (stage / suffix).is_file()]
    values = {**values, "checksums": row_files.checksums(files)}
    (stage / "manifest").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return values


def publish(stage: Path, output: str) -> None:
    """Move the files of a staging folder to their names, the manifest last."""
    manifest = Path(f"{output}.json")
    for path in stage.iterdir():
        atomic_files.sync(path)
    manifest.unlink(missing_ok=True)
    for suffix in (*SUFFIXES, *EXTRAS):
        new, old = stage / suffix, Path(output + suffix)
        if new.exists():
            os.replace(new, old)
        else:
            old.unlink(missing_ok=True)
    os.replace(stage / "manifest", manifest)
