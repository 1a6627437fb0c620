"""Recipes in a user's own file: `--recipe FILE.py` or `--recipe FILE.py:NAME`."""

from __future__ import annotations

import inspect
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import Run
from megatron_ultralong.errors import UserError, first_line

_MODULE = "recipe_file"


def is_file(recipe: str) -> bool:
    """Whether what is given to --recipe names a file."""
    return recipe.partition(":")[0].endswith(".py")


def load(recipe: str) -> Run:
    """Run FILE.py and return what its function NAME returns; without NAME, its only public function without
    arguments. UserError where there is none, or it returns no `Run`; one line where the file fails."""
    text, _, name = recipe.partition(":")
    path = Path(text)
    if not path.is_file():
        raise UserError(f"--recipe {recipe}: no such file")
    functions = _functions(_checked(recipe, path, lambda: runpy.run_path(str(path), run_name=_MODULE)))
    if not name and len(functions) == 1:
        (name,) = functions
    if name not in functions:
        found = ", ".join(functions) or "none"
        raise UserError(
            f"--recipe {recipe}: give one of the file's functions without arguments, as {text}:NAME; it has {found}"
        )
    run = _checked(recipe, path, functions[name])
    if not isinstance(run, Run):
        raise UserError(
            f"--recipe {recipe}: {name}() returns {type(run).__name__}, not megatron_ultralong.config.Run"
        )
    return run


def _functions(names: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The file's own public functions that can be called without arguments."""
    return {
        name: value
        for name, value in names.items()
        if inspect.isfunction(value)
        and value.__module__ == _MODULE
        and not name.startswith("_")
        and all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    }


def _checked(recipe: str, path: Path, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except UserError as error:
        raise UserError(f"--recipe {recipe}: {error}") from None
    except Exception as error:
        lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        raise UserError(f"--recipe {recipe}{where}: {type(error).__name__}: {first_line(error)}") from None
