"""What all example scripts have in common: they are executable, paths are those of the caller's folder, and a
wrong start is one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LOGGED = '#!/bin/bash\nprintf "%s\\n" "${0##*/} $*" >> "$LOG"\nexit 1\n'
"""A stand-in that logs its arguments and fails, which ends the script."""


def run(
    script: str, *arguments: str, cwd: Path, path: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["bash", EXAMPLES / script, *arguments],
        env=environment | settings,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_has_an_interpreter_line_is_executable() -> None:
    files = [*(ROOT / "tools").rglob("*.py"), *EXAMPLES.rglob("*.py"), *EXAMPLES.rglob("*.sh")]
    sourced = [EXAMPLES / name for name in ("stages.sh", "cluster/settings.sh", "cluster/environment.sh")]
    scripts = [file for file in files if file.read_bytes().startswith(b"#!") and file not in sourced]
    assert len(scripts) > 15
    assert [file.name for file in scripts if not os.access(file, os.X_OK)] == []


def test_paths_are_those_of_the_callers_folder(tmp_path: Path) -> None:
    caller, stand_ins, log = tmp_path / "caller", tmp_path / "bin", tmp_path / "log"
    (caller / "text").mkdir(parents=True)
    stand_ins.mkdir()
    for name in ("python", "torchrun", "hf"):
        (stand_ins / name).write_text(LOGGED)
        (stand_ins / name).chmod(0o755)
    for name in ("a", "b"):
        (caller / "text" / f"{name}.jsonl").touch()

    def calls(script: str, *arguments: str, **settings: str) -> str:
        log.write_text("")
        done = run(script, *arguments, cwd=caller, path=stand_ins, LOG=str(log), **settings)
        assert done.returncode != 0, done.stdout
        return log.read_text()

    called = calls("one_node.sh", "model", "text/*.jsonl", "out")
    assert f"--input {caller}/text/a.jsonl {caller}/text/b.jsonl --tokenizer {caller}/model " in called
    assert f"--output {caller}/out/text\n" in called
    called = calls("smollm2.sh", "text/a.jsonl", MODEL="model", RUNS="out")
    assert f"{caller}/text/a.jsonl" in called and f"--tokenizer {caller}/model" in called
    assert f"{caller}/out/" in called
    assert f"{caller}/out/raw" in calls("laptop_data.sh", OUT="out")
    assert f"--output {caller}/out/model" in calls("evaluate.sh", "model", OUT="out")
    assert f"--local-dir {caller}/out/" in calls("ultralong_data.sh", DATA="out", TOKENIZER="model")
    assert str(caller / "out" / "base") in calls("laptop.sh", RUNS="out")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("laptop.sh", cwd=tmp_path, RUNS="file")
    assert done.returncode == 2
    assert done.stderr == f"error: RUNS={tmp_path}/file: no folder that can be written; give another\n"
