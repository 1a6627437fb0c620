"""Encoded conversations on the disk until it is known which of them are taken."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.conversations import Unusable


class Spill:
    """Files in a staging folder: ids and marks of all conversations one after another; and what could not be
    used, for people."""

    def __init__(self, stage: Path) -> None:
        self._paths = stage / "ids", stage / "trained"
        self._ids, self._trained = (path.open("wb") for path in self._paths)
        self._broken = stage / ".broken.jsonl"
        self._table = array("q")

    def add(self, ids: NDArray[numpy.int32], trained: NDArray[numpy.uint8], source: int, domain: int) -> None:
        self._ids.write(ids.tobytes())
        self._trained.write(trained.tobytes())
        self._table.extend((source, domain, len(ids), int(trained.sum())))

    def tell(self, source: str, one: Unusable) -> None:
        with self._broken.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps(
                    {"source": source, "place": one.place, "kind": one.kind, "reason": one.reason},
                    ensure_ascii=False,
                )
                + "\n"
            )

    def finish(self) -> tuple[NDArray[numpy.int64], ...]:
        """Of all in order: source, domain, tokens, trained tokens, each int64 [conversations]. Nothing can be
        added after."""
        self._ids.close()
        self._trained.close()
        table = numpy.frombuffer(self._table, numpy.int64).reshape(-1, 4)
        self._ends = numpy.cumsum(table[:, 2])
        return tuple(table.T)

    def read(self) -> tuple[NDArray[numpy.int64], NDArray[numpy.int32], NDArray[numpy.uint8]]:
        """(where each ends, all ids, all marks)."""
        return (
            self._ends,
            numpy.memmap(self._paths[0], numpy.int32, "r"),
            numpy.memmap(self._paths[1], numpy.uint8, "r"),
        )

    def remove(self) -> None:
        for path in self._paths:
            path.unlink()
