"""Data with more than one process: the same bytes whatever their number; a tool that is stopped leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import torch

from megatron_ultralong.data import loader, packing
from megatron_ultralong.data.dataset import PackedRows, Rows
from tests import text as made

ROOT = Path(__file__).parents[2]


def start(folder: Path, output: str, *inputs: Path, workers: int) -> subprocess.Popen[str]:
    words = [ROOT / "tools" / "prepare_data.py", "pretrain", "--input", *inputs, "--tokenizer", folder / "tokenizer",
             "--seq-length", "500", "--output", folder / output, "--workers", workers]
    return subprocess.Popen([sys.executable, *map(str, words)], env=os.environ | {"PYTHONPATH": str(ROOT)},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_tokenizer_processes(tmp_path):
    tokenizer = made.save_tokenizer(tmp_path / "tokenizer")
    lines = made.write_jsonl(tmp_path / "lines.jsonl", [made.text(i, 1 + 37 * i % 300) for i in range(400)])
    whole = tmp_path / "whole.txt"
    whole.write_text(made.text(1, 60_000), encoding="utf-8")
    two = start(tmp_path, "two/text", lines, whole, workers=2)
    packing.pack([lines, whole], tokenizer, 500, str(tmp_path / "none" / "text"), show_progress=False)
    assert two.wait(timeout=120) == 0
    names = sorted(path.name for path in (tmp_path / "none").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and "text.json" in names
    assert all((tmp_path / "none" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)

    # A mistake in a document: one line, exit code 2, no trace.
    with lines.open("a") as file:
        file.write("nonsense\n")
    failed = start(tmp_path, "failed/text", whole, lines, workers=1)
    error = failed.communicate(timeout=120)[1]
    assert failed.returncode == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: {lines}, line 401: not JSON")
    assert not list((tmp_path / "failed").iterdir())


def test_a_stopped_tool_leaves_nothing_that_looks_whole(tmp_path):
    """SIGTERM tidies up. SIGKILL cannot, but the workers end too, and what lies there is hidden and without manifest."""
    made.save_tokenizer(tmp_path / "tokenizer")
    big = made.write_jsonl(tmp_path / "big.jsonl", [made.text(i, 20_000) for i in range(10)] * 100)
    tools = {stop: start(tmp_path, f"{stop.name}/text", big, workers=1) for stop in (signal.SIGTERM, signal.SIGKILL)}
    try:
        for stop, tool in tools.items():
            while not any(path.stat().st_size > 100_000 for path in (tmp_path / stop.name).glob(".text.partial-*/.bin")):
                assert tool.poll() is None, "it ended before it could be stopped"
                time.sleep(0.05)
            workers = psutil.Process(tool.pid).children(recursive=True)
            tool.send_signal(stop)
            error = tool.communicate(timeout=60)[1]
            assert workers and not psutil.wait_procs(workers, timeout=20)[1], "a worker outlived the tool"
            left = [path.name.startswith(".text.partial-") for path in (tmp_path / stop.name).iterdir()]
            assert (tool.returncode, left) == ((130, []) if stop == signal.SIGTERM else (-signal.SIGKILL, [True]))
            assert "Traceback" not in error
    finally:
        for tool in tools.values():
            tool.kill()


def test_loader_processes(tmp_path):
    masks = [[j != i for j in range(9)] for i in range(5)]
    sets = [PackedRows(made.write_rows(tmp_path / name, [[base + 100 * i + j for j in range(9)] for i in range(5)], masks), 8)
            for name, base in (("a", 0), ("b", 5000))]
    settings = {"consumed": 4, "global_batch": 4, "micro_batch": 2, "seed": 3, "dp": 2, "dp_rank": 1, "cp": 2, "cp_rank": 1}
    here = list(islice(loader.batches(Rows(sets), **settings), 12))
    there = list(islice(loader.batches(Rows(sets), **settings, workers=2), 12))
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
