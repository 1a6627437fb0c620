"""Training text searched for the words of benchmarks, file by file, by any number of processes; what was done
already is not done again.

    OUTPUT/NAME                           each file of the input, with its contaminated documents treated; none where they are only reported;
                                          NAME.jsonl for a NAME.json or NAME.parquet of conversations
    OUTPUT/report.json                    counts, and some matches of each benchmark
    OUTPUT/{matches,broken}.jsonl         every match; every line that could not be read, which is not in the output
    OUTPUT/.decontaminate/                settings; NAME.json and both lists of each file that is done

A file is written in OUTPUT/.decontaminate/partial and renamed when whole, its NAME.json last: without it
nothing counts as done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ultralong.data import conversations, documents, input_files
from megatron_ultralong.data.decontaminate import benchmark_index, filter_files
from megatron_ultralong.data.decontaminate import report as contamination_report
from megatron_ultralong.data.decontaminate.benchmark_index import Rules
from megatron_ultralong.data.decontaminate.normalise import Normalise
from megatron_ultralong.data.decontaminate.scan import Outcome, Scanner, Treatment, to_json
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.workers import WorkerPool
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files.records import Example

FORMAT = 1
"""Of the settings, the files of a file that is done, and the report."""
LISTS = ("matches", "broken")


def run(
    inputs: Sequence[Path],
    benchmarks: Sequence[str],
    output: Path,
    *,
    rules: Rules,
    normalise: Normalise,
    treatment: Treatment,
    text_key: str = "text",
    form: str | None = None,
    workers: int = 1,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Search `inputs` for `benchmarks`, each NAME=WHERE (find.py's names, or text=FILE.jsonl), into `output`;
    the report.

    form: `inputs` are files, folders or globs of conversations in that form (conversations.py), written as
    .jsonl in the form `messages`; None = documents, or `messages` in .jsonl, with their text under
    `text_key`. workers: processes that search; 0 or 1 = this one. The output is the same whatever their
    number. UserError for what a user can mend; files that were done by then stay, and are passed over the
    next time.
    """
    if form is not None:
        conversations.check_form(form)
        inputs = conversations.files(map(str, inputs))
    _check(inputs, output, treatment, form)
    size = documents.check(inputs) if form is None else sum(path.stat().st_size for path in inputs)
    sources = _sources(benchmarks)
    index = benchmark_index.build(
        tqdm(_examples(sources), desc="benchmarks", unit=" examples", disable=not show_progress),
        rules,
        normalise,
    )
    settings = {
        "format": FORMAT,
        "rules": asdict(rules),
        "normalise": list(normalise.steps),
        "treatment": asdict(treatment),
        "text_key": text_key,
        "form": form,
        "benchmarks": index.digest(),
    }
    work = output / ".decontaminate"
    statistics = index.statistics
    with _workplace(output, work, settings):
        index.save(work / "partial" / "index")
        del index  # from here on each process has its own, on that file
        with (
            tqdm(total=size, unit="B", unit_scale=True, desc="searching", disable=not show_progress) as bar,
            WorkerPool(workers, Scanner.open, (work / "partial" / "index", treatment, text_key)) as pool,
        ):
            for path in inputs:
                if _done(path, output, work, form) is None:
                    if (work / f"{path.name}.json").exists():
                        bar.write(
                            f"{path}: has changed, or its output is gone, since it was searched; searched again"
                        )
                    _search(path, output, work, treatment, text_key, form, pool, bar)
                else:
                    bar.update(path.stat().st_size)
        done = [_done(path, output, work, form) for path in inputs]
        made = contamination_report.make(
            settings,
            {name: [str(path) for path in paths] for name, paths in sources.items()},
            statistics,
            done,
            _all(inputs, work, "matches"),
            _all(inputs, work, "broken"),
        )
        for name in LISTS:
            _write(
                output / f"{name}.jsonl", (to_json(item) + b"\n" for item in _all(inputs, work, name)), work
            )
        _write(
            output / "report.json",
            [json.dumps(made, indent=1, ensure_ascii=False).encode(errors="backslashreplace")],
            work,
        )
    return made


def _check(inputs: Sequence[Path], output: Path, treatment: Treatment, form: str | None) -> None:
    names: dict[str, Path] = {}
    for path in inputs:
        if form is None and filter_files.kind(path)[0] == ".txt" and treatment.pieces == "split":
            raise UserError(f"{path}: a .txt holds one document; use --pieces join, or give .jsonl")
        name = filter_files.output_name(path, form)
        if name in names:
            raise UserError(
                f"{names[name]} and {path} have the same name, and both would be written as {output / name}; "
                "search them into two directories, or rename one"
            )
        if name in input_files.REPORTS:
            raise UserError(f"{path}: {name} is the name of a result; rename the file")
        names[name] = path
        if path.parent.resolve() == output.resolve():
            raise UserError(
                f"--output {output}: holds the input {path.name}, which would be replaced; choose another directory"
            )


