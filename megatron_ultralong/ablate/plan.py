"""What a grid runs: commands, in order, for its files, its packed rows and each cell. Settings
are checked here, before the first command starts."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong import command_line, config, recipes
from megatron_ultralong.ablate.grid import Cell, Grid, Options, Stage
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Run
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import model_files
from megatron_ultralong.evaluate.pipeline import command
from megatron_ultralong.evaluate.tasks import perplexity
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahSettings
from megatron_ultralong.evaluate.tasks.perplexity import PerplexitySettings

FORMAT = 1
"""Version of the cells' settings.json."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command."""

    words: tuple[str, ...]
    """A command of `ultralong` or a Python script (.py), and its arguments; `untrained` stands for the
    function of untrained.py."""
    makes: Path
    """The file or folder that exists once the command is complete."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Commands that run one after the other in one process."""

    name: str
    folder: Path
    """Of the log, the settings and what the commands write."""
    steps: tuple[Step, ...]
    settings: dict[str, Any]
    """All that the result depends on, as plain values: a finished job with equal settings is not repeated."""
    tokens: int = 0
    """Tokens that it trains on."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are."""

    out: Path
    """The folder of the results."""
    grid: Grid

    @property
    def base(self) -> Path:
        """The model that every cell starts from."""
        return self.path(self.grid.base)

    def path(self, name: str) -> Path:
        """The path of a file that the grid names."""
        return self.out / "files" / name if name in self.grid.files else Path(name)

    def words(self, options: Options, joined: str = "") -> list[str]:
        """Options as words of a command line. joined: options whose lists are one word with commas."""
        words: list[str] = []
        for name, value in options.items():
            values = [str(self.path(str(one))) for one in (value if isinstance(value, list) else [value])]
            words.append(f"--{name}")
            if value is not True:
                words += [",".join(values)] if name in joined.split() else values
        return words

    def identity(self, options: Options) -> Options:
        """Options with what their files were made from, or the files' size and time."""

        def of(value: Any) -> Any:
            if isinstance(value, list):
                return [of(one) for one in value]
            if isinstance(value, str) and value in self.grid.files:
                return {"script": self.grid.files[value]}
            if isinstance(value, str) and Path(value).is_file():
                stat = Path(value).stat()
                return {"file": value, "bytes": stat.st_size, "time": stat.st_mtime_ns}
            return value

        return {name: of(value) for name, value in options.items()}


# ---- checks ----------------------------------------------------------------------------------------


def check(places: Places) -> None:
    """Build every run and read every option. UserError, with the cell, for the first that cannot work."""
    seen: set[str] = set()
    for cell in places.grid.cells:
        key = repr((cell.stages, cell.evaluate, cell.export))
        if key in seen:
            continue
        seen.add(key)
        try:
            runs_of(cell, places.base if places.base.is_dir() else None)
            for name, options in cell.evaluate.items():
                _check_evaluation(name, options)
        except UserError as error:
            raise UserError(f"{places.grid.path}, {cell.name}: {error}") from None
    if places.grid.base not in places.grid.files and not places.base.is_dir():
        raise UserError(f"{places.grid.path}: base {places.grid.base} is not a directory")
    for name, script in places.grid.files.items():
        words = shlex.split(script)
        if not words or not Path(words[0]).is_file():
            raise UserError(f"{places.grid.path}: files.{name}: {script} must begin with a Python script")


def runs_of(cell: Cell, base: Path | None) -> list[Run]:
    """The runs of a cell's stages; the first with the base model's shape and RoPE filled in where `base` is
    given. UserError for settings that cannot work on one rank."""
    runs = []
    for stage in cell.stages:
        run = override(recipes.get(stage.recipe), list(stage.settings))
        run.micro_batches(run.parallel.data_parallel(1))
        runs.append(run)
    if base is not None:
        # Imported here because it takes seconds.
        from megatron_ultralong.train import weights_source

        runs[0] = weights_source.find(runs[0], base / "no checkpoint", None, base)[0]
    return runs


def _check_evaluation(name: str, options: Options) -> None:
    """UserError for an unknown or missing option, or a value that the benchmark refuses."""
    task = {"niah": niah, "perplexity": perplexity}[name]
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    task.add_arguments(parser)
    command_line.accept_old(parser)
    words: list[str] = []
    for option, value in options.items():
        if f"--{option}" not in parser._option_string_actions:
            raise UserError(f"evaluate.{name}.{option}: `ultralong evaluate {name}` has no option --{option}")
        words += [f"--{option}"]
        if value is not True:
            values = [str(one) for one in (value if isinstance(value, list) else [value])]
            words += [",".join(values)] if option in _JOINED.split() else values
    for required in ("lengths", *(["data"] if name == "perplexity" else [])):
        if required not in options:
            raise UserError(f"evaluate.{name}: {required} is missing")
    try:
        args = parser.parse_args(["--output", "out", *words])
    except argparse.ArgumentError as error:
        raise UserError(f"evaluate.{name}: {error}") from None
    lengths = command.parse_lengths(args.lengths)
    if name == "niah":
        NiahSettings(
            lengths=lengths, depths=niah.parse_depths(args.depths, args.depth_count), trials=args.samples
        )
    else:
        PerplexitySettings(lengths=lengths, rows=args.samples)


