"""Encoded conversations on the disk until the examples are selected."""

from __future__ import annotations

import json
from array import array
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.conversations import Unusable


class SampleColumns(NamedTuple):
    """Facts of all conversations in order, each int64 [conversations]."""

    source: NDArray[numpy.int64]
    domain: NDArray[numpy.int64]
    tokens: NDArray[numpy.int64]
    trained_tokens: NDArray[numpy.int64]


class SampleBuffer:
    """Files in a staging folder: ids and trained masks of all conversations, concatenated; and the list of
    records that could not be used."""

    def __init__(self, stage: Path) -> None:
        self._paths = stage / "ids", stage / "trained"
        self._ids, self._trained = (path.open("wb") for path in self._paths)
        self._broken = stage / ".broken.jsonl"
        self._columns = array("q")

    def add(self, ids: NDArray[numpy.int32], trained: NDArray[numpy.uint8], source: int, domain: int) -> None:
        self._ids.write(ids.tobytes())
        self._trained.write(trained.tobytes())
        self._columns.extend((source, domain, len(ids), int(trained.sum())))

    def add_unusable(self, source: str, record: Unusable) -> None:
        line = {"source": source, "place": record.place, "kind": record.kind, "reason": record.reason}
        with self._broken.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self) -> SampleColumns:
        """Close the buffer for `add`; return the facts of all conversations."""
        self._ids.close()
        self._trained.close()
        columns = SampleColumns(*numpy.frombuffer(self._columns, numpy.int64).reshape(-1, 4).T)
        self._ends = numpy.cumsum(columns.tokens)
        return columns

    @cached_property
    def _mapped(self) -> tuple[NDArray[numpy.int32], NDArray[numpy.uint8]]:
        ids, trained = self._paths
        return numpy.memmap(ids, numpy.int32, "r"), numpy.memmap(trained, numpy.uint8, "r")

    def sample(self, number: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.uint8]]:
        """Return ids [n] and trained mask [n] of a conversation, once the buffer is finished."""
        span = slice(self._ends[number - 1] if number else 0, self._ends[number])
        ids, trained = self._mapped
        return ids[span], trained[span]

    def remove(self) -> None:
        for path in self._paths:
            path.unlink()
