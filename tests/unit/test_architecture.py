"""Rules of the source tree: which package may import which, which files must not import Megatron, and that
every documented command exists."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ultralong
from megatron_ultralong import command_settings, recipe_file, recipes
from megatron_ultralong.commands.main import COMMANDS
from megatron_ultralong.errors import UserError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ultralong"

LEVELS = (  # from the bottom; a package imports only packages of lower levels
    {"errors"},
    {"rope", "families", "lora", "io"},
    {"config"},
    {"shapes", "command_line", "command_settings", "family_recipes", "peer_recipes", "recipe_file"},
    {"recipes", "settings_text", "runtime", "context_parallel", "official_files"},
    {"model", "data"},
    {"checkpoint"},
    {"evaluate", "planning"},
    {"train"},
    {"measure"},
    {"ablate", "check_cluster", "gpu_report", "run_report"},
    {"commands", "library"},
    {"__main__"},
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
FORBIDDEN = {("train", "evaluate")}  # training calls evaluation through callbacks

NO_MEGATRON = [
    "errors.py",
    "rope",
    "families.py",
    "config.py",
    "command_line.py",
    "command_settings.py",
    "shapes.py",
    "family_recipes.py",
    "peer_recipes.py",
    "recipes.py",
    "recipe_file.py",
    "settings_text.py",
    "planning",
    "model/weight_mapping.py",
    "model/rotary_embedding.py",
    "context_parallel",
    "official_files",
    "io",
    "evaluate",
    "data",
]
MEGATRON_ALLOWED = {
    "data": "megatron.core.datasets.indexed_dataset"
}  # data/ reads and writes Megatron's packed files

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


# ---- imports -----------------------------------------------------------------------------------


def imports(source: str) -> set[str]:
    """Return the full names of all modules that `source` imports, also inside functions.

    `from a import b` counts as a and as a.b.
    """
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports must be absolute"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def our_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, as "package.module"; checks that they exist."""
    modules = set()
    for name in imports(path.read_text()):
        if not name.startswith("megatron_ultralong."):
            continue
        name = name.removeprefix("megatron_ultralong.")
        while name and not _is_module(name):
            name, _, last = name.rpartition(".")
        assert name or last == "__version__", f"{path} imports a module that does not exist"
        if name and (PACKAGE / f"{name.replace('.', '/')}.py").is_file():
            modules.add(name)
    return modules


