"""metrics.jsonl, the time by part of an iteration, the time left, and profiler traces, in one process."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Train
from megatron_ultralong.context_parallel import comm
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import YaRN
from megatron_ultralong.runtime import agreement
from megatron_ultralong.train import metrics
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.loss_normalisation import MeanLoss
from megatron_ultralong.train.metrics import MetricsFile, Remaining
from megatron_ultralong.train.stopwatch import PARTS, RankTime, StepTime, Stopwatch
from megatron_ultralong.train.trace import Trace
from tests.disk import fill, small_disk


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl -----------------------------------------------------------------------------


def test_lines_are_appended_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    said: list[str] = []
    for number in range(2):
        file = MetricsFile(tmp_path, said.append)
        file.add("step", iteration=number, loss=math.nan, parts={"a": math.inf, "b": [1.5]})
        assert lines(tmp_path)[-1]["iteration"] == number, "on the disk before the run is killed"
        file.close()
        with (tmp_path / "metrics.jsonl").open("a") as torn:
            torn.write('{"kind": "step", "iterat')
    file = MetricsFile(tmp_path, said.append)
    file.close()
    first, second = lines(tmp_path)
    assert first["kind"] == "step" and first["loss"] is None and first["parts"] == {"a": None, "b": [1.5]}
    assert second["iteration"] == 1 and first["time"].endswith("+00:00")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() and not said


def test_a_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 1) as disk:
        file = MetricsFile(disk, said.append)
        file.add("step", iteration=1)
        fill(disk)
        for iteration in range(2, 500):
            file.add("step", iteration=iteration, text="x" * 100)
        file.close()
        assert said == [
            f"warning: metrics.jsonl cannot be written ({disk}/metrics.jsonl cannot be written: "
            "No space left on device); the run goes on without it"
        ]
        monkeypatch.setattr(metrics, "RETRY", 0.0)
        full = MetricsFile(disk, said.append)
        for iteration in range(500, 900):
            full.add("step", iteration=iteration, text="x" * 100)
        assert len(said) == 2, "said once, however often it is tried"
        (disk / "filler").unlink()
        full.add("step", iteration=2)
        full.close()
        assert lines(disk)[0]["iteration"] == 1 and lines(disk)[-1]["iteration"] == 2
        assert said[2:] == ["metrics.jsonl is written again"]


@pytest.mark.parametrize("content", [None, b"[1]\n{}\n"])
def test_a_file_that_cannot_be_opened_is_one_warning(tmp_path: Path, content: bytes | None) -> None:
    place = tmp_path / "metrics.jsonl"
    place.mkdir() if content is None else place.write_bytes(content)
    said: list[str] = []
    file = MetricsFile(tmp_path, said.append)
    file.add("step", iteration=1)
    file.close()
    assert len(said) == 1 and said[0].startswith("warning: metrics.jsonl cannot be written (")
    assert content is None or place.read_bytes() == content


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("end", [None, UserError("loss is not finite"), RuntimeError("NCCL")])
def test_what_the_log_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    z_loss: float,
    end: Exception | None,
) -> None:
    monkeypatch.setattr(agreement, "on_every_rank", lambda act: act())  # one rank, no process group
    monkeypatch.setattr(agreement, "gather", lambda value: [value])
    ranks: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"), world=1, tp=1, pp=1, cp=1, dp=1)
    run = recipes.tiny()
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(
            run.train, z_loss=z_loss, iterations=2, warmup=0, save_every=0, log_every=1
        ),
    )
    assert run.model is not None
    rope = YaRN(theta=10000.0, original_length=16, factor=2.0)
    state = TrainingState(model=run.model, rope=rope)
    timing = StepTime(
        seconds=2.0,
        parts={"forward": 1.5, "pipeline": 0.5},
        ranks=[RankTime(work=1.5, allocated=0, reserved=0, resident=3 * 2**29)],
    )
    rows: Any = SimpleNamespace(epoch=lambda consumed: 0)
    outcome: Any = nullcontext() if end is None else pytest.raises(type(end))
    with outcome, Log(run, ranks, run.model, tmp_path, 0, rows) as log:
        log.start(state, rope, {"attention": "eager"})
        for iteration in (1, 2):
            log.begin(iteration)
            log.step(
                dataclasses.replace(state, iteration=iteration, consumed=8, tokens=1000),
                mean=MeanLoss(3.0, 0.25, 99),
                grad_norm=1.5,
                lr=1e-3,
                timing=timing,
            )
        log.saved(2, seconds=5.0, waited=1.0)
        log.not_saved(2, "the disk is full")
        if end is not None:
            raise end
    start, first, second, saved, failed, stop = lines(tmp_path)
    frequencies, factor = rope.inverse_frequencies(run.model.head_dim, run.train.seq_length)
    assert torch.equal(torch.tensor(start["rope"]["inverse_frequencies"]), frequencies)
    assert start["rope"]["attention_factor"] == factor and start["run"]["train"]["z_loss"] == z_loss
    assert first["loss"] == 3.0 and first["z_loss"] == (0.25 if z_loss else None)
    assert (first["target_tokens"], first["tokens"], first["eta_seconds"]) == (99, 1000, 2.0)
    assert first["exposed_communication"] == 0.5 and second["eta_seconds"] == 0.0
    assert (
        saved["kind"] == "save" and (saved["seconds"], saved["waited"]) == (5.0, 1.0) and "error" not in saved
    )
    assert failed["error"] == "the disk is full"
    reason = {type(None): "complete", UserError: "loss is not finite", RuntimeError: "RuntimeError: NCCL"}
    assert stop["kind"] == "stop" and stop["reason"] == reason[type(end)]
    line = capsys.readouterr().out
    assert "| lm loss: 3.000000E+00 | " in line and ("| z loss: 2.500000E-01 | grad" in line) == bool(z_loss)
    assert "| peak memory (GiB): 1.50 | ETA: 0:00:02 |" in line


# ---- time by part ------------------------------------------------------------------------------


def test_parts_add_up_and_inner_ones_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(
        torch.distributed, "all_gather_into_tensor", lambda out, mine: out.copy_(mine.repeat(2))
    )
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("forward"):
        pass  # not inside an iteration: no time passes
    assert next(now) == 0

    watch.begin()  # 1 (the iteration), 2
    watch("forward-backward", log_level=1).start(barrier=False)
    watch("forward-compute", log_level=2).start()  # 3
    with watch.part("data"):  # 4 to 5
        pass
    with watch.waits(), comm._around_wait():  # 6 to 7
        next(now)  # 7: the wait takes a second longer
    watch("forward-compute").stop()  # 9
    watch("backward-compute", log_level=2).start()  # 10
    watch("backward-compute").stop()  # 11
    with watch.part("optimizer"):  # 12
        watch("params-all-gather", log_level=1).start(barrier=True)  # 13
        watch("params-all-gather").stop()  # 14
    # 15; the end 16 and, with the ranks' figures, 17; 18 for the iteration
    timing = watch.end(SimpleNamespace(world=2, device=torch.device("cpu")))  # type: ignore[arg-type]
    assert timing.parts == {
        "data": 1.0,
        "forward": 3.0,
        "backward": 1.0,
        "context parallel": 2.0,
        "data parallel": 1.0,
        "optimizer": 2.0,
        "other": 5.0,
    }
    assert list(timing.parts) == [name for name in PARTS if name in timing.parts]
    assert sum(timing.parts.values()) == timing.seconds - 2, "of reading the clock for the iteration itself"
    assert [rank.work for rank in timing.ranks] == [5.0, 5.0]
    assert timing.ranks[0].allocated == 0 < timing.ranks[0].resident
    with comm._around_wait():
        pass
    assert next(now) == 19, "outside of the block a wait is not measured"


def test_fields_of_a_step() -> None:
    ranks = [
        RankTime(work=w, allocated=a, reserved=2 * a, resident=5)
        for w, a in ((1.0, 30), (4.0, 10), (2.0, 20))
    ]
    parts = {"forward": 2.0, "context parallel": 0.5, "pipeline": 0.25, "data parallel": 0.125, "other": 1.0}
    timing = StepTime(seconds=9.0, parts=parts, ranks=ranks)
    got = metrics.time_and_memory(timing, on_gpu=True)
    assert got == {
        "parts": parts,
        "exposed_communication": 0.875,
        "memory": {"peak_allocated": 30, "peak_reserved": 60, "peak_resident": 5},
        "slowest_rank": {"rank": 1, "work": 4.0, "median_work": 2.0},
    }
    assert metrics.time_and_memory(timing, on_gpu=False)["memory"] == {
        "peak_allocated": None,
        "peak_reserved": None,
        "peak_resident": 5,
    }


def test_time_left() -> None:
    train = Train(seq_length=8, iterations=10, lr=1.0, save_every=4, eval_every=5)
    left = Remaining(train)
    assert left.seconds(0) is None
    for seconds in (100.0, 2.0, 2.0):  # the first one compiles
        left.step(seconds)
    assert left.seconds(3) == 7 * 2.0
    left.save(30.0)
    left.validation(7.0)
    assert left.seconds(3) == 7 * 2.0 + 3 * 30.0 + 2 * 7.0  # saves at 4, 8, 10; held-out loss at 5, 10
    assert left.seconds(8) == 2 * 2.0 + 30.0 + 7.0
    assert left.seconds(10) == 0.0
    at_the_end = Remaining(Train(seq_length=8, iterations=10, lr=1.0, save_every=0))
    at_the_end.step(1.0)
    at_the_end.save(5.0)
    assert at_the_end.seconds(2) == 8 + 5.0


# ---- traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "first", "last", "name"),
    [
        ((2, 3), 1, 5, "iterations_2_to_3"),
        ((2, 9), 1, 4, "iterations_2_to_4"),  # the run ends inside the window
        ((2, 9), 5, 6, "iterations_5_to_6"),  # resumed inside the window
        ((7, 9), 1, 4, None),
    ],
)
def test_trace(tmp_path: Path, window: tuple[int, int], first: int, last: int, name: str | None) -> None:
    said: list[str] = []
    trace = Trace(window, tmp_path, torch.device("cpu"), said.append)
    recorded = []
    for iteration in range(first, last + 1):
        trace.begin(iteration)
        with torch.profiler.record_function(f"iteration {iteration} here"):
            torch.ones(3).sum()
        if trace.end(iteration):
            recorded.append(iteration)
    trace.close()
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert recorded == [i for i in range(first, last + 1) if window[0] <= i <= window[1]]
    if name is None:
        assert not files and not said
        return
    file = tmp_path / "profile" / f"{name}.pt.trace.json.gz"
    assert files == [file.name] and said == [f"profile written: {file}"]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    seen = {event.get("name") for event in events}
    assert {f"iteration {i} here" for i in recorded} <= seen
    assert not {f"iteration {i} here" for i in range(first, last + 1) if i not in recorded} & seen


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    said: list[str] = []
    trace = Trace((1, 1), tmp_path, torch.device("cpu"), said.append)
    trace.begin(1)
    assert trace.end(1)
    assert len(said) == 1 and said[0].startswith("warning: ") and said[0].endswith("goes on without it")
    assert sorted(os.listdir(tmp_path)) == ["profile"]
