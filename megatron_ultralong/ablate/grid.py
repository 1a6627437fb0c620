"""The grid file of an ablation (YAML), and the cells that it expands to.

    base: examples/demo/base          # Hugging Face directory that every cell starts from
    files:                            # files that scripts write, once; --output NAME is appended
      train.jsonl: examples/demo/corpus.py documents --tokenizer examples/demo/base --length 4096 --rows 80
    recipe: tiny_extend               # as `ultralong train --recipe`
    set: [train.iterations=12]        # as `ultralong train --set`
    data: {input: train.jsonl}        # options of `ultralong prepare pretrain` but for --seq-length
    axes:                             # every combination of values is run
      method:
        untrained: {train: false, set: [rope.type=none, rope.allow_short=true]}
        yarn: {set: [rope.type=yarn]}
      steps:
        one: {}
        two: {stages: [{set: [train.seq_length=2K]}, {}]}
    seeds: [1, 2, 3]                  # train.seed; untrained cells are run once
    evaluate:                         # options of `ultralong evaluate`
      niah: {lengths: [512, 4K], depths: [0, 50, 100], trials: 4}
      perplexity: {data: held_out.jsonl, lengths: [512, 4K], rows: 8}

A value of an axis may have these keys: `recipe` (replaces that of the file), `set` (appended), `data`,
`export` (options of `ultralong convert export`), `evaluate` (all three merged; null removes an option),
`train`, `stages` (runs one after the other, each with `set` and `data` of its own in addition to the common
ones), `then` (further stages, which share nothing with the others: `recipe`, `set`, `data`, and `kind: sft`
for the options of `ultralong prepare sft`).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import yaml_file

Options = dict[str, Any]
"""Options of a tool by name, without the dashes: a list is several values, true a flag."""

BENCHMARKS = ("niah", "perplexity")
_FILE = (
    "base",
    "files",
    "recipe",
    "set",
    "data",
    "train",
    "axes",
    "seeds",
    "export",
    "evaluate",
    "note",
)
_VALUE = ("recipe", "set", "data", "train", "stages", "then", "export", "evaluate")
_STAGE = ("set", "data")
_THEN = ("recipe", "set", "data", "kind")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of `ultralong train`."""

    recipe: str
    settings: tuple[str, ...]
    """Of --set."""
    kind: str = "pretrain"
    """Subcommand of `ultralong prepare` that packs the rows: pretrain or sft."""
    data: Options
    """Its options."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of values, with one seed."""

    values: dict[str, str]
    """The name of each axis's value, in the order of the axes."""
    seed: int | None
    """train.seed of every stage; None = untrained."""
    stages: tuple[Stage, ...]
    """Of an untrained cell, only the RoPE and the length of the first are used."""
    export: Options
    """Options of `ultralong convert export`."""
    evaluate: dict[str, Options]
    """Options of `ultralong evaluate` by benchmark."""

    @property
    def label(self) -> str:
        """The row of the table: the values of all axes."""
        return ", ".join(self.values.values()) or "run"

    @property
    def name(self) -> str:
        """The folder of its results."""
        parts = [f"{axis}={value}" for axis, value in self.values.items()]
        return ",".join([*parts, "untrained" if self.seed is None else f"seed={self.seed}"])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file."""

    path: Path
    base: str
    """Hugging Face directory, or the name of one of `files`."""
    files: dict[str, str]
    """Name -> the script that writes it, with its options."""
    axes: dict[str, tuple[str, ...]]
    """Axis -> the names of its values."""
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    note: str = ""
    """A line below the table."""


def read(path: Path, only: Mapping[str, tuple[str, ...]] | None = None) -> Grid:
    """Read a grid file and expand it. only: axis -> the values to keep, "seed" among the axes. UserError, in
    one line, for whatever the file or `only` gets wrong in form; `plan.check` checks the settings."""
    raw = yaml_file.read(path, "--grid")
    where = f"--grid {path}"
    _keys(raw, _FILE, where)
    for key in ("base", "recipe", "evaluate", "axes", "seeds"):
        if key not in raw:
            raise UserError(f"{where}: {key} is missing")
    files = {
        str(name): _text(script, f"{where}: files.{name}")
        for name, script in _mapping(raw, "files", where).items()
    }
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for axis in _mapping(raw, "axes", where):
        place = f"{where}: axes.{axis}"
        axes[str(axis)] = {}
        for name in _mapping(raw["axes"], axis, place):
            value = _mapping(raw["axes"][axis], name, f"{place}.{name}")
            _keys(value, _VALUE, f"{place}.{name}")
            _check_name(str(name), f"{place}.{name}")
            axes[str(axis)][str(name)] = value
        if not axes[str(axis)]:
            raise UserError(f"{place}: has no values")
    seeds = raw["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{where}: seeds must be a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds contains a number twice")
    axes, seeds = _selected(axes, seeds, only or {})
    cells: list[Cell] = []
    for chosen in itertools.product(*(values.items() for values in axes.values())):
        names = dict(zip(axes, (name for name, _ in chosen), strict=True))
        cells += _expand(raw, names, [value for _, value in chosen], seeds, where)
    return Grid(
        path=path,
        base=_text(raw["base"], f"{where}: base"),
        files=files,
        axes={axis: tuple(values) for axis, values in axes.items()},
        cells=tuple(cells),
        note=str(raw.get("note", "")),
        seeds=tuple(seeds),
    )


def parse_only(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Parse --only: axis=value,value for each axis. UserError where one has another form."""
    only: dict[str, tuple[str, ...]] = {}
    for text in texts:
        axis, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--only {text}: expected axis=value,value")
        only[axis] = tuple(values.split(","))
    return only


