"""Recipes in a user's own file: `--recipe FILE.py` or `--recipe FILE.py:NAME`."""

from __future__ import annotations

import inspect
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import Run
from megatron_ultralong.errors import UserError, first_line

_MODULE = "recipe_file"


def is_file(recipe: str) -> bool:
    """Whether what is given to --recipe names a file."""
    return recipe.endswith(".py") or ".py:" in recipe


def load(recipe: str) -> Run:
    """Run FILE.py and return what its function NAME returns; without NAME, its only public function without
    arguments. UserError where there is none, or it returns no `Run`; one line where the file fails."""
    text, colon, name = recipe.rpartition(".py:")
    text, name = (f"{text}.py", name) if colon else (recipe, "")
    path = Path(text)
    if not path.is_file():
        raise UserError(f"--recipe {recipe}: no such file")
    functions = _functions(_checked(recipe, path, lambda: runpy.run_path(str(path), run_name=_MODULE)))
    if not functions:
        raise UserError(f"--recipe {recipe}: the file has no public function that takes no arguments")
    if not name and len(functions) == 1:
        (name,) = functions
    if name not in functions:
        wrong = f"no function {name} without arguments" if name else "several functions"
        raise UserError(f"--recipe {recipe}: {wrong}; give {text}:NAME with one of {', '.join(functions)}")
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
        if callable(value)
        and not inspect.isclass(value)
        and getattr(value, "__module__", None) == _MODULE
        and not name.startswith("_")
        and all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    }


def _checked(recipe: str, path: Path, run: Callable[[], Any]) -> Any:
    """Call `run`, which finds modules next to the file as a script does."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        return run()
    except UserError as error:
        raise UserError(f"--recipe {recipe}: {error}") from None
    except (Exception, SystemExit) as error:
        lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        reason = f": {first_line(error)}" if str(error).strip() else ""
        raise UserError(f"--recipe {recipe}{where}: {type(error).__name__}{reason}") from None
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