_JOINED = "lengths depths"
"""Options of evaluations whose lists are one word."""


# ---- jobs ------------------------------------------------------------------------------------------


def file_jobs(places: Places) -> list[Job]:
    """Scripts that write the grid's files."""
    jobs = []
    for name, script in places.grid.files.items():
        path = places.path(name)
        words = (*shlex.split(script), "--output", str(path))
        jobs.append(
            Job(
                name=f"file {name}",
                folder=path.with_name(f"{path.name}.job"),
                steps=(Step(words=words, makes=path),),
                settings={"script": script},
            )
        )
    return jobs


def data_jobs(places: Places) -> list[Job]:
    """Packed rows, each set once for all cells that use it."""
    jobs: dict[str, Job] = {}
    for cell in places.grid.cells:
        for stage, run in zip(cell.stages, runs_of(cell, None), strict=True):
            if cell.seed is None:
                continue
            prefix, settings = _rows(places, stage, run)
            options = {"tokenizer": str(places.base), **stage.data, "seq-length": run.train.seq_length}
            words = ("prepare", stage.kind, *places.words(options), "--output", str(prefix))
            jobs[str(prefix)] = Job(
                name=f"rows {prefix.name}",
                folder=prefix.with_name(f"{prefix.name}.job"),
                steps=(Step(words=words, makes=prefix.with_name(f"{prefix.name}.json")),),
                settings=settings,
            )
    return list(jobs.values())


def cell_jobs(places: Places) -> list[tuple[Cell, Job]]:
    """The cells; the base model must exist."""
    base = model_files.fingerprint(places.base)
    return [(cell, _cell_job(places, cell, base)) for cell in places.grid.cells]


def listed(places: Places, state: Callable[[Job], str]) -> list[str]:
    """A line for each cell: its name, the state of its job and its tokens."""
    if not places.base.is_dir():  # one of the files, not yet made
        return [f"{cell.name}: new" for cell in places.grid.cells]
    return [f"{job.name}: {state(job)}, {job.tokens:,} tokens" for _, job in cell_jobs(places)]


def _cell_job(places: Places, cell: Cell, base: str) -> Job:
    folder = places.out / "cells" / cell.name
    runs = runs_of(cell, places.base)
    stages: list[dict[str, Any]] = []
    steps: list[Step] = []
    tokens = 0
    start = ["--load-hf", str(places.base)]
    for number, (stage, run) in enumerate(zip(cell.stages, runs, strict=True), 1):
        values = config.to_dict(run)
        values = {name: value for name, value in values.items() if name not in ("notes", "unpublished")}
        prefix, rows = _rows(places, stage, run)
        stages.append({"run": values, "rows": rows})
        if cell.seed is None:
            continue
        save = folder / f"stage{number}"
        steps.append(
            Step(
                words=(
                    *("train", "--recipe", stage.recipe),
                    *(("--set", *stage.settings) if stage.settings else ()),
                    *(*start, "--data", str(prefix), "--save", str(save)),
                ),
                makes=save / f"iter_{run.train.iterations:07d}",
            )
        )
        start = ["--load", str(save)]
        tokens += run.train.iterations * run.train.global_batch * run.train.seq_length
    model = folder / "hf"
    if cell.seed is None:
        stages = [{"rope": stages[0]["run"]["rope"], "length": runs[0].train.seq_length}]
        settings = cell.stages[0].settings
        words = ("untrained", str(places.base), str(model), cell.stages[0].recipe, *settings)
    else:
        exported = (*places.words(cell.export), "--load", start[1], "--output", str(model))
        words = ("convert", "export", *exported)
    steps.append(Step(words=words, makes=model))
    for name, options in cell.evaluate.items():
        results = folder / name
        words = ("evaluate", name, "--model", str(model), *places.words(options, _JOINED))
        steps.append(Step(words=(*words, "--output", str(results)), makes=results / f"{name}.json"))
    return Job(
        name=cell.name,
        folder=folder,
        steps=tuple(steps),
        settings={
            "format": FORMAT,
            "base": base,
            "stages": stages,
            "export": cell.export if cell.seed is not None else {},
            "evaluate": {name: places.identity(options) for name, options in cell.evaluate.items()},
        },
        tokens=tokens,
    )


def _rows(places: Places, stage: Stage, run: Run) -> tuple[Path, dict[str, Any]]:
    """The prefix of a stage's packed rows, and all that they depend on."""
    settings = {
        "kind": stage.kind,
        "seq_length": run.train.seq_length,
        "tokenizer": places.grid.files.get(places.grid.base, places.grid.base),
        **places.identity(stage.data),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return places.out / "data" / f"{stage.kind}-{run.train.seq_length}-{digest}", settings


def equal(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether settings are those that were stored as JSON."""
    return json.loads(json.dumps(settings)) == stored