def _selected(
    axes: dict[str, dict[str, dict[str, Any]]], seeds: list[int], only: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[int]]:
    known = {**{axis: tuple(values) for axis, values in axes.items()}, "seed": tuple(map(str, seeds))}
    for axis, values in only.items():
        if axis not in known:
            raise UserError(f"--only {axis}: unknown axis; the grid has {', '.join(known)}")
        for value in values:
            if value not in known[axis]:
                raise UserError(f"--only {axis}={value}: unknown; the grid has {', '.join(known[axis])}")
    kept = {
        axis: {name: value for name, value in values.items() if name in only.get(axis, values)}
        for axis, values in axes.items()
    }
    return kept, [seed for seed in seeds if str(seed) in only.get("seed", known["seed"])]


def _expand(
    raw: dict[str, Any], names: dict[str, str], values: list[dict[str, Any]], seeds: list[int], where: str
) -> list[Cell]:
    """The cells of one combination of values: one for each seed, or a single untrained one."""
    recipe, train = raw["recipe"], raw.get("train", True)
    settings = _settings(raw, where)
    data, export = dict(_mapping(raw, "data", where)), dict(_mapping(raw, "export", where))
    evaluate = {name: dict(_mapping(raw["evaluate"], name, where)) for name in raw["evaluate"] or {}}
    stages: list[Any] = [{}]
    then: list[Any] = []
    for (axis, name), value in zip(names.items(), values, strict=True):
        place = f"{where}: axes.{axis}.{name}"
        recipe, train = value.get("recipe", recipe), value.get("train", train)
        settings += _settings(value, place)
        data |= _mapping(value, "data", place)
        export |= _mapping(value, "export", place)
        for benchmark in _mapping(value, "evaluate", place):
            evaluate[benchmark] = {
                **evaluate.get(benchmark, {}),
                **_mapping(value["evaluate"], benchmark, place),
            }
        stages = _list(value, "stages", place) or stages
        then = [*then, *_list(value, "then", place)]
    _keys(evaluate, BENCHMARKS, f"{where}: evaluate")
    if not evaluate:
        raise UserError(f"{where}: evaluate names no benchmark; known: {', '.join(BENCHMARKS)}")
    if type(train) is not bool:
        raise UserError(f"{where}: train must be true or false")
    built = []
    for stage in stages:
        _keys(stage, _STAGE, f"{where}: a stage of {', '.join(names.values())}")
        built.append(
            Stage(
                recipe=str(recipe),
                settings=(*settings, *_settings(stage, where)),
                data=_without_null({**data, **_mapping(stage, "data", where)}),
            )
        )
    for stage in then:
        place = f"{where}: `then` of {', '.join(names.values())}"
        _keys(stage, _THEN, place)
        if "recipe" not in stage or stage.get("kind", "pretrain") not in ("pretrain", "sft"):
            raise UserError(f"{place}: needs a recipe; kind is pretrain or sft")
        built.append(
            Stage(
                recipe=str(stage["recipe"]),
                settings=tuple(_settings(stage, place)),
                kind=stage.get("kind", "pretrain"),
                data=_without_null(_mapping(stage, "data", place)),
            )
        )
    evaluate = {name: _without_null(options) for name, options in evaluate.items()}
    return [
        Cell(
            values=names,
            seed=seed,
            stages=tuple(_with_seed(stage, seed) for stage in built),
            export=_without_null(export),
            evaluate=evaluate,
        )
        for seed in (seeds if train else [None])
    ]


def _with_seed(stage: Stage, seed: int | None) -> Stage:
    if seed is None:
        return stage
    return Stage(
        recipe=stage.recipe,
        settings=(*stage.settings, f"train.seed={seed}"),
        kind=stage.kind,
        data=stage.data,
    )


# ---- parts of the file ----------------------------------------------------------------------------


def _keys(value: Any, known: tuple[str, ...], where: str) -> None:
    """UserError where `value` is no mapping, or has another key than `known`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping with some of the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}: unknown key {key}; did you mean {near}? Known: {', '.join(known)}")


def _mapping(values: dict[Any, Any], key: Any, where: str) -> dict[str, Any]:
    """values[key], {} where it is missing or empty."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {key} must be a mapping")
    return found


def _list(values: dict[Any, Any], key: str, where: str) -> list[Any]:
    found = values.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise UserError(f"{where}: {key} must be a list")
    return found


def _settings(values: dict[Any, Any], where: str) -> list[str]:
    settings = _list(values, "set", where)
    for setting in settings:
        if not isinstance(setting, str):
            raise UserError(f"{where}: set must be a list of key=value, not {setting!r}")
    return list(settings)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: must be a text")
    return value


def _check_name(name: str, where: str) -> None:
    """Names of values are parts of folder names, and of --only."""
    if not name or any(letter in "/,=" or not letter.isprintable() for letter in name):
        raise UserError(f"{where}: the name of a value must not contain / , or =")


def _without_null(options: Options) -> Options:
    return {name: value for name, value in options.items() if value is not None and value is not False}