def _sources(benchmarks: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each benchmark, from NAME=WHERE."""
    sources: dict[str, list[Path]] = {}
    for benchmark in benchmarks:
        name, equals, where = benchmark.partition("=")
        if not equals or not where:
            raise UserError(
                f"--benchmark {benchmark}: give NAME=PATH or NAME=hub, with NAME of {', '.join(official_files.BENCHMARKS)}, or text=FILE.jsonl"
            )
        if name == "text" and not Path(where).is_file():
            raise UserError(f"--benchmark {benchmark}: no such file")
        sources.setdefault(name, []).extend(
            [Path(where)] if name == "text" else official_files.find(name, where)
        )
    return sources


def _examples(sources: dict[str, list[Path]]) -> Iterator[Example]:
    for name, paths in sources.items():
        if name == "text":
            yield from chain.from_iterable(map(official_files.read_own, paths))
        else:
            yield from official_files.read(name, paths)


@contextlib.contextmanager
def _workplace(output: Path, work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """`work` for these settings, with an empty folder `partial` that is removed again. UserError where it was
    used with others."""
    state, partial = work / "settings.json", work / "partial"
    try:
        if state.is_file():
            before = json.loads(state.read_text(encoding="utf-8"))
            changed = [name for name in settings if settings[name] != before.get(name)]
            if changed:
                raise UserError(
                    f"--output {output}: begun with other settings ({', '.join(changed)}); choose another directory, or remove it"
                )
        elif output.is_dir() and any(path != work for path in output.iterdir()):
            raise UserError(f"--output {output}: is not empty; choose another directory")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(state, [json.dumps(settings, indent=1).encode()], work)
        yield
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _search(
    path: Path,
    output: Path,
    work: Path,
    treatment: Treatment,
    text_key: str,
    form: str | None,
    pool: WorkerPool,
    bar: Any,
) -> None:
    """One file, from its first line to the renaming of what came of it."""
    partial, before, name_out = work / "partial", _state(path), filter_files.output_name(path, form)
    made: dict[str, Any] = {"file": str(path), **before, "written": treatment.action != "report"}
    counts = Outcome().counts
    target = filter_files.writer(path, partial / name_out, text_key, form) if made["written"] else None
    with contextlib.ExitStack() as stack:
        lists = {name: stack.enter_context((partial / f"{path.name}.{name}").open("wb")) for name in LISTS}
        if target is not None:
            stack.callback(target.close)
        for batch, rest, outcome in pool.map(filter_files.batches(path, text_key, form, bar.update)):
            for name in LISTS:
                lists[name].writelines(to_json(item) + b"\n" for item in getattr(outcome, name))
            for name, count in outcome.counts.items():
                counts[name] += count
            if target is not None:
                target.write(batch, rest, outcome.edits)
    if _state(path) != before:
        raise UserError(f"{path}: was changed while it was read; search it again")
    if form is None and filter_files.kind(path)[0] == ".txt" and counts["dropped"] + counts["broken"]:
        made["written"] = False  # no document, no file
    for name in LISTS:
        _publish(partial / f"{path.name}.{name}", work / f"{path.name}.{name}")
    if made["written"]:
        _publish(partial / name_out, output / name_out)
    _write(work / f"{path.name}.json", [json.dumps(made | {"counts": counts}).encode()], work)


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def _done(path: Path, output: Path, work: Path, form: str | None) -> dict[str, Any] | None:
    """What was written about a file that is done and has not changed since."""
    try:
        made = json.loads((work / f"{path.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    same = made["file"] == str(path) and {name: made[name] for name in ("size", "modified_ns")} == _state(
        path
    )
    there = not made["written"] or (output / filter_files.output_name(path, form)).is_file()
    return made if same and there else None


def _all(inputs: Sequence[Path], work: Path, name: str) -> Iterator[dict[str, Any]]:
    """The items of a list of every file, in order."""
    for path in inputs:
        with (work / f"{path.name}.{name}").open("rb") as file:
            yield from map(json.loads, file)


def _write(path: Path, lines: Iterable[bytes], work: Path) -> None:
    """A whole file or none."""
    partial = work / "partial" / "writing"
    with partial.open("wb") as file:
        file.writelines(lines)
    _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
