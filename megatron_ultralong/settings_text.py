"""The settings of a run as text: as `--set` takes them, and with their types and descriptions."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.command_settings import type_hints
from megatron_ultralong.config import Run, sections
from megatron_ultralong.rope.methods import METHODS, settings_of

_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting as it is documented."""

    name: str
    """section.name"""
    type: str
    default: str | None
    """As `--set` takes it; None where a recipe must state it."""
    about: str
    """What it means, in one paragraph; empty where its name says it."""


def heading(run: Run) -> list[str]:
    """Comment lines above a run's settings: its name, its notes, and which settings its source does not
    state."""
    unpublished = (
        f"not published, this project's own choice: {', '.join(run.unpublished)}" if run.unpublished else ""
    )
    wrap = functools.partial(textwrap.wrap, width=_WIDTH, initial_indent="# ", subsequent_indent="# ")
    return [f"# {run.name}", *wrap(run.notes), *wrap(unpublished)]


def stated(run: Run) -> list[str]:
    """`section.name=value` for every setting of `run`, each as `--set` takes it. Sections that the loaded
    model decides are left out."""
    return [
        f"{section}.{name}={_text(getattr(values, name))}"
        for section, values, names in _sections(run)
        for name in names
    ]


def described(run: Run) -> list[str]:
    """Lines with every setting: its value in `run`, its type and what it means. Of RoPE, the settings of the
    run's method; without one, of every method."""
    lines: list[str] = []
    for section, kind in sections().items():
        lines += _described(section, kind, getattr(run, section), _fields(kind))
    methods = METHODS.values() if run.rope is None else [type(run.rope)]
    named = dict.fromkeys(["type", *(name for method in methods for name in settings_of(method))])
    for name in named:
        method = next(m for m in methods if name == "type" or name in settings_of(m))
        lines += _described("rope", method, run.rope, (name,))
    return lines


def documented(section: str, kind: type) -> list[Setting]:
    """Every setting of a section's dataclass, or of a RoPE method (section "rope")."""
    hints = type_hints()
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else _text(field.default)
        for field in dataclasses.fields(kind)
    }
    return [
        Setting(
            name=f"{section}.{name}",
            type=_type(hints[f"{section}.{name}"]),
            default=default,
            # As `--set` takes it: none, not Python's None.
            about=" ".join(_documentation(kind).get(name, "").split()).replace("None = ", "none = "),
        )
        for name, default in defaults.items()
    ]


def _described(section: str, kind: type, values: Any, names: tuple[str, ...]) -> list[str]:
    lines = []
    for setting in documented(section, kind):
        name = setting.name.removeprefix(f"{section}.")
        if name in names:
            value = "(of the loaded model)" if values is None else _text(getattr(values, name))
            lines.append(f"{setting.name}={value}    {setting.type}")
            lines += textwrap.wrap(setting.about, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return lines


def _sections(run: Run) -> list[tuple[str, Any, tuple[str, ...]]]:
    found = [(name, getattr(run, name), _fields(kind)) for name, kind in sections().items()]
    if run.rope is not None:
        found.append(("rope", run.rope, ("type", *settings_of(type(run.rope)))))
    return [one for one in found if one[1] is not None]


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " | ".join("none" if one is type(None) else _type(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"{_type(typing.get_args(hint)[0])}, ..."
    return {bool: "true | false", int: "integer, also with K or M", float: "number"}.get(hint, "text")


@functools.cache
def _documentation(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those it extends."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        source = Path(inspect.getsourcefile(one) or "").read_text(encoding="utf-8")
        body = next(
            node.body
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef) and node.name == one.__name__
        )
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                below = text.value if isinstance(text, ast.Expr) else None
                if isinstance(below, ast.Constant) and isinstance(below.value, str):
                    found[field.target.id] = below.value
    return found
