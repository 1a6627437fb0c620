"""Recipes in a user's own file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_ultralong import recipes
from megatron_ultralong.errors import UserError

ONE = """import dataclasses
from megatron_ultralong import recipes
from megatron_ultralong.config import Run


def mine(iterations=77) -> Run:
    run = recipes.tiny()
    return dataclasses.replace(run, name="mine", train=dataclasses.replace(run.train, iterations=iterations))


def _changed(run):
    return run
"""
TWO = ONE + "\n\ndef other():\n    return 3\n\n\ndef needs(lr):\n    return lr\n"


def made(folder: Path, text: str) -> str:
    (folder / "broken_helper.py").write_text("\n\n\ndef f(:\n")
    path = folder / "my recipes.py"
    path.write_text(text)
    return str(path)


def test_a_function_of_the_file(tmp_path: Path) -> None:
    for text, name in ((ONE, ""), (ONE, ":mine"), (TWO, ":mine")):
        recipe = made(tmp_path, text) + name
        run = recipes.get(recipe)
        assert (run.name, run.train.iterations) == ("mine", 77)
        assert recipes.stages(recipe) == (run,)
    cached = ONE.replace("def mine(", "import functools\n\n\n@functools.cache\ndef mine(")
    assert recipes.get(made(tmp_path, cached)).train.iterations == 77
    assert not list(tmp_path.glob("__pycache__"))


def test_modules_next_to_the_file_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "neighbour_of_a_recipe.py").write_text("ITERATIONS = 99\n")
    before = list(sys.path)
    text = ONE.replace(
        "import dataclasses", "import dataclasses\nfrom neighbour_of_a_recipe import ITERATIONS"
    )
    assert recipes.get(made(folder, text.replace("=77", "=ITERATIONS"))).train.iterations == 99
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (TWO, "", "several functions; give .*my recipes.py:NAME with one of mine, other"),
        (TWO, ":needs", "no function needs without arguments; give .*:NAME with one of mine, other"),
        (TWO, ":other", "other\\(\\) returns int, not megatron_ultralong.config.Run"),
        ("", "", "the file has no public function that takes no arguments"),
        ("import sys\nsys.exit()\n", "", ", line 2: SystemExit$"),
        ("def f():\n    assert False\n", "", ", line 2: AssertionError$"),
        ("x = 1\nimport broken_helper\n", "", r", line 2: SyntaxError: .*broken_helper.py, line 4"),
        ("x = 1\nimport nothing_of_that_name\n", "", ", line 2: ModuleNotFoundError: No module named"),
        ("x = 1\n\ndef f(:\n", "", ", line 3: SyntaxError"),
        ("def f():\n    return 1 / 0\n", "", ", line 2: ZeroDivisionError: division by zero"),
        (ONE.replace("iterations=77", "iterations=-1"), "", "train.iterations=-1"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        recipes.get(made(tmp_path, text) + name)
    assert str(error.value).startswith("--recipe ") and "\n" not in str(error.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.py: no such file"):
        recipes.get(str(tmp_path / "none.py"))