def _is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def missing_imports(path: Path) -> list[str]:
    """Return our own `from package import module` that name no module; mypy misses them if imports may be
    missing."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_ultralong."):
            name = node.module.removeprefix("megatron_ultralong.")
            if not _is_module(name):
                missing.append(node.module)
            elif (PACKAGE / name.replace(".", "/")).is_dir():
                missing += [
                    f"{node.module}.{a.name}" for a in node.names if not _is_module(f"{name}.{a.name}")
                ]
    return missing


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def breaks_levels(package: str, module: str) -> bool:
    """Return whether an import of `module` in a file of `package` violates the levels."""
    other = module.split(".")[0]
    return other != package and (LEVEL[other] >= LEVEL[package] or (package, other) in FORBIDDEN)


def test_breaks_levels():
    assert not breaks_levels("model", "context_parallel.zigzag") and not breaks_levels(
        "model", "model.rotary_embedding"
    )
    assert (
        breaks_levels("model", "checkpoint.sharded")
        and breaks_levels("model", "data.loader")
        and breaks_levels("train", "evaluate.tasks.niah")
    )
    assert breaks_levels("runtime", "model.rotary_embedding") and not breaks_levels(
        "measure", "evaluate.backends.memory_check"
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_levels(path):
    package = package_of(path)
    if path == PACKAGE / "__init__.py":
        return  # imports what is used when it is used: tests/unit/test_library.py
    if path.name == "__init__.py":
        assert not imports(path.read_text()), "importing a package must do no work"
        return
    assert package in LEVEL, f"new package {package}: add it to LEVELS"
    assert not [module for module in our_modules(path) if breaks_levels(package, module)]


def test_imports_exist():
    for path in [
        *PACKAGE.rglob("*.py"),
        *TOOLS,
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
    ]:
        assert not missing_imports(path), path


def test_no_import_cycle():
    """Also not inside functions or under TYPE_CHECKING."""
    graph = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): our_modules(path)
        for path in PACKAGE.rglob("*.py")
    }
    done: set[str] = set()
    for start in graph:
        trail: list[str] = []

        def visit(module: str, trail: list[str] = trail) -> None:
            assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
            if module not in done:
                trail.append(module)
                for other in sorted(graph[module] - {module}):
                    visit(other)
                done.add(trail.pop())

        visit(start)


@pytest.mark.parametrize("name", NO_MEGATRON)
def test_no_megatron_imports(name):
    file_or_folder = PACKAGE / name
    for path in [file_or_folder] if file_or_folder.is_file() else sorted(file_or_folder.rglob("*.py")):
        megatron = {module for module in imports(path.read_text()) if module.split(".")[0] == "megatron"}
        exception = MEGATRON_ALLOWED.get(name)
        # An import is listed together with its parent packages, which are prefixes of the exception.
        assert all(
            exception and (module.startswith(exception) or exception.startswith(module))
            for module in megatron
        ), (path, megatron)


def test_library_does_not_import_tools_or_tests():
    for path in PACKAGE.rglob("*.py"):
        assert not {module.split(".")[0] for module in imports(path.read_text())} & {
            "tools",
            "tests",
            "examples",
        }, path


# ---- tools -------------------------------------------------------------------------------------


COMMAND_OF = {module.partition(".")[0]: name for name, (module, _) in COMMANDS.items()}
"""The command of each file of tools/."""


@functools.cache
def help_of(command: str, *sub: str) -> str:
    """Return what `ultralong COMMAND SUB --help` prints; fails unless it exits with 0."""
    return output_of([f"ultralong {command}", *sub, "--help"], module_of(command).main)


def output_of(argv: list[str], function: Callable[[], object]) -> str:
    output, before = io.StringIO(), sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
            function()
    finally:
        sys.argv = before
    assert not stop.value.code
    return output.getvalue()


def module_of(command: str) -> Any:
    return importlib.import_module(f"megatron_ultralong.commands.{COMMANDS[command][0]}")


def subcommands(command: str) -> list[str]:
    """Return the names in the {a,b} of a command's help, or in the indented list of a group of them."""
    text = help_of(command)
    braces = re.search(r"^usage:.*?\{([\w,-]+)\}\s+\.\.\.", text, re.DOTALL)
    if braces:
        return braces[1].split(",")
    if "..." not in text.split("\n\n")[0]:
        return []
    return re.findall(r"^    ([\w-]+)(?:  |$)", text.rsplit(":\n", 1)[1], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = help_of(command)
    shown, described = text.split("\n\n", 1)
    assert shown.startswith(f"usage: ultralong {command} ")
    assert re.search(
        rf"^ *(ultralong|torchrun .*-m megatron_ultralong) {command}\b", described, re.MULTILINE
    ), "a command's help must show an example"
    for sub in subcommands(command):
        assert "--" in help_of(command, sub)


def test_every_command_is_also_a_thin_file():
    assert {tool.stem for tool in TOOLS} == set(COMMAND_OF)
    for tool in TOOLS:
        text = tool.read_text()
        # The processes of checkpoint writers and data loaders import the tool again.
        assert text.endswith('if __name__ == "__main__":\n    cli.main(main)\n'), tool
        assert f'"""`ultralong {COMMAND_OF[tool.stem]}`, as a file."""' in text
        main = runpy.run_path(str(tool))["main"]
        assert main is module_of(COMMAND_OF[tool.stem]).main
        version = output_of([tool.name, "--version"], main)
        assert version == f"megatron_ultralong {megatron_ultralong.__version__}\n"


# ---- documents and examples --------------------------------------------------------------------


def commands(path: Path) -> list[str]:
    """Return the command lines of a document's ``` blocks, or of a script, without comments; joins
    continuation lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        text = "\n".join(block for kind, block in blocks if kind in ("", "bash", "sh", "console"))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def check_command(line: str) -> None:
    """Check that tool, subcommand, options, recipe and settings of a command line exist."""
    for file, name, rest in re.findall(
        r"(?:tools/(\w+)\.py|(?:(?<![\w/.-])ultralong|-m megatron_ultralong) ([\w-]+))([^|;&>]*)", line
    ):
        tool = COMMAND_OF.get(file, "no command") if file else name
        if tool.startswith("--"):  # ultralong --help
            continue
        assert tool in COMMANDS, f"{file or name} does not exist: {line}"
        words = shlex.split(rest, comments=True)
        subs = subcommands(tool)
        sub: tuple[str, ...] = ()
        if words and words[0] == "$1":  # a shell function whose callers give the subcommand
            continue
        if subs:
            assert words and words[0] in subs, f"{tool} has no such subcommand: {line}"
            sub = (words[0],)
        text = help_of(tool, *sub)
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word.split('=')[0])}\b(?!-)", text), (
                    f"{tool} has no option {word}: {line}"
                )
        recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "$"
        if not recipe.startswith("$") and not recipe_file.is_file(recipe):
            runs = recipes.stages(recipe)
            settings = []
            for word in words[words.index("--set") + 1 :] if "--set" in words else []:
                if word.startswith("--"):
                    break
                settings += [word] if "$" not in word and word != "help" else []
            assert all(command_settings.override(run, settings).name for run in runs)
    for target in re.findall(r"\bmake ([a-z][\w-]*)", line):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            f"no make target {target}: {line}"
        )
    for script in re.findall(r"examples/[\w./-]+\.(?:sh|py)", line):
        assert (ROOT / script).is_file(), f"{script} does not exist: {line}"


def test_check_command():
    check_command(
        "torchrun --nproc-per-node 8 tools/train.py --recipe ultralong_1m "
        "--set parallel.cp=2 train.seq_length=64K --data x --save y"
    )
    for wrong in (
        "tools/nothing.py",
        "ultralong nothing",
        "ultralong train --dat x",
        "torchrun -m megatron_ultralong train --recipe ultralong_9m",
        "tools/train.py --recipe ultralong_9m",
        "tools/train.py --dat x",
        "tools/convert_hf.py eksport --load x",
        "tools/train.py --recipe tiny --set train.sequence=1",
        "make dmeo",
        "bash examples/nothing.sh",
    ):
        with pytest.raises((AssertionError, UserError)):
            check_command(wrong)


@pytest.mark.parametrize("path", DOCUMENTS + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_exist(path):
    for line in commands(path):
        check_command(line)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert (
        path.read_text().startswith(("#!/bin/bash", "#!/usr/bin/env bash"))
        and "set -euo pipefail" in path.read_text()
    )


def test_annotated_tree():
    """Every file in the tree of docs/architecture.md exists, and it lists every library file and tool."""
    tree = re.search(
        r"^```text\n(megatron_ultralong/.*?)^```",
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert tree, "docs/architecture.md must contain the tree in a ```text block"
    listed, folders = set(), []
    for line in tree[1].splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if not entry:
            continue
        depth, name = len(entry[1]) // 2, entry[2]
        folders[depth:] = [name]
        listed.add("/".join(part.rstrip("/") for part in folders))
    missing = sorted(name for name in listed if not (ROOT / name).exists())
    assert not missing, f"listed, but missing: {missing}"
    files = {str(p.relative_to(ROOT)) for p in [*PACKAGE.rglob("*.py"), *TOOLS] if p.name != "__init__.py"}
    assert not sorted(files - listed), "not listed in the tree of docs/architecture.md"


def test_documents_name_files_that_exist():
    folders = (PACKAGE, *(ROOT / name for name in ("tests", "docs", "tools", "examples")))
    files = [path for folder in folders for path in folder.rglob("*.*")] + list(ROOT.glob("*.*"))
    known = {"/".join(path.relative_to(ROOT).parts[i:]) for path in files for i in range(5)}
    others = {
        "src/prompt.py",
        "pretrain_gpt.py",
        "convert_hf_to_gguf.py",
        "my_recipes.py",
    }  # of other projects, or of the reader; NAME stands for a new file
    for path in DOCUMENTS:
        named = set(re.findall(r"`([a-z_][\w/.-]*\.(?:py|md|sh))`", path.read_text(encoding="utf-8")))
        assert not sorted(name for name in named - known - others if "NAME" not in name), path
