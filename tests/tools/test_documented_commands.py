"""The commands of README.md, CONTRIBUTING.md and docs/ are run on small models and data;
documented_commands.yaml lists those that are not, and what is changed in the others.

Each page is run from top to bottom, as a reader does, in a workspace of its own that has the models, data and
runs that the documents name.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ultralong.commands.main import COMMANDS
from tests import processes
from tests.server import Server
from tests.tools import documented_workspace
from tests.unit.test_architecture import DOCUMENTS, commands

ROOT = Path(__file__).parents[2]
RULES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "documented_commands.yaml").read_text())
FORMS = {
    tool.partition(".")[0].upper(): rf"(?:tools/{tool.partition('.')[0]}\.py|ultralong {name})\b"
    for name, (tool, _) in COMMANDS.items()
}
"""What stands for a command in a rule, such as EVALUATE, and the forms that it can have."""
PROGRAMS = ("python", "ultralong", "jq")
OUTPUTS = ("--out", "--output", "--save")


@dataclass(frozen=True)
class Command:
    """A command of a document: as it is written, and what the test runs."""

    written: str
    line: str
    """With the changes of the rules."""
    page: str


def matches(pattern: str, line: str) -> re.Match[str] | None:
    """Search a rule's pattern, in which EVALUATE stands for tools/evaluate.py and `ultralong evaluate`."""
    return re.search(expanded(pattern), line)


def expanded(pattern: str) -> str:
    return re.sub(r"\b[A-Z_]{5,}\b", lambda name: FORMS.get(name[0], name[0]), pattern)


def reason_not_run(line: str) -> str | None:
    return next((why for pattern, why in RULES["not_run"].items() if matches(pattern, line)), None)


def apply(line: str, rule: dict[str, str]) -> str:
    return re.sub(expanded(rule["find"]), rule["replace"], line)


@functools.cache
def documented() -> dict[str, list[Command]]:
    """The commands of every document, in order and each once."""
    pages: dict[str, list[Command]] = {}
    for path in DOCUMENTS:
        lines = dict.fromkeys(re.sub(r"\s+#.*| (?= )", "", line) for line in commands(path))
        pages[path.name] = [
            Command(written=line, line=functools.reduce(apply, RULES["changed"], line), page=path.name)
            for line in lines
        ]
    return pages


def is_run(command: Command) -> bool:
    return reason_not_run(command.written) is None


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents' commands read, under the names that they mention."""
    return documented_workspace.make(tmp_path_factory.mktemp("documented"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


def run(command: Command, folder: Path, server: Server, written: set[Path]) -> None:
    """Run a command in `folder`; fails unless it ends as its page says.

    written: outputs of the page's commands so far. Another output that exists is removed first: it was made
    for the commands of other pages.
    """
    words = shlex.split(command.line.replace("SERVER", server.url))
    if words[0] not in PROGRAMS:
        pytest.fail(
            f"{command.page}: {command.written}: a new kind of command; run it in {Path(__file__).name}, or add it to "
            "not_run of documented_commands.yaml with the reason"
        )
    if words[0] == "jq" and shutil.which("jq") is None:
        return
    words = [name for word in words for name in (sorted(map(str, _expanded(word, folder))) or [word])]
    for option, value in itertools.pairwise(words):
        if option in OUTPUTS and folder / value not in written:
            _remove(folder / value, folder)
            written.add(folder / value)
    settings: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True}
    if words[0] == "jq":
        done = subprocess.run(words, check=False, **settings)
    else:
        started = words[1:] if words[0] == "python" else ["-m", "megatron_ultralong", *words[1:]]
        environment = {**os.environ, "OPENAI_API_KEY": "x", "HF_HUB_OFFLINE": "1"}
        done = processes.run([sys.executable, *started], env=environment, **settings)
    differs = any(matches(pattern, command.written) for pattern in RULES["exit_1"])
    assert done.returncode == int(differs), (
        f"{command.page}: {command.written}\nrun as: {command.line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    )


def _expanded(word: str, folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.glob(word)] if set(word) & set("*?[") else []


def _remove(path: Path, folder: Path) -> None:
    """Remove an output: a folder, a file, or the packed rows of a prefix."""
    assert path.resolve().is_relative_to(folder.resolve()), f"{path} is not in the workspace"
    if path.is_dir():
        shutil.rmtree(path)
    kinds = [f"{part}.{suffix}" for part in ("", ".mask", ".docs") for suffix in ("bin", "idx")]
    for name in ("", ".json", *kinds):
        path.with_name(path.name + name).unlink(missing_ok=True)


@pytest.mark.parametrize("page", [page for page, found in documented().items() if any(map(is_run, found))])
def test_commands_of_page(page: str, workspace: Path, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    shutil.copytree(workspace, folder, symlinks=True)
    written: set[Path] = set()
    for command in filter(is_run, documented()[page]):
        run(command, folder, server, written)
    shutil.rmtree(folder)


def test_every_rule_matches_a_command() -> None:
    lines = [command.written for found in documented().values() for command in found]
    for pattern in [*RULES["not_run"], *RULES["exit_1"]]:
        assert any(matches(pattern, line) for line in lines), f"no command matches {pattern}"
    for number, rule in enumerate(RULES["changed"]):
        assert rule["why"] and any(
            matches(rule["find"], functools.reduce(apply, RULES["changed"][:number], line)) for line in lines
        ), f"no command matches {rule['find']}"


def test_a_new_kind_of_command_is_noticed(server: Server, tmp_path: Path) -> None:
    for line in (
        "kubectl apply -f job.yaml",
        "python tools/train.py --recipe tiny --data nothing --save new",
    ):
        with pytest.raises((pytest.fail.Exception, AssertionError), match=r"page\.md"):
            run(Command(written=line, line=line, page="page.md"), tmp_path, server, set())
