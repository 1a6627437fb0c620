"""tools/train.py as real processes: what it logs, and runs that are stopped, killed and started again,
against plain torch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint import run_directory, training_state
from megatron_ultralong.data import packed_rows
from megatron_ultralong.run_report.read import RunRecord, read
from tests import processes
from tests.disk import kept_full, small_disk
from tests.distributed.test_damaged_checkpoints import flip
from tests.train_tool import (
    BATCH,
    CLIP,
    FLOPS,
    HELD_OUT,
    LR,
    MODEL,
    ROOT,
    ROWS,
    SEED,
    WARMUP,
    S,
    Tool,
    saved,
    write_inputs,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# ---- one rank: stopped, killed twice, bit for bit as if nothing had been -----------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_ends_as_one_that_is_not(inputs: Path, tmp_path: Path) -> None:
    save = tmp_path / "broken"

    settings = ("train.iterations=100000", "train.save_every=0", "data.workers=1")
    with Tool(inputs, save, *settings, own_children=True) as tool:
        tool.wait_for("iteration      2/100000")
        os.killpg(
            tool.process.pid, signal.SIGTERM
        )  # as Slurm does: the process that reads the data gets it too
        assert tool.finish() == 0, tool.errors()
        stopped = int(re.findall(r"saved iteration (\d+);", tool.lines[-1])[0])
        assert (
            tool.lines[-1]
            == f"asked to stop: saved iteration {stopped}; run the same command again to resume"
        )
        assert "Error" not in tool.errors()
    assert saved(save) == [stopped] and not list(save.glob(".iter_*"))
    seen = tool.iterations()
    assert list(seen) == list(range(1, stopped + 1)) and stopped >= 2
    assert (
        sum(
            "causal training FLOPs per token = 6 x (weights of all matrix products)" in line
            for line in tool.lines
        )
        == 1
    )

    # The same while a checkpoint is written, whose writers get it too: it is completed, and is the last.
    before = set(save.glob(".iter_*"))
    with Tool(
        inputs, save, "train.iterations=100000", "train.save_every=1", "train.keep=0", own_children=True
    ) as tool:
        tool.wait_for("resuming from")
        partial = _halted_while_saving(tool, save, before)
        os.killpg(tool.process.pid, signal.SIGTERM)
        tool.send(signal.SIGCONT)
        assert tool.finish() == 0, tool.errors()
        stopped = int(re.findall(r"iter_(\d+)", partial.name)[0])
        assert f"asked to stop: saved iteration {stopped}; run the same" in tool.lines[-1]
        assert "Error" not in tool.errors()
    assert saved(save)[-1] == stopped and not list(save.glob(".iter_*"))
    seen |= tool.iterations()

    with Tool(inputs, save, "train.iterations=100000", "train.save_every=4", "train.keep=2") as tool:
        tool.wait_for(
            f"resuming from {save}/iter_{stopped:07d}: iteration {stopped}, {BATCH * stopped} sequences consumed"
        )
        with Tool(inputs, save) as second:
            assert second.finish() == 2
            busy = rf"error: --save {save} is in use by another run \(host \S+, process {tool.process.pid}, since .*\); "
            assert re.match(busy, second.errors()), second.errors()
        tool.wait_for(f"iteration {stopped + 13:6d}/100000")
        tool.kill()
        assert tool.finish() == -signal.SIGKILL
    kept = saved(save)
    assert len(kept) in (2, 3) and all(number % 4 == 0 for number in kept) and kept[-1] > stopped
    seen |= tool.iterations()

    # Killed in the middle of a save: the folder it was writing stays behind, and counts for nothing.
    before = set(save.glob(".iter_*"))
    with Tool(inputs, save, "train.iterations=100000", "train.save_every=1") as tool:
        tool.wait_for(
            f"resuming from {save}/iter_{kept[-1]:07d}: iteration {kept[-1]}, {BATCH * kept[-1]} sequences consumed"
        )
        partial = _halted_while_saving(tool, save, before)
        tool.kill()
        assert tool.finish() == -signal.SIGKILL
    last, unfinished = saved(save)[-1], int(re.findall(r"iter_(\d+)", partial.name)[0])
    assert partial.is_dir() and unfinished == last + 1 and not (save / f"iter_{unfinished:07d}").exists()
    (save / f"iter_{unfinished + 1:07d}").mkdir()  # as another program may leave behind
    (save / f"iter_{unfinished + 1:07d}" / "common.pt").write_bytes(b"")
    seen |= tool.iterations()

    # One wrong bit in the newest: the one before it is used.
    whole = saved(save)[-2]
    flip(max(Path(save / f"iter_{last:07d}").glob("*.distcp"), key=lambda file: file.stat().st_size), 5000)
    end = max(last, *seen) + 3
    with Tool(inputs, save, f"train.iterations={end}", "train.save_every=0") as tool:
        assert tool.finish() == 0, tool.errors()
        assert any(f"resuming from {save}/iter_{whole:07d}" in line for line in tool.lines)
        told = [line for line in tool.lines if "is damaged" in line]
        assert told[0] == (
            f"{save}/iter_{unfinished + 1:07d} is damaged (metadata.json is missing) and was renamed; "
            f"iterations {whole + 1} to {unfinished + 1} are trained again"
        )
        assert re.fullmatch(
            rf"{save}/iter_{last:07d} is damaged \(__0_\d.distcp does not match its checksum\) and was renamed; "
            rf"iterations {whole + 1} to {last} are trained again",
            told[1],
        )
    assert sorted(path.name for path in save.glob("*.damaged")) == [
        f"iter_{n:07d}.damaged" for n in (last, unfinished + 1)
    ]
    assert saved(save)[-1] == end and not list(save.glob(".iter_*")), "leftovers of killed saves are removed"
    seen |= tool.iterations()

    profile = "runtime.profile=2:3"
    with Tool(inputs, tmp_path / "whole", f"train.iterations={end}", "train.save_every=0", profile) as tool:
        assert tool.finish() == 0, tool.errors()
    undisturbed = tool.iterations()
    assert [path.name for path in (tmp_path / "whole" / "profile").iterdir()] == [
        "iterations_2_to_3.pt.trace.json.gz"
    ]
    assert {n: (line["loss"], line["norm"], line["lr"]) for n, line in seen.items()} == {
        n: (line["loss"], line["norm"], line["lr"]) for n, line in undisturbed.items()
    }
    ours, theirs = (_tensors(folder / f"iter_{end:07d}") for folder in (save, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different

    checked = processes.run(
        [sys.executable, "tools/convert_hf.py", "check", "--load", save], cwd=ROOT, capture_output=True
    )
    lines = checked.stdout.splitlines()
    assert checked.returncode == 0 and len(lines) == len(saved(save))
    assert re.fullmatch(
        rf"{save}/iter_{end:07d}: undamaged: \d+ files of [\d,]+ bytes match their checksums", lines[-1]
    )
    flip(save / f"iter_{end:07d}" / "run.json", 200)
    checked = processes.run(
        [sys.executable, "tools/convert_hf.py", "check", "--load", save], cwd=ROOT, capture_output=True
    )
    assert checked.returncode == 1
    assert (
        checked.stdout.splitlines()[-1]
        == f"{save}/iter_{end:07d}: damaged: run.json does not match its checksum"
    )

    _check_lines(undisturbed, _plain_training(inputs, end))
    _check_board(save, undisturbed)
    record = _check_metrics(save, undisturbed)
    assert len(record.starts) == 5 and record.status == "complete" and record.unreadable == 0
    assert record.restarts[-1] == whole and record.lost[len(record.starts) - 1] > 0, "trained again"
    assert [step["profiled"] for step in _check_metrics(tmp_path / "whole", undisturbed).steps.values()] == [
        n in (2, 3) for n in undisturbed
    ]


def _check_metrics(save: Path, lines: dict[int, dict[str, float]]) -> RunRecord:
    """metrics.jsonl has every iteration, over stops and kills, with the figures of the log; its parts add
    up."""
    record = read(save)
    assert list(record.steps) == list(lines)
    assert record.start["model"]["hidden_size"] == MODEL.hidden_size and record.start["devices"]
    assert record.start["rope"]["inverse_frequencies"] == [1.0, 0.1, 0.01, 0.001]
    assert record.start["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    for iteration, line in lines.items():
        step = record.steps[iteration]
        for name, field in (("loss", "loss"), ("lr", "learning_rate"), ("samples", "sequences")):
            assert abs(step[field] - line[name]) <= 1e-6 * abs(line[name]), (iteration, name)
        assert step["z_loss"] is None and step["causal_mfu"] is None
        assert sum(step["parts"].values()) == pytest.approx(step["seconds"], rel=0.02, abs=0.02)
        assert {"data", "forward", "backward", "optimizer"} <= set(step["parts"])
        ranks = record.starts[-1]["layout"]["ranks"]
        assert 0 <= step["slowest_rank"]["rank"] < ranks
        assert step["slowest_rank"]["work"] >= step["slowest_rank"]["median_work"] > 0
        assert step["memory"]["peak_resident"] > 1e8 and step["memory"]["peak_allocated"] is None
    assert record.steps[max(lines)]["eta_seconds"] == 0.0 and record.saves
    return record


def _halted_while_saving(tool: Tool, save: Path, before: set[Path]) -> Path:
    """Halt the process while it writes a checkpoint; returns the hidden folder, which is none of those there
    were `before`."""
    while True:
        for partial in set(save.glob(".iter_*.partial*")) - before:
            tool.send(signal.SIGSTOP)
            number = int(re.findall(r"iter_(\d+)", partial.name)[0])
            if partial.is_dir() and not (save / f"iter_{number:07d}").exists() and number > saved(save)[-1]:
                return partial
            tool.send(
                signal.SIGCONT
            )  # it was an old checkpoint on its way out, or the new one was done already
        assert tool.process.poll() is None, tool.errors()
        time.sleep(0.001)


# ---- two ranks under torchrun ------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_stops_and_goes_on_in_another_layout(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run"
    settings = ("train.save_every=0", "train.eval_every=3", "memory.recompute=all_but_attention")
    valid = ("--valid", str(inputs / "valid"))

    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    # Data parallel; then a pipeline of interleaved chunks, to which three held-out rows are an odd number,
    # with other memory settings.
    with Tool(inputs, save, "train.iterations=100000", *settings, more=valid, ranks=2) as tool:
        tool.wait_for("iteration      4/100000")
        tool.send(signal.SIGUSR1)  # to torchrun, which hands it on
        tool.finish()
        stopped = saved(save)[-1]
        assert f"asked to stop: saved iteration {stopped}; run the same command again to resume" in tool.lines
        assert sum('"offload": "off"' in line for line in tool.lines) == 1, (
            "auto is settled before it is printed"
        )
        stored = training_state.read(run_directory.complete_checkpoints(save)[-1]).stored_run()
        assert stored is not None and stored.memory.offload == "off"
        assert "SIGKILL" not in tool.errors() and "Traceback" not in tool.errors().split("Sending process")[0]
    seen, held_out = tool.iterations(), tool.held_out()
    end = stopped + 4

    others = ("parallel.pp=2", "parallel.vpp=2", "memory.offload=all")
    with Tool(inputs, save, f"train.iterations={end}", *settings, *others, more=valid, ranks=2) as tool:
        assert tool.finish() == 0, tool.errors()
    assert len([line for line in tool.lines if "causal training FLOPs" in line]) == 1, "rank 0 alone prints"
    choices = [
        line
        for line in tool.lines
        if line.startswith(("attention: ", "merge: ", "linear layers and norms: "))
    ]
    assert len(choices) == 3 and choices[0].startswith(
        "attention: PyTorch's flash attention of the CPU (float32"
    )
    assert saved(save)[-1] == end
    seen |= tool.iterations()
    held_out |= tool.held_out()

    reference = _plain_training(inputs, end)
    _check_lines(seen, reference)
    assert list(held_out) == sorted({*range(3, end + 1, 3), end}), "every third iteration and at the end"
    for iteration, loss in held_out.items():
        assert abs(loss - reference[iteration]["held_out"]) < 1e-5 * loss, (
            iteration,
            loss,
            reference[iteration],
        )
    _check_board(save, seen, held_out)
    record = _check_metrics(save, seen)
    assert {i: pytest.approx(v["loss"], rel=1e-6) for i, v in record.validations.items()} == held_out
    first, last = record.steps[1], record.steps[end]
    assert first["parts"]["data parallel"] > 0 and "pipeline" not in first["parts"]
    assert last["parts"]["pipeline"] > 0 and last["exposed_communication"] >= last["parts"]["pipeline"]
    assert sum(record.starts[0]["hosts"].values()) == 2

    # torchrun is killed: its ranks save and end by themselves.
    with Tool(inputs, save, "train.iterations=100000", *settings, ranks=2) as tool:
        tool.wait_for(f"iteration {end + 2:6d}/100000")
        ranks = psutil.Process(tool.process.pid).children()
        tool.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive and tool.finish() == -signal.SIGKILL
        assert saved(save)[-1] > end + 1

    # Also while they still import torch, and have joined nothing.
    with Tool(inputs, save, "train.iterations=100000", *settings, ranks=2) as tool:
        ranks = _ranks_that_import_torch(tool)
        tool.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive and tool.finish() == -signal.SIGKILL


def _ranks_that_import_torch(tool: Tool) -> list[psutil.Process]:
    while tool.process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            ranks = psutil.Process(tool.process.pid).children()
            maps = [Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks]
            if len(ranks) == 2 and all("libtorch" in text for text in maps):
                return ranks
        time.sleep(0.02)
    raise AssertionError(tool.errors())


# ---- a full disk -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(inputs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        save = disk / "run"
        settings = ("train.iterations=100000", "train.save_every=1", "train.keep=2")
        with Tool(inputs, save, *settings, "train.save_failures=1000000") as tool:
            tool.wait_for("saved checkpoint of iteration 2 ")
            with kept_full(disk):
                tool.wait_for("; training goes on without it ")
            # The newest checkpoint may not be known to be good yet.
            assert re.fullmatch(
                rf"warning: checkpoint {save}/iter_\d+ cannot be written: .*; training goes on without it "
                rf"\(1 of 1000000 saves failed\), the (last good|newest) checkpoint is .*{save}/iter_\d+",
                tool.lines[-1],
            ), tool.lines[-1]
            tool.wait_for("saved checkpoint of iteration")
            with kept_full(disk):
                tool.wait_for("; training goes on without it ")
                good = int(tool.lines[-1][-7:])
                assert saved(save)[-1] == good
                assert sum("metrics.jsonl cannot be written" in line for line in tool.lines) <= 2
                tool.send(signal.SIGTERM)
                assert tool.finish() == 2, "the checkpoint at the end is needed"
            said = [line for line in tool.errors().splitlines() if line.startswith("error: ")]
            assert len(said) == 1 and said[0].endswith(f" {save}/iter_{good:07d}")
        assert not list(save.glob(".iter_*")), "what was written of it is removed"
        seen = tool.iterations()
        with Tool(inputs, save, *settings) as tool:
            tool.wait_for(f"resuming from {save}/iter_{good:07d}")
            tool.wait_for("saved checkpoint of iteration")
            with kept_full(disk):
                assert tool.finish() == 2
        again = tool.iterations()
        assert {n: line["loss"] for n, line in again.items() if n in seen} == {
            n: line["loss"] for n, line in seen.items() if n in again
        }


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_mistakes_end_in_one_line(inputs: Path, tmp_path: Path) -> None:
    """Exit code 2, one line on stderr and no checkpoint; what is refused is tested in
    tests/unit/test_train.py."""
    save = tmp_path / "run"

    def refused(line: str, *settings: str, **options: Any) -> None:
        with Tool(inputs, options.pop("save", save), *settings, **options) as tool:
            assert tool.finish() == 2
            assert tool.errors() == f"error: {line}\n"
        assert not list(tmp_path.rglob("*iter_*"))

    refused(
        "--recipe tinny: no such recipe; did you mean tiny? All: "
        + ", ".join([*recipes.names(), *recipes.STAGES]),
        recipe="tinny",
    )
    refused("--set train.iteration: no such setting; did you mean train.iterations?", "train.iteration=4")
    lacking = _copy(inputs / "base", tmp_path / "lacking")
    shard = sorted(lacking.glob("*.safetensors"))[2]
    shard.unlink()
    refused(
        f"{lacking}: shard {shard.name}, which model.safetensors.index.json names, is missing", base=lacking
    )

    poisoned = _copy(inputs / "base", tmp_path / "poisoned")
    shard = next(file for file in poisoned.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    refused(
        "loss is not finite at iteration 1, first on rank 0; no checkpoint has been saved",
        "train.save_every=1",
        base=poisoned,
    )

    # A rank that fails alone: the other does not wait for it, and one of them speaks. torchrun adds its own
    # account.
    (tmp_path / "file").write_text("")
    with Tool(inputs, tmp_path / "file" / "run", ranks=2) as tool:
        assert tool.finish() == 1
        said = [line for line in tool.errors().splitlines() if line.startswith("error: ")]
        assert said == [f"error: --save {tmp_path}/file/run cannot be written: Not a directory"]
        assert "exitcode  : 2" in tool.errors() and f"traceback : {said[0]}" in tool.errors()


def _copy(base: Path, to: Path) -> Path:
    return Path(shutil.copytree(base, to))


# ---- what is expected --------------------------------------------------------------------------


def _plain_training(inputs: Path, iterations: int) -> dict[int, dict[str, float]]:
    """Iteration -> figures of the same run in plain torch: transformers' Llama, AdamW, rows one after the
    other."""
    rows, held_out = (
        packed_rows.open_blend([str(inputs / name)], S, MODEL.vocab_size) for name in ("rows", "valid")
    )
    model = LlamaForCausalLM.from_pretrained(
        inputs / "base", dtype=torch.float32, attn_implementation="eager"
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    figures: dict[int, dict[str, float]] = {}
    for iteration in range(1, iterations + 1):
        lr = LR * min(1.0, iteration / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = lr
        samples = range(BATCH * (iteration - 1), BATCH * iteration)
        parts = [
            _losses(model, *rows.datasets[which][row])
            for which, row in (rows.locate(n, SEED) for n in samples)
        ]
        losses, targets = zip(*parts, strict=True)
        loss, count = sum(losses) / sum(targets), int(sum(targets))
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        with torch.no_grad():
            valid = [_losses(model, *held_out.datasets[0][row]) for row in range(HELD_OUT)]
        figures[iteration] = {
            "loss": float(loss.detach()),
            "norm": norm,
            "lr": lr,
            "targets": count,
            "epochs": BATCH * iteration // ROWS,
            "held_out": float(sum(part for part, _ in valid) / sum(n for _, n in valid)),
        }
    assert min(f["norm"] for f in figures.values()) < CLIP < max(f["norm"] for f in figures.values()), (
        "clipped and not"
    )
    return figures


def _losses(model: Any, tokens: Any, mask: Any) -> tuple[torch.Tensor, float]:
    """(Sum of the cross entropy over a row's target tokens, their number)."""
    ids = torch.from_numpy(tokens.astype("int64"))[None]
    counts = torch.ones(S) if mask is None else torch.from_numpy(mask.astype("float32"))[1:]
    losses = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    return (losses * counts).sum(), float(counts.sum())


def _check_lines(lines: dict[int, dict[str, float]], reference: dict[int, dict[str, float]]) -> None:
    assert list(lines) == list(reference)
    for iteration, line in lines.items():
        want = reference[iteration]
        assert (
            line["samples"] == BATCH * iteration
            and line["targets"] == want["targets"]
            and line["epochs"] == want["epochs"]
        )
        assert abs(line["loss"] - want["loss"]) < 1e-5 * want["loss"], (iteration, line, want)
        assert abs(line["norm"] - want["norm"]) < 1e-3, (iteration, line, want)
        assert abs(line["lr"] - want["lr"]) < 1e-6 * want["lr"], (iteration, line, want)


def _check_board(
    save: Path, lines: dict[int, dict[str, float]], held_out: dict[int, float] | None = None
) -> None:
    """TensorBoard has every iteration once, also over stops and kills, with the figures of the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(save / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    scalars = {
        name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]
    }
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "train/epochs_done"):
        assert len(board.Scalars(name)) == len(scalars[name]) and list(scalars[name]) == list(lines), name
    for iteration, line in lines.items():
        assert abs(scalars["train/loss"][iteration] - line["loss"]) < 1e-5 * line["loss"]
        assert scalars["train/tokens"][iteration] == S * BATCH * iteration
        assert scalars["train/epochs_done"][iteration] == line["epochs"]
        speed, tflops = (
            scalars[f"speed/{name}_per_gpu"][iteration] for name in ("tokens_per_second", "tflops")
        )
        assert speed > 0 and abs(tflops * 1e12 - speed * FLOPS) < 1e-4 * speed * FLOPS
    assert "speed/causal_mfu" not in scalars, "no peak is known for a CPU"
    if held_out is not None:
        assert list(scalars["valid/loss"]) == list(held_out)


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by torch's own reader: weights, master weights, moments."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = checkpoint.parent / "whole.pt"
    dcp_to_torch_save(checkpoint, file)
    found = torch.load(file, weights_only=False)
    file.unlink()
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
