"""One model's results beside the published figures, benchmark by benchmark, and what differs between the two.

Differences are read from the results themselves: wording of the prompts, lengths, number of samples, tasks
that are missing, prompts that were cut. A published average is compared only with one over the same lengths:
where some were not measured, no value is given.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import model_files
from megatron_ultralong.evaluate.pipeline.results import BENCHMARKS, BenchmarkResult, section, short_count
from megatron_ultralong.evaluate.report import published, tables
from megatron_ultralong.evaluate.report.cells import TableCell, mean
from megatron_ultralong.evaluate.report.read_results import ModelScores, collect
from megatron_ultralong.evaluate.tasks.ruler import averages as ruler_averages
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.text_table import paragraphs, width

AVERAGES: dict[str, tuple[str, list[int]]] = {
    **{
        column: ("ruler", ruler_averages.lengths_up_to(bound))
        for column, bound in zip(tables.RULER, ruler_averages.BOUNDS, strict=True)
    },
    **{column: ("lveval", lengths) for column, lengths in tables.LVEVAL.items()},
}
"""{column: (benchmark, lengths)} of the averages over lengths."""
NOT_RUN = "not run"
SAME = "no known difference"


@dataclass(frozen=True, kw_only=True)
class ComparedScore:
    """One line of the comparison; scores in percent."""

    benchmark: str
    measured: TableCell | None
    """None = not run, or not over the lengths of the published figure."""
    published: float | None
    """None = not recorded in published.py."""
    differences: tuple[str, ...]

    def cells(self) -> tuple[str, str, str, str]:
        """Benchmark, measured, published and what differs, as they are printed."""
        return (
            self.benchmark,
            self.measured.number() if self.measured else "-",
            f"{self.published:.2f}" if self.published is not None else "-",
            "; ".join(self.differences) or SAME,
        )


def published_name(model: Path, given: str | None) -> str | None:
    """The name in published.py of the figures to compare with: the given one, otherwise that of the released
    model in the directory; None for other models. UserError where `given` is unknown."""
    if given is not None and given not in published.STANDARD:
        raise UserError(f"--published {given}: unknown; choose from {', '.join(published.STANDARD)}")
    return given or published.released(model.resolve().name)


def read(places: list[str], model: Path) -> tuple[list[ModelScores], list[str]]:
    """Return (results of the model below `places`, lines on files that are not used). UserError where one
    is of another model."""
    results, left_out, notes = collect(places)
    name, fingerprint = model.resolve().name, model_files.fingerprint(model)
    for one in results:
        if one.fingerprint and one.fingerprint != fingerprint:
            raise UserError(
                f"{one.file} has results of another model ({one.result.model.get('path')}, files "
                f"{one.fingerprint}), not of --model {model} (files {fingerprint}); give each model its own folder"
            )
    return [replace(one, model=name, row=name) for one in results], [*left_out, *notes]


def compare(results: list[ModelScores], name: str | None) -> list[ComparedScore]:
    """Compare the results of one model, all of the same row, with the published figures `name`."""
    rows: dict[str, dict[str, TableCell]] = {}
    for table in tables.build(results, with_published=False):
        rows[table.name] = next(iter(table.rows.values()))
    figures = {**published.LONG.get(name or "", {}), **published.STANDARD.get(name or "", {})}
    of_kind = {kind: [one for one in results if one.kind == kind] for kind in BENCHMARKS}
    infinitebench = rows.get("long_context", {}).get("InfiniteBench")
    return [
        _passkey(of_kind["niah"], published.PASSKEY_UP_TO.get(name or "")),
        *(
            _average(column, expected, of_kind[kind], rows, figures.get(column))
            for column, (kind, expected) in AVERAGES.items()
        ),
        _compared(
            "InfiniteBench",
            of_kind["infinitebench"],
            infinitebench,
            figures.get("InfiniteBench"),
            _answers(of_kind["infinitebench"]),
        ),
        *_standard(of_kind["standard"], rows.get("standard", {}), figures),
    ]


def _compared(
    benchmark: str,
    results: list[ModelScores],
    cell: TableCell | None,
    figure: float | None,
    differences: Iterable[str],
) -> ComparedScore:
    """A line of the comparison; the notes of the cell are differences too."""
    every = [*differences, *_notes(cell)] if results else [NOT_RUN]
    return ComparedScore(
        benchmark=benchmark, measured=cell, published=figure, differences=tuple(dict.fromkeys(every))
    )


def _passkey(results: list[ModelScores], up_to: int | None) -> ComparedScore:
    """The mean over all measured lengths. up_to: tokens up to which 100% were published."""
    cells = {length: cell for one in results for length, cell in one.scores.items()}
    measured, complete = _short(cells), not up_to or max(cells, default=0) >= up_to
    lengths = f"published at every length up to {short_count(up_to)}, " if up_to else ""
    differences = [f"{lengths}measured at {measured}", *_answers(results)]
    for one in results:
        settings = one.result.settings
        differences += [str(settings[key]) for key in ("prompt", "grid") if key in settings]
        if isinstance(settings.get("depths"), list) and "trials" in settings:
            depths, trials = len(settings["depths"]), settings["trials"]
            differences.append(f"{depths * trials} prompts per length, at {depths} depths")
    cell = mean(cells.values()) if cells and complete else None
    return _compared("passkey", results, cell, 100.0 if up_to else None, differences)


def _average(
    column: str,
    expected: list[int],
    results: list[ModelScores],
    rows: dict[str, dict[str, TableCell]],
    figure: float | None,
) -> ComparedScore:
    """An average over the lengths `expected`; without a value where one of them was not measured."""
    measured = {length for one in results for scores in one.scores.values() for length in scores}
    missing = [length for length in expected if length not in measured]
    if not results or not missing:
        return _compared(column, results, rows.get("long_context", {}).get(column), figure, _answers(results))
    lengths = (
        f"the average also contains {_short(missing)}"
        if figure is None
        else f"published over lengths up to {short_count(expected[-1])}"
    )
    by_length = rows[results[0].kind].values()
    return _compared(
        column,
        results,
        None,
        figure,
        [f"{lengths}, measured over {_short(measured)}", *_answers(results), *_notes(mean(by_length))],
    )


def _standard(
    results: list[ModelScores], cells: dict[str, TableCell], figures: dict[str, float]
) -> list[ComparedScore]:
    """The five standard benchmarks, and their average."""
    compared = []
    for benchmark, shots in published.SHOTS.items():
        used = [one for one in results if benchmark in one.scores][-1:]
        differences = [*_answers(used), *(line for one in used for line in _harness(one.result, benchmark))]
        compared.append(
            _compared(
                f"{benchmark}, {shots} shots", used, cells.get(benchmark), figures.get(benchmark), differences
            )
        )
    missing = [benchmark for benchmark in published.SHOTS if benchmark not in cells]
    differences = [f"not run: {', '.join(missing)}"] if missing else []
    average = _compared(
        "average of the five", results, cells.get("average"), figures.get("average"), differences
    )
    return [*compared, average]


def _harness(result: BenchmarkResult, benchmark: str) -> list[str]:
    """The task and metric that a standard benchmark was run with; its shots where others are published."""
    for values in section(result.settings, "paper").values():
        if isinstance(values, dict) and values.get("name") == benchmark:
            harness, shots = result.settings.get("harness", "lm-evaluation-harness"), values.get("shots")
            stated = published.SHOTS[benchmark]
            return [
                f"prompts and scorer of {harness}: {values.get('task')}, {values.get('metric')}",
                *([f"{shots} shots (published: {stated})"] if shots != stated else []),
            ]
    return ["task and shots are not recorded"]


def _answers(results: list[ModelScores]) -> list[str]:
    """How answers were generated where that is not the default, greedy and in the model's chat template."""
    differences: list[str] = []
    for one in results:
        settings = section(one.result.model, "settings")
        if temperature := settings.get("temperature"):
            differences.append(f"sampled at temperature {temperature:g}")
        if settings.get("chat") == "no":
            differences.append("chat template not used")
    return differences


