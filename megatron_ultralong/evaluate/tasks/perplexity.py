"""Perplexity over long sequences by position: does a model make use of what it read a million tokens before?

Rows are the beginnings of documents (.txt, .jsonl, .parquet: PG19's books, say), each longer than the length
asked for, or packed rows of Megatron's form. A causal model's losses at the first 4K tokens of a row are the
same at any length of it, so each row is read once, at its longest.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from megatron_ultralong.data import documents, megatron_index
from megatron_ultralong.data.packed_rows import PackedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.report.heat_map import tokens as short
from megatron_ultralong.evaluate.scorers import loss_by_position

FORMAT = 1
"""Version of the results JSON."""

Row = tuple[NDArray[Any], NDArray[Any] | None]
"""Tokens [S + 1], and which of them count (None = all)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    lengths: tuple[int, ...]
    """Tokens that are foretold in a row."""
    rows: int = 32
    """Rows of each length, the first long enough."""
    text_key: str = "text"
    """Field of .jsonl, column of .parquet."""

    def __post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < 1:
            raise UserError("--lengths: give numbers of tokens, each only once")
        if self.rows < 1:
            raise UserError("--rows must be at least 1")


def is_packed(name: str) -> bool:
    """Whether `name` is the prefix of packed rows."""
    return Path(f"{name}.idx").is_file()


def read(names: list[str], tokenizer: Any, text_key: str = "text") -> Iterator[Row]:
    """The rows of packed prefixes and the documents of files, in order. UserError where one cannot be read or
    broken documents are met."""
    for name in names:
        if is_packed(name):
            row_length = int(megatron_index.read_index(Path(f"{name}.idx")).lengths[0])
            packed = PackedDataset(name, row_length - 1)
            packed.check_vocabulary(len(tokenizer))
            for i in range(len(packed)):
                yield packed[i]
        else:
            documents.check([Path(name)])
            for document in documents.read(documents.FileRange(Path(name)), text_key=text_key):
                yield (
                    numpy.asarray(tokenizer.encode(document.text, verbose=False), dtype=numpy.int64),
                    None,
                )


def sources(names: list[str]) -> list[dict[str, Any]]:
    """Name and size of each of `names`, for the results. UserError where one is not there."""
    found = []
    for name in names:
        path = Path(f"{name}.bin" if is_packed(name) else name)
        try:
            found.append({"name": path.name, "bytes": path.stat().st_size})
        except OSError as error:
            raise UserError(f"--data {name} cannot be read: {error.strerror or error}") from None
    return found


def measure(
    backend: Any,
    rows: Iterator[Row],
    settings: Settings,
    progress: Callable[[int], Any] = lambda n: None,
    *,
    data: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The results JSON's values. backend: backends.Weights, of which `token_nll` and `describe` are asked.
    progress: told of rows as they are done. data: what the rows are of, as `sources` tells it, for the
    results.

    UserError where no row is long enough for a length.
    """
    started = time.time()
    lengths = sorted(settings.lengths)
    found = {
        length: torch.zeros(2, len(loss_by_position.edges(length)) - 1, dtype=torch.float64)
        for length in lengths
    }
    done = dict.fromkeys(lengths, 0)
    longest_seen = 0
    for ids, counts in rows:
        longest_seen = max(longest_seen, len(ids) - 1)
        fitting = [length for length in lengths if done[length] < settings.rows and length < len(ids)]
        if not fitting:
            continue
        nll = backend.token_nll(ids[: fitting[-1] + 1].tolist())[None]  # [1, t]
        weights = (
            torch.ones_like(nll)
            if counts is None
            else torch.from_numpy(numpy.asarray(counts[1 : fitting[-1] + 1], dtype=numpy.float32))[None]
        )
        for length in fitting:
            found[length] += loss_by_position.sums(nll, weights, torch.arange(nll.shape[1]), length)
            done[length] += 1
        progress(len(fitting))
        if all(count == settings.rows for count in done.values()):
            break
    for length, count in done.items():
        if not count:
            raise UserError(
                f"--lengths {short(length)}: no row is that long (the longest has {longest_seen} tokens); give longer documents, "
                "or packed rows"
            )
    return {
        "format": FORMAT,
        "task": "perplexity",
        "model": backend.describe(),
        "settings": {
            "lengths": lengths,
            "rows": settings.rows,
            "text_key": settings.text_key,
            "data": [*data],
        },
        "scores": {
            str(length): {**loss_by_position.summary(found[length], length), "rows": done[length]}
            for length in lengths
        },
        "seconds": round(time.time() - started, 1),
    }


def table(result: dict[str, Any]) -> str:
    """Perplexity by position (down) and length (across) as plain text."""
    scores = {int(length): values for length, values in result["scores"].items()}
    bounds = loss_by_position.doubling(max(scores))
    lines = ["position".rjust(12) + "".join(short(length).rjust(10) for length in scores)]
    for low, high in itertools.pairwise(bounds):
        cells = [
            next((row for row in values["by_position"] if row["from"] == low), None)
            for values in scores.values()
        ]
        lines.append(
            f"{short(low)}-{short(high)}".rjust(12) + "".join(_number(cell).rjust(10) for cell in cells)
        )
    lines.append("all".rjust(12) + "".join(_number(values).rjust(10) for values in scores.values()))
    lines.append("rows".rjust(12) + "".join(str(values["rows"]).rjust(10) for values in scores.values()))
    return "\n".join(lines)


def _number(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None or cell["perplexity"] is None else f"{cell['perplexity']:.3f}"
