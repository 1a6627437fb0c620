"""Data with more than one process: the same bytes whatever their number, and after any number of kills;
nothing left behind."""

from __future__ import annotations

import signal
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import torch

from megatron_ultralong.data import loader
from megatron_ultralong.data.packed_rows import BlendedDataset, PackedDataset
from tests import processes
from tests import text as made

ROOT = Path(__file__).parents[2]


SMALL_UNITS = (
    "import runpy, sys; from megatron_ultralong.data.pretrain import token_cache; token_cache.UNIT_SIZES = (60_000, 60_000); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(
    folder: Path, output: str, *inputs: Path | str, workers: int, own_children: bool = False
) -> processes.Popen:
    """The tool, with units of 60 KB, so that a small input keeps several processes busy."""
    words = [
        ROOT / "tools" / "prepare_data.py",
        "pretrain",
        *inputs,
        "--tokenizer",
        folder / "tokenizer",
        "--seq-length",
        "500",
        "--output",
        folder / output,
        "--workers",
        workers,
    ]
    return processes.Popen(
        [sys.executable, "-c", SMALL_UNITS, *words],
        own_children=own_children,
        stdout=processes.DEVNULL,
        stderr=processes.PIPE,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mix(folder: Path) -> tuple[str, Path]:
    """A file of two sources, resampled by length; as arguments."""
    made.save_tokenizer(folder / "tokenizer")
    made.write_jsonl(folder / "lines.jsonl", [made.text(i, 1 + 37 * i % 300) for i in range(600)])
    (folder / "whole.txt").write_text(made.text(1, 60_000), encoding="utf-8")
    (folder / "mix.yaml").write_text(
        "{rates: {<100: 0.5, 100-400: 1, '>=400': 2}, seed: 5, sources: {a: {input: lines.jsonl, id_key: id}, "
        "b: {input: whole.txt}}}"
    )
    return "--sources", folder / "mix.yaml"


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    arguments = mix(tmp_path)
    one, four = (
        start(tmp_path, "one/text", *arguments, workers=1),
        start(tmp_path, "four/text", *arguments, workers=4),
    )
    assert one.wait(timeout=120) == 0 and four.wait(timeout=120) == 0
    assert files(tmp_path / "one") == files(tmp_path / "four") and "text.documents.parquet" in files(
        tmp_path / "one"
    )

    # A mistake in a document, told to stop at it: one line, exit code 2, no trace.
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write("nonsense\n")
    failed = start(tmp_path, "failed/text", *arguments, "--broken", "stop", workers=2)
    error = failed.communicate(timeout=120)[1]
    assert failed.returncode == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: {tmp_path / 'lines.jsonl'}, line 601: not JSON")
    assert not list((tmp_path / "failed").iterdir())


def test_killed_at_any_moment_and_started_again_it_writes_the_same_bytes(tmp_path):
    arguments = mix(tmp_path)
    assert start(tmp_path, "whole/text", *arguments, workers=2).wait(timeout=120) == 0
    want, kills, units = files(tmp_path / "whole"), 0, set()
    while True:
        tool = start(tmp_path, "killed/text", *arguments, workers=2, own_children=True)
        work = tmp_path / "killed" / ".text.work" / "tokens"
        before = len(list(work.glob("0*.json")))
        while tool.poll() is None and (len(list(work.glob("0*.json"))) < before + 2 or kills > 2):
            time.sleep(0.01)
        if tool.poll() is not None:
            break
        units.add(len(list(work.glob("0*.json"))))
        workers = psutil.Process(tool.pid).children(recursive=True)
        tool.send_signal(signal.SIGKILL)
        tool.communicate()
        assert not psutil.wait_procs(workers, timeout=20)[1], "a worker outlived the tool"
        assert not (tmp_path / "killed" / "text.json").exists()
        kills += 1
    assert (
        tool.returncode == 0
        and kills > 1
        and sorted(units) == list(dict.fromkeys(sorted(units)))
        and max(units) > min(units)
    )
    assert files(tmp_path / "killed") == want


def test_a_tool_told_to_stop_leaves_nothing_of_a_small_input(tmp_path):
    arguments = mix(tmp_path)
    made.write_jsonl(tmp_path / "lines.jsonl", [made.text(i, 20_000) for i in range(10)] * 50)
    tool = start(tmp_path, "out/text", *arguments, workers=2, own_children=True)
    while not list((tmp_path / "out").glob(".text.work/tokens/0*.json")):
        assert tool.poll() is None, "it ended before it could be stopped"
        time.sleep(0.05)
    workers = psutil.Process(tool.pid).children(recursive=True)
    tool.send_signal(signal.SIGTERM)
    error = tool.communicate(timeout=60)[1]
    assert workers and not psutil.wait_procs(workers, timeout=20)[1], "a worker outlived the tool"
    assert tool.returncode == 130 and "Traceback" not in error and not list((tmp_path / "out").iterdir())


def test_loader_processes(tmp_path):
    masks = [[j != i for j in range(9)] for i in range(5)]
    sets = [
        PackedDataset(
            made.write_rows(
                tmp_path / name, [[base + 100 * i + j for j in range(9)] for i in range(5)], masks
            ),
            8,
        )
        for name, base in (("a", 0), ("b", 5000))
    ]
    shard = loader.BatchShard(micro_batch=2, dp=2, dp_rank=1, cp=2, cp_rank=1)
    here = list(islice(loader.batches(BlendedDataset(sets), shard, consumed=4, seed=3), 12))
    there = list(islice(loader.batches(BlendedDataset(sets), shard, consumed=4, seed=3, workers=2), 12))
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
