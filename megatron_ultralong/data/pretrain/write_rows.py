"""Rows of documents from the token cache, written so that a run that was stopped resumes at a row."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.pretrain.row_layout import SEPARATOR, RowLayout
from megatron_ultralong.data.pretrain.token_cache import TokenCache, TokenReader
from megatron_ultralong.data.row_writer import RowWriter
from megatron_ultralong.io.progress import progress_bar

_BLOCK = 32 << 20  # bytes of rows written at a time
_SYNC = 1 << 30  # bytes of rows between two syncs of the disk, each of which records the position


@dataclass(frozen=True, kw_only=True)
class RowContent:
    """The rows to write."""

    cache: TokenCache
    order: NDArray[numpy.int64]
    """Documents of the cache in packing order."""
    layout: RowLayout
    length: int
    """S + 1."""
    dtype: numpy.dtype[Any]
    separator: list[int]
    pad: int
    document_starts: bool
    """Write them too."""

    def fill(self, block: NDArray[Any], first: int, reader: TokenReader) -> NDArray[numpy.int64]:
        """Write the rows from `first` into block [n, S + 1], without padding; returns their tokens, int64
        [n]."""
        separator, filled = numpy.array(self.separator, self.dtype), numpy.empty(len(block), numpy.int64)
        for k, row in enumerate(block):
            for segment in self.layout.segments(first + k):
                tokens = row[segment.at : segment.at + segment.length]
                if segment.document == SEPARATOR:
                    tokens[:] = separator[segment.begin : segment.begin + segment.length]
                else:
                    reader.read_into(tokens, int(self.order[segment.document]), segment.begin)
            filled[k] = segment.at + segment.length
        return filled


def write_rows(work: Path, content: RowContent, settings: list[Any], show_progress: bool) -> Path:
    """Write all rows into a staging folder in `work`, from the last position of an earlier run with the same
    content and `settings` (plain values); returns the folder."""
    plan = (content.cache.folder / "plan.json").read_text(encoding="utf-8")
    identity = hashlib.sha256(
        json.dumps([plan, *settings, content.separator, content.pad]).encode() + content.order.tobytes()
    ).hexdigest()
    stage, progress = work / "rows", work / "progress.json"
    position = _position(progress, stage, identity)
    if position is None:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
    layout = content.layout
    writer = RowWriter(
        stage,
        content.length,
        content.dtype,
        masks=bool(layout.padding),
        starts=content.document_starts,
        position=position,
    )

    def sync() -> None:
        progress.write_text(json.dumps({"identity": identity} | writer.sync()))

    reader, row_size, unsynced = TokenReader(content.cache), content.length * content.dtype.itemsize, 0
    with progress_bar("packing", layout.rows, "row", initial=writer.rows, hidden=not show_progress) as bar:
        while writer.rows < layout.rows:
            first, count = writer.rows, min(max(1, _BLOCK // row_size), layout.rows - writer.rows)
            block = numpy.full((count, content.length), content.pad, content.dtype)
            filled = content.fill(block, first, reader)
            writer.add(
                block,
                numpy.arange(content.length) < filled[:, None] if layout.padding else None,
                [layout.document_starts(first + k) for k in range(count)]
                if content.document_starts
                else None,
            )
            bar.update(count)
            unsynced += block.nbytes
            if unsynced >= _SYNC:
                unsynced = 0
                sync()
    sync()
    writer.finish()
    return stage


def _position(progress: Path, stage: Path, identity: str) -> dict[str, int] | None:
    """Rows and bytes that are certainly on the disk; None = none of these rows."""
    try:
        position = json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if position.pop("identity") != identity:
        return None

    def size(name: str) -> int:
        path = stage / f"{name}.bin"
        return path.stat().st_size if path.exists() else 0

    return position if all(size(name) >= position[name] for name in ("", ".mask", ".docs")) else None
