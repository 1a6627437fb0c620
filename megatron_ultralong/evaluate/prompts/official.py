"""Prompts as a benchmark's own repository words them, read from a checkout that the user has: nothing of its
code is run.

They are not shipped with this package. Without a checkout our own words are used, and the results say so.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError

_FIELD = re.compile(r"\{(\w+)\}")


def fill(template: str, fields: Mapping[str, str]) -> str:
    """`template` with each {name} replaced; what stands in the fields is left as it is."""
    return _FIELD.sub(lambda found: fields[found[1]], template)


def read(path: Path, name: str, wanted: Mapping[str, set[str]]) -> dict[str, str]:
    """The templates in the dictionary that `name` is assigned in a Python file.

    wanted: of each template, the fields that it has. UserError where the file, the dictionary or a template
    is not there, is not made of texts alone, or has other fields.
    """
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            templates = _texts(node.value, path, name)
            break
    else:
        raise UserError(f"--official: {path} assigns no {name}; is this the benchmark's own repository?")
    for key, fields in wanted.items():
        if set(_FIELD.findall(templates.get(key, ""))) != fields:
            raise UserError(f"--official: {path}: {name}[{key!r}] is no template with {_braced(fields)}")
    return {key: templates[key] for key in wanted}


def read_f_string(path: Path, name: str, fields: set[str]) -> str:
    """The only f-string that `name` is assigned in a Python file, as a template with those fields; UserError
    otherwise."""
    found = [
        node.value
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.JoinedStr)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    parts = [
        part.value
        if isinstance(part, ast.Constant)
        else f"{{{ast.unparse(part.value)}}}"
        if isinstance(part, ast.FormattedValue)
        else ""
        for value in found
        for part in value.values
    ]
    template = "".join(map(str, parts))
    if len(found) != 1 or set(_FIELD.findall(template)) != fields:
        raise UserError(
            f"--official: {path} does not assign {name} one f-string with {_braced(fields)}; is this the benchmark's own repository?"
        )
    return template


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(
            f"--official: {path} cannot be read as Python ({error}); give a checkout of the benchmark's own repository"
        ) from None


def _texts(node: ast.expr, path: Path, name: str) -> dict[str, str]:
    if not isinstance(node, ast.Dict):
        raise UserError(f"--official: {path}: {name} is no dictionary")
    try:
        return {
            ast.literal_eval(key): _text(value)
            for key, value in zip(node.keys, node.values)
            if key is not None
        }
    except (ValueError, TypeError):
        raise UserError(f"--official: {path}: {name} does not hold texts alone") from None


def _text(node: Any) -> str:
    """A literal, or literals joined by +."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    value = ast.literal_eval(node)
    if not isinstance(value, str):
        raise TypeError
    return value


def _braced(fields: Iterable[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in sorted(fields))
