"""The command `ultralong`: its list of commands, which answers without importing torch, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultralong import __version__
from megatron_ultralong.commands import completion
from megatron_ultralong.commands.main import COMMANDS, main
from megatron_ultralong.errors import UserError

ROOT = Path(__file__).parents[2]
MODULES = """
import contextlib, io, json, sys
from megatron_ultralong.commands.main import main
imported = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["ultralong", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    imported[" ".join(words)] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(imported))
"""


def ultralong(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ultralong", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ultralong(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, text] for line in lines), name
    assert max(map(len, lines)) <= 105
    assert ultralong(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron_ultralong {__version__}\n"


def test_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ultralong(monkeypatch) == 2
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err
    assert ultralong(monkeypatch, "trian") == 2
    assert "'trian'; did you mean train?" in capsys.readouterr().err
    assert ultralong(monkeypatch, "plan", "--model", "llama-3.1-8b") == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: ultralong plan ") and "required: --gpus" in error


def test_help_imports_no_torch() -> None:
    """In a new interpreter, as torch is imported here."""
    words = [["--help"], *([name, "--help"] for name in COMMANDS), ["train", "--list-recipes"]]
    done = subprocess.run(
        [sys.executable, "-c", MODULES, json.dumps(words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for command, modules in json.loads(done.stdout).items():
        slow = {"torch", "megatron", "transformers", "matplotlib", "pyarrow"} & set(modules)
        assert not slow, f"ultralong {command} imports {slow}"


COMPLETED = (
    ("ultralong eval", {"evaluate"}),
    ("ultralong evaluate per", {"perplexity"}),
    ("ultralong convert export --lo", {"--load"}),
    ("ultralong train --recipe tiny_e", {"tiny_extend", "tiny_extend_sft"}),
    ("ultralong train --set train.save_f", {"train.save_failures="}),
)


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    for shell in ("zsh", "fish", "bash"):
        assert ultralong(monkeypatch, "--completion", shell) == 0
        script = capsys.readouterr().out
        assert "check-context-parallel" in script and "--document-count" in script
    for line, expected in COMPLETED:
        words = line.split()
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_ultralong; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert set(done.stdout.split()) == expected, (line, done.stderr)


def test_completion_without_its_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match="--completion needs shtab: pip install shtab"):
        completion.script(COMMANDS, "bash")
