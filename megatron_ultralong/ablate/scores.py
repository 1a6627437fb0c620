"""The scores of finished cells: means over seeds, and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ultralong.ablate.grid import Cell
from megatron_ultralong.ablate.plan import Job
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.report import read_results

NAMES = {"niah": "passkey", "perplexity": "perplexity"}
"""Benchmark -> what the tables call its score."""


@dataclass(frozen=True)
class Spread:
    """A score over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None = a single run."""
    values: tuple[float, ...]
    """In the order of the seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, tuple(values))

    def text(self, digits: int) -> str:
        mean = f"{self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The finished cells of one combination of values."""

    label: str
    values: dict[str, str]
    seeds: tuple[int, ...]
    """Of the finished cells; empty = untrained."""
    planned: int
    """Cells of the grid."""
    tokens: int
    """Trained on in each cell."""
    scores: dict[tuple[str, int], Spread]
    """(benchmark, length in tokens) -> score: percent of pass keys, or perplexity."""
    by_position: BenchmarkResult | None
    """Perplexity by position, its losses averaged over seeds; None = not evaluated."""


def rows(cells: Sequence[tuple[Cell, Job]], finished: Sequence[str]) -> list[Row]:
    """One row for each combination of values that has a finished cell. finished: names of jobs. UserError
    where results cannot be read."""
    groups: dict[tuple[str, ...], list[tuple[Cell, Job]]] = {}
    for cell, job in cells:
        groups.setdefault(tuple(cell.values.values()), []).append((cell, job))
    made = []
    for group in groups.values():
        done = [(cell, job) for cell, job in group if job.name in finished]
        if done:
            made.append(_row(done, len(group)))
    return made


def _row(done: Sequence[tuple[Cell, Job]], planned: int) -> Row:
    cell, job = done[0]
    scores: dict[tuple[str, int], list[float]] = {}
    results: dict[str, list[BenchmarkResult]] = {}
    for _, one in done:
        for name in cell.evaluate:
            result = read_results.read_for(one.folder / name / f"{name}.json", lambda result: None)
            results.setdefault(name, []).append(result)
            for score in result.scores:
                if score.length is not None and score.score is not None:
                    scores.setdefault((name, score.length), []).append(score.score)
    return Row(
        label=cell.label,
        values=cell.values,
        seeds=tuple(one.seed for one, _ in done if one.seed is not None),
        planned=planned,
        tokens=job.tokens,
        scores={key: Spread.of(values) for key, values in scores.items()},
        by_position=mean_by_position(results["perplexity"], cell.label) if "perplexity" in results else None,
    )


def mean_by_position(results: Sequence[BenchmarkResult], label: str) -> BenchmarkResult:
    """Perplexity results of several models as one, named `label`: its losses are their mean, so its
    perplexities are geometric means."""

    def mean(summaries: list[dict[str, Any]]) -> dict[str, Any]:
        losses = [one["nll"] for one in summaries]
        nll = None if None in losses else statistics.fmean(losses)
        return {**summaries[0], "nll": nll, "perplexity": None if nll is None else math.exp(min(nll, 700.0))}

    by_length = {}
    for length in results[0].extra["by_length"]:
        summaries = [result.extra["by_length"][length] for result in results]
        by_length[length] = {
            **mean(summaries),
            **{
                name: [mean(list(buckets)) for buckets in zip(*(one[name] for one in summaries), strict=True)]
                for name in ("by_position", "by_sixteenth")
            },
        }
    return BenchmarkResult(
        task="perplexity",
        model={"name": label},
        settings=results[0].settings,
        scores=(),
        extra={"by_length": by_length},
    )
