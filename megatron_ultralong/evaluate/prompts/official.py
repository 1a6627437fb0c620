"""Official prompt templates, parsed from the user's checkout of a benchmark's repository without running its
code.

They are not shipped with this package. Without a checkout this project's own wording is used, and the results
say so.
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
    """Replace each {name} of `template`; braces in the values of the fields stay as they are."""
    return _FIELD.sub(lambda match: fields[match[1]], template)


def read(path: Path, name: str, expected: Mapping[str, set[str]]) -> dict[str, str]:
    """Read the templates in the dictionary that a Python file assigns to `name`.

    expected: the fields of each template. UserError where the file, the dictionary or a template is missing,
    is not made of string literals, or has other fields.
    """
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            templates = _texts(node.value, path, name)
            break
    else:
        raise UserError(f"--official: {path} assigns no {name}; is this the benchmark's repository?")
    for key, fields in expected.items():
        if set(_FIELD.findall(templates.get(key, ""))) != fields:
            raise UserError(f"--official: {path}: {name}[{key!r}] is not a template with {_braced(fields)}")
    return {key: templates[key] for key in expected}


def read_f_string(path: Path, name: str, fields: set[str]) -> str:
    """Read the only f-string that a Python file assigns to `name`, as a template with `fields`; UserError
    otherwise."""
    values = [
        node.value
        for node in ast.walk(_parse(path))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.JoinedStr)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    template = "".join(
        str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
        for value in values
        for part in value.values
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )
    if len(values) != 1 or set(_FIELD.findall(template)) != fields:
        raise UserError(
            f"--official: {path} does not assign {name} one f-string with {_braced(fields)}; is this the benchmark's repository?"
        )
    return template


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(
            f"--official: {path} cannot be parsed as Python ({error}); give a checkout of the benchmark's repository"
        ) from None


def _texts(node: ast.expr, path: Path, name: str) -> dict[str, str]:
    if not isinstance(node, ast.Dict):
        raise UserError(f"--official: {path}: {name} is not a dictionary")
    try:
        return {
            ast.literal_eval(key): _text(value)
            for key, value in zip(node.keys, node.values)
            if key is not None
        }
    except (ValueError, TypeError):
        raise UserError(f"--official: {path}: {name} does not contain string literals only") from None


def _text(node: Any) -> str:
    """A string literal, or several joined by +."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    value = ast.literal_eval(node)
    if not isinstance(value, str):
        raise TypeError
    return value


def _braced(fields: Iterable[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in sorted(fields))
