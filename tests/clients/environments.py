"""The clients that read exports, each in an environment of its own (`make test-clients`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-clients"
CLIENTS = {
    "transformers-4.51": "4.51.3",
    "transformers-4.56": "4.56.2",
    "transformers": "5.23.0",
    "vllm": "0.32.0",
    "llama.cpp": "0.3.36",
}
"""Versions; llama.cpp's is that of llama-cpp-python, whose source archive contains it."""

if not ENVIRONMENTS.is_dir():
    pytest.skip("no environments of clients here: make test-clients", allow_module_level=True)


def installed(client: str) -> bool:
    if client == "llama.cpp" and not (folder("llama.cpp-source") / "built").is_file():
        return False
    return client == "transformers" or (folder(client) / "set-up").is_file()


def require(client: str) -> Path:
    """The client's Python; skips the test where the client is not installed."""
    if not installed(client):
        pytest.skip(f"{client} is not installed: make test-clients, {ENVIRONMENTS.name}/{client}/log")
    return Path(sys.executable) if client == "transformers" else folder(client) / "bin" / "python"


def folder(client: str) -> Path:
    return ENVIRONMENTS / client


def probe(client: str, script: str, *arguments: str | Path, timeout: float = 600) -> Any:
    """What a script of this folder prints when the client's Python runs it: {"version", "results"}, of which
    the version is checked and the results are returned."""
    python = require(client)
    cwd = Path(arguments[0]).parent
    done = subprocess.run(
        [python, HERE / script, *arguments], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].split("+")[0] == CLIENTS[client]
    return found["results"]
