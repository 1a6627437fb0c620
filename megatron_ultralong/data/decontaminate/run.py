"""Training text searched for n-grams of benchmarks, file by file, by any number of processes. A stopped run
resumes with the first file that is not complete.

    OUTPUT/NAME                     each input file with contaminated documents treated, unless they are only
                                    reported; NAME.jsonl for a NAME.json or NAME.parquet of conversations
    OUTPUT/report.json              counts, and some matches of each benchmark
    OUTPUT/{matches,broken}.jsonl   every match; every unreadable line, which is not in the output
    OUTPUT/.decontaminate/          settings; NAME.json and both lists of each file that is complete

The NAME.json of a file is written last: without it the file is searched again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_ultralong.data import conversations, documents, input_files
from megatron_ultralong.data.decontaminate import filter_files
from megatron_ultralong.data.decontaminate.benchmark_index import NgramRules, build_index
from megatron_ultralong.data.decontaminate.normalise import Normalisation
from megatron_ultralong.data.decontaminate.report import build_report
from megatron_ultralong.data.decontaminate.scan import BatchScan, BatchScanner, ContaminationPolicy, to_json
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.progress import counted, progress_bar
from megatron_ultralong.io.workers import WorkerPool
from megatron_ultralong.official_files import find
from megatron_ultralong.official_files.records import BenchmarkExample

FORMAT = 1
"""Format version of the settings, of the record of a complete file, and of the report."""
LISTS = ("matches", "broken")


@dataclass(frozen=True, kw_only=True)
class DecontaminationSettings:
    """What is searched for, in which text, and what happens to matching documents."""

    rules: NgramRules = field(default_factory=NgramRules)
    normalisation: Normalisation = field(default_factory=Normalisation)
    policy: ContaminationPolicy = field(default_factory=ContaminationPolicy)
    text_key: str = "text"
    """Field or column of a document's text."""
    form: str | None = None
    """Form of conversations (conversations.py), which are written as .jsonl in the form `messages`; None =
    documents, or `messages` in .jsonl."""


