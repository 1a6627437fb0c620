"""Perplexity by position over long sequences: does a model use what it read a million tokens earlier?

Rows are the beginnings of documents (.txt, .jsonl, .parquet: PG19's books, for example) that are longer than
the requested length, or packed rows in Megatron's format. The losses of a causal model at the first 4K tokens
of a row do not depend on the row's length, so each row is read once, at its longest (with dynamic NTK its
first tokens are rotated for that length).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents, megatron_index
from megatron_ultralong.data.packed_rows import PackedDataset
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.backends.protocol import LikelihoodBackend
from megatron_ultralong.evaluate.pipeline import command
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore, short_count
from megatron_ultralong.evaluate.report import curves, read_results
from megatron_ultralong.evaluate.scorers import loss_by_position
from megatron_ultralong.io.text_table import text_table

HELP = "perplexity by position over long sequences"
DESCRIPTION = "Perplexity by position: of the beginnings of documents, or of packed rows."

TokenRow = tuple[NDArray[Any], NDArray[Any] | None]
"""Tokens [S + 1], and a mask of those that count (None = all)."""


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """What is measured."""

    lengths: tuple[int, ...]
    """Predicted tokens in a row."""
    rows: int = 32
    """Rows of each length: the first that are long enough."""
    text_key: str = "text"
    """Field of .jsonl, column of .parquet."""

    def __post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < 1:
            raise UserError("--lengths: give numbers of tokens, each only once")
        if self.rows < 1:
            raise UserError("--samples must be at least 1")


def is_packed(name: str) -> bool:
    """Whether `name` is the prefix of packed rows."""
    return Path(f"{name}.idx").is_file()


def read_rows(names: list[str], tokenizer: Any, text_key: str = "text") -> Iterator[TokenRow]:
    """Yield the rows of packed prefixes and the documents of files, in order. UserError where one cannot be
    read."""
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
                ids = tokenizer.encode(document.text, verbose=False, split_special_tokens=True)
                yield numpy.asarray(ids, dtype=numpy.int64), None


def file_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Name and size of each data file, for the results. UserError where one is missing."""
    sizes = []
    for name in names:
        path = Path(f"{name}.bin" if is_packed(name) else name)
        try:
            sizes.append({"name": path.name, "bytes": path.stat().st_size})
        except OSError as error:
            raise UserError(f"--data {name} cannot be read: {error.strerror or error}") from None
    return sizes


def measure(
    backend: LikelihoodBackend,
    rows: Iterator[TokenRow],
    settings: PerplexitySettings,
    progress: Callable[[int], Any] = lambda n: None,
    *,
    data: Sequence[dict[str, Any]] = (),
) -> BenchmarkResult:
    """Measure the perplexity of the first rows of each length.

    progress: called with the number of rows finished. data: the files of the rows (`file_sizes`), for the
    results. UserError where no row is long enough for a length.
    """
    import torch

    started = time.time()
    lengths = sorted(settings.lengths)
    sums = {length: loss_by_position.zeros(length) for length in lengths}
    done = dict.fromkeys(lengths, 0)
    longest_seen = 0
    for ids, mask in rows:
        longest_seen = max(longest_seen, len(ids) - 1)
        fitting = [length for length in lengths if done[length] < settings.rows and length < len(ids)]
        if not fitting:
            continue
        longest = fitting[-1]
        nll = backend.token_nll(ids[: longest + 1].tolist())[None]  # [1, t]
        weights = (
            torch.ones_like(nll)
            if mask is None
            else torch.from_numpy(numpy.asarray(mask[1 : longest + 1], dtype=numpy.float32))[None]
        )
        for length in fitting:
            sums[length] += loss_by_position.sums(nll, weights, torch.arange(nll.shape[1]), length)
            done[length] += 1
        progress(len(fitting))
        if all(count == settings.rows for count in done.values()):
            break
    for length, count in done.items():
        if not count:
            raise UserError(
                f"--lengths {short_count(length)}: no row is that long (the longest has {longest_seen} tokens); give longer "
                "documents, or packed rows"
            )
    summaries = {length: loss_by_position.summary(sums[length], length) for length in lengths}
    return BenchmarkResult(
        task="perplexity",
        model=backend.describe(),
        settings={"lengths": lengths, "rows": settings.rows, "text_key": settings.text_key, "data": [*data]},
        scores=tuple(
            TaskScore(
                task="perplexity", length=length, score=summaries[length]["perplexity"], count=done[length]
            )
            for length in lengths
        ),
        extra={
            "by_length": {str(length): summary for length, summary in summaries.items()},
            "seconds": round(time.time() - started, 1),
        },
    )


def table(result: BenchmarkResult) -> str:
    """Perplexity by position (down) and length (across) as plain text."""
    by_length = {int(length): summary for length, summary in result.extra["by_length"].items()}
    rows = [["position", *map(short_count, by_length)]]
    for low, high in itertools.pairwise(loss_by_position.doubling(max(by_length))):
        buckets = [
            next((bucket for bucket in summary["by_position"] if bucket["from"] == low), None)
            for summary in by_length.values()
        ]
        span = f"{short_count(low)}-{short_count(high)}"
        rows.append([span, *(_number(bucket and bucket["perplexity"]) for bucket in buckets)])
    rows.append(["all", *(_number(one.score) for one in result.scores)])
    rows.append(["rows", *(str(one.count) for one in result.scores)])
    return "\n".join(text_table(rows))


def _number(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.3f}"


# ---- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_local_model_arguments(parser)
    command.add_out_argument(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE or PREFIX",
        help="documents (.txt, .jsonl, .parquet) or packed rows",
    )
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of a row, like 4K,32K; shorter documents are skipped",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        metavar="N",
        help="rows of each length, the first that are long enough (default: %(default)s)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="field or column that contains the text (default: %(default)s)",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="perplexity.json of other models, drawn in the same figure",
    )


def run_command(args: argparse.Namespace) -> None:
    settings = PerplexitySettings(
        lengths=command.parse_lengths(args.lengths), rows=args.samples, text_key=args.text_key
    )
    # Mistakes in the files are reported before the model is loaded.
    others = [read_results.read_for(path, curves.check) for path in args.beside]
    data = file_sizes(args.data)
    command.check_out(args.output)
    total = len(settings.lengths) * settings.rows
    # Under torchrun only rank 0 enters the block.
    with options.open_backend(args) as backend, command.progress_bar("perplexity", total, "row") as bar:
        backend.check(max(settings.lengths), 1)
        rows = read_rows(args.data, backend.tokenizer, args.text_key)
        result = measure(backend, rows, settings, bar.update, data=data)  # type: ignore[arg-type]
    command.write_results(
        result,
        args.output,
        table(result),
        f"and perplexity.png written, {result.extra['seconds']:.0f} s",
        lambda: curves.perplexity_by_position([result, *others], args.output / "perplexity.png"),
    )