def _notes(cell: TableCell | None) -> list[str]:
    return [f"{note}: {count}" if count else note for note, count in cell.notes.items()] if cell else []


def _short(lengths: Iterable[int]) -> str:
    return ", ".join(map(short_count, sorted(lengths)))


# ---- output ------------------------------------------------------------------------------------


def heading(model: Path, name: str | None) -> str:
    figures = f"beside the published figures of {name}" if name else "without published figures"
    return f"{model.resolve().name} by the protocol of {published.SOURCE}, {figures} (%)"


def as_text(scores: list[ComparedScore]) -> str:
    """The comparison as an aligned table; long differences continue on the next lines."""
    lines = [f"{'benchmark':21}{'measured':>9}{'published':>11}   what differs"]
    indent = len(lines[0]) - len("what differs")
    for score in scores:
        benchmark, measured, figure, differences = score.cells()
        first, *rest = textwrap.wrap(differences, width() - indent)
        lines.append(f"{benchmark:21}{measured:>9}{figure:>11}   {first}")
        lines += [" " * indent + line for line in rest]
    return "\n".join([*lines, "", *paragraphs([published.NOT_STATED], "")])


def write(scores: list[ComparedScore], model: Path, name: str | None, out: Path) -> None:
    """Write published.md and published.csv into `out`. UserError where they cannot be written."""
    columns = ("benchmark", "measured", "published", "what differs")
    atomic_files.check_writable(out, f"--output {out}")
    text = [f"# {heading(model, name)}", "", f"| {' | '.join(columns)} |", "|---|---:|---:|---|"]
    text += [f"| {' | '.join(score.cells())} |" for score in scores]
    atomic_files.write_text(out / "published.md", "\n".join([*text, "", published.NOT_STATED]) + "\n")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *(score.cells() for score in scores)])
    atomic_files.write_text(out / "published.csv", table.getvalue())