def decontaminate(
    inputs: Sequence[Path],
    benchmarks: Sequence[str],
    output: Path,
    settings: DecontaminationSettings,
    *,
    workers: int = 1,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Search `inputs` for `benchmarks` and write `output`; return the report.

    inputs: files of documents; or files, folders or globs of conversations. benchmarks: NAME=WHERE each
    (names of find.py, or text=FILE.jsonl). workers: processes that search; 0 or 1 = this one; the output does
    not depend on it. UserError for mistakes of the user; files that are complete by then are kept, and the
    next run skips them.
    """
    form = settings.form
    if form is not None:
        conversations.check_form(form)
        inputs = conversations.files(map(str, inputs))
    _check_names(inputs, output, settings)
    size = documents.check(inputs) if form is None else sum(path.stat().st_size for path in inputs)
    benchmark_files = _find_benchmarks(benchmarks)
    examples = _read_benchmarks(benchmark_files)
    index = build_index(
        counted(examples, "benchmarks", "example", hidden=not show_progress),
        settings.rules,
        settings.normalisation,
    )
    recorded = {
        "format": FORMAT,
        "rules": asdict(settings.rules),
        "normalise": list(settings.normalisation.steps),
        "treatment": asdict(settings.policy),
        "text_key": settings.text_key,
        "form": form,
        "benchmarks": index.digest(),
    }
    statistics = index.statistics
    with _work_folder(output, recorded) as work:
        index_folder = work / "partial" / "index"
        index.save(index_folder)
        del index  # from here on each process maps the saved one
        with (
            progress_bar("searching", size, "B", hidden=not show_progress) as bar,
            WorkerPool(
                workers, BatchScanner.load, (index_folder, settings.policy, settings.text_key)
            ) as pool,
        ):
            for path in inputs:
                if _complete(path, output, form) is not None:
                    bar.update(path.stat().st_size)
                    continue
                if (work / f"{path.name}.json").exists():
                    bar.write(
                        f"{path}: changed, or its output was removed, since it was searched; searching again"
                    )
                _filter_file(path, output, settings, pool, bar)
        report = build_report(
            recorded,
            benchmark_files,
            statistics,
            [record for path in inputs if (record := _complete(path, output, form)) is not None],
            _read_lists(inputs, work, "matches"),
            _read_lists(inputs, work, "broken"),
        )
        for name in LISTS:
            with atomic_files.whole_file(output / f"{name}.jsonl") as file:
                file.writelines(to_json(item) + b"\n" for item in _read_lists(inputs, work, name))
        atomic_files.write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    return report


def _check_names(inputs: Sequence[Path], output: Path, settings: DecontaminationSettings) -> None:
    inputs_by_name: dict[str, Path] = {}
    for path in inputs:
        if (
            settings.form is None
            and filter_files.kind_of(path)[0] == ".txt"
            and settings.policy.pieces == "split"
        ):
            raise UserError(f"{path}: a .txt contains one document; use --pieces join, or give .jsonl")
        name = filter_files.output_name(path, settings.form)
        if name in inputs_by_name:
            raise UserError(
                f"{inputs_by_name[name]} and {path} have the same name, and both would be written as {output / name}; "
                "use two output directories, or rename one"
            )
        if name in input_files.REPORTS:
            raise UserError(f"{path}: {name} is the name of an output file; rename the input")
        inputs_by_name[name] = path
        if path.parent.resolve() == output.resolve():
            raise UserError(
                f"--output {output}: contains the input {path.name}, which would be replaced; choose another directory"
            )


def _find_benchmarks(benchmarks: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each benchmark, from NAME=WHERE."""
    paths: dict[str, list[Path]] = {}
    for benchmark in benchmarks:
        name, equals, where = benchmark.partition("=")
        if not equals or not where:
            raise UserError(
                f"--benchmark {benchmark}: give NAME=PATH or NAME=hub, with NAME one of {', '.join(find.BENCHMARKS)}; "
                "or text=FILE.jsonl"
            )
        if name == "text" and not Path(where).is_file():
            raise UserError(f"--benchmark {benchmark}: no such file")
        paths.setdefault(name, []).extend([Path(where)] if name == "text" else find.find_files(name, where))
    return paths


def _read_benchmarks(benchmark_files: dict[str, list[Path]]) -> Iterator[BenchmarkExample]:
    for name, paths in benchmark_files.items():
        if name == "text":
            yield from chain.from_iterable(map(find.read_custom, paths))
        else:
            yield from find.read_examples(name, paths)


@contextlib.contextmanager
def _work_folder(output: Path, recorded: dict[str, Any]) -> Iterator[Path]:
    """OUTPUT/.decontaminate for these settings, with a folder `partial` that exists only meanwhile. UserError
    if it was used with other settings."""
    work = output / ".decontaminate"
    settings_file, partial = work / "settings.json", work / "partial"
    try:
        if settings_file.is_file():
            before = json.loads(settings_file.read_text(encoding="utf-8"))
            changed = [name for name in recorded if recorded[name] != before.get(name)]
            if changed:
                raise UserError(
                    f"--output {output}: started with other settings ({', '.join(changed)}); "
                    "choose another directory, or remove it"
                )
        elif output.is_dir() and any(path != work for path in output.iterdir()):
            raise UserError(f"--output {output}: is not empty; choose another directory")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        atomic_files.write_text(settings_file, json.dumps(recorded, indent=1))
        yield work
    except OSError as error:
        raise atomic_files.cannot_write(f"--output {output}", error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _filter_file(
    path: Path, output: Path, settings: DecontaminationSettings, pool: WorkerPool, bar: Any
) -> None:
    """Search one file, and write its output, its lists and, last, its record."""
    work, form = output / ".decontaminate", settings.form
    state, counts = _file_state(path), BatchScan().counts
    written = settings.policy.action != "report"
    target = output / filter_files.output_name(path, form)
    with contextlib.ExitStack() as stack:
        writer = None
        if written:
            file = stack.enter_context(atomic_files.whole_file(target))
            writer = filter_files.open_writer(path, file, settings.text_key, form)
            stack.callback(writer.close)
        lists = {
            name: stack.enter_context(atomic_files.whole_file(work / f"{path.name}.{name}")) for name in LISTS
        }
        batches = filter_files.read_batches(path, settings.text_key, form, bar.update)
        for batch, rows, scan in pool.map(batches):
            for name in LISTS:
                lists[name].writelines(to_json(item) + b"\n" for item in getattr(scan, name))
            for name, count in scan.counts.items():
                counts[name] += count
            if writer is not None:
                writer.write(batch, rows, scan.edits)
        if _file_state(path) != state:
            raise UserError(f"{path}: changed while it was read; run the same command again")
    if form is None and filter_files.kind_of(path)[0] == ".txt" and counts["dropped"] + counts["broken"]:
        target.unlink(missing_ok=True)  # no document, no file
        written = False
    record = {"file": str(path), **state, "written": written, "counts": counts}
    atomic_files.write_text(work / f"{path.name}.json", json.dumps(record))


def _file_state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def _complete(path: Path, output: Path, form: str | None) -> dict[str, Any] | None:
    """Return the record of a file that is complete and has not changed since, otherwise None."""
    try:
        record = json.loads((output / ".decontaminate" / f"{path.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    expected = {"file": str(path), **_file_state(path)}
    unchanged = all(record[name] == value for name, value in expected.items())
    output_exists = not record["written"] or (output / filter_files.output_name(path, form)).is_file()
    return record if unchanged and output_exists else None


def _read_lists(inputs: Sequence[Path], work: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the items of one of LISTS of every file, in order."""
    for path in inputs:
        with (work / f"{path.name}.{name}").open("rb") as file:
            yield from map(json.loads, file)
