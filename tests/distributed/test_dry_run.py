"""`ultralong train --dry-run`: what is checked on every rank, its table and verdict, and that nothing is
written."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ultralong import recipes
from megatron_ultralong.commands import train
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning.hardware import GPUS
from megatron_ultralong.runtime import memory
from megatron_ultralong.train import dry_run_report, run_lock
from megatron_ultralong.train.dry_run_plan import Hardware
from megatron_ultralong.train.dry_run_report import Finding, RankFindings
from tests import processes
from tests.text import write_rows
from tests.train_tool import ROOT, ROWS, SETTINGS, write_inputs

CP = ("parallel.cp=2", "train.iterations=6")
RUN = """
import os
os.chdir(os.environ["RANK"])
from megatron_ultralong.commands import train
from megatron_ultralong.runtime import cli
cli.main(train.main)
"""
"""Each rank in a folder of its own, like hosts whose storage is not shared."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def words(folder: Path, *settings: str, **changes: Path) -> list[str]:
    paths = {"load-hf": folder / "base", "data": folder / "rows", "valid": folder / "valid", **changes}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["--recipe", "tiny", "--set", *SETTINGS, *settings, *options, "--dry-run"]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[str]:
    """The problems of a run that cannot start, each on one line."""
    with pytest.raises(UserError, match=r"the run cannot start: \d+ problems?, see above") as error:
        train.main(arguments)
    text = re.sub(r"\n {15}", " ", capsys.readouterr().out)
    assert "verdict" not in text and max(map(len, text.splitlines())) > 0
    found = re.findall(r"^problem +(.*)", text, re.MULTILINE)
    assert f": {len(found)} problem" in str(error.value)
    return found


def test_a_run_that_can_start(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(inputs)
    save = tmp_path / "new" / "run"
    train.main(words(inputs, *CP, save=save))
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if " " in line[15:]) <= 80
    text = re.sub(r"\n {15}", " ", out)
    rows = dict(re.findall(r"^(\S.*?) {2,}(.*)", text, re.MULTILINE))
    assert rows["ranks"] == (
        "2 = TP 1 x PP 1 x CP 2 x DP 1; 4 micro-batches of 1 in an iteration of each; assumed, as there is no "
        "torchrun: the layout needs a multiple of 2 ranks"
    )
    assert rows["weights"] == f"{inputs}/base: all tensors are there; 4 layers, hidden size 32, vocabulary 61"
    assert rows["data"] == (
        f"{inputs}/rows: {ROWS} rows, int32; 32 + 1 tokens a row; the run reads 24 rows, 4 times the data"
    )
    assert rows["held-out data"] == f"{inputs}/valid: 3 rows, int32; 32 + 1 tokens a row"
    assert re.fullmatch(
        rf"{save}: a new folder, [\d,.]+ GB free; checkpoints of \d\.\d MB, of which 2 are kept", rows["save"]
    )
    assert "per rank, estimated" in rows["memory"] and rows["device"] == "CPU"
    assert text.endswith("\nverdict: ready to train\n")
    assert files(inputs) == before and not any(tmp_path.iterdir())


def test_what_is_wrong(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run"
    # Everything is checked, whatever else is wrong.
    found = refused(
        capsys, words(inputs, *CP, save=save, **{"load-hf": tmp_path / "none", "data": tmp_path / "x"})
    )
    assert [one.partition(":")[0] for one in found] == ["weights", "data"]
    assert f"{tmp_path}/none" in found[0] and f"{tmp_path}/x.json is missing" in found[1]
    assert refused(capsys, words(inputs, *CP, "train.seq_length=64", save=save)) == [
        f"{name}: {inputs}/{prefix} has rows of 33 tokens, but sequence length 64 requires 65; repack it: ultralong "
        "prepare pretrain --seq-length 64"
        for name, prefix in (("data", "rows"), ("held-out data", "valid"))
    ]
    (ranks,) = refused(capsys, [*words(inputs, *CP, save=save), "--gpus", "3"])
    assert ranks.startswith("ranks: parallel.tp=1 x pp=1 x cp=2 needs a multiple of 2 ranks, but 3 were")
    loaded = ["--recipe", "smollm2_135m", *words(inputs, save=save)[2:]]
    settings = ["train.seq_length=32", "rope.factor=1", "rope.original_length=32", "parallel.tp=4"]
    at = loaded.index("--load-hf")
    found = refused(capsys, ["--recipe", "smollm2_135m", "--set", *settings, *loaded[at:]])
    assert any("model.kv_heads=2 is not divisible by parallel.tp=4" in one for one in found)
    (shard,) = list((inputs / "base").glob("*2-of-*.safetensors"))
    kept = shard.rename(tmp_path / "kept")
    (weights,) = refused(capsys, words(inputs, save=save))
    assert weights.startswith("weights: ") and shard.name in weights
    kept.rename(shard)
    with run_lock.locked(save):
        (busy,) = refused(capsys, words(inputs, save=save))
    assert busy.startswith(f"save: --save {save} is in use by another run (host ")
    (file,) = refused(capsys, words(inputs, save=inputs / "rows.bin" / "run"))
    assert file == f"save: --save {inputs}/rows.bin/run: {inputs}/rows.bin is not a directory"

    # Memory: of a GPU that is assumed, and of this host.
    gpu = ["runtime.device=cuda", *CP]
    train.main([*words(inputs, *gpu, save=save), "--gpus", "4", "--gpu", "h200"])
    text = capsys.readouterr().out
    assert "h200, 141 GB (assumed: no GPU here; --gpu)" in text and "GPU-hours, estimated" in text
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=10_000))
    (too_small,) = refused(capsys, words(inputs, *gpu, save=save))
    assert re.match(
        r"memory: needs 0\.0 GB per GPU, but only 0\.0 GB are usable; the largest part is", too_small
    )
    monkeypatch.setattr(memory, "host_bytes", lambda: 10_000)
    (too_small,) = refused(capsys, words(inputs, *CP, save=save))
    assert re.match(
        r"memory: needs 0\.0 GB per rank, but only 0\.0 GB are available to each of 2 ranks", too_small
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # of the lock
    with pytest.raises(UserError, match="--gpu h1: unknown; choose one of h100"):
        train.main([*words(inputs, save=save), "--gpu", "h1"])


def test_without_weights_a_published_model_is_planned(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-3.1-8B, before it is downloaded."""
    options = ["--data", str(inputs / "rows"), "--save", str(tmp_path / "run"), "--dry-run"]
    found = refused(capsys, ["--recipe", "ultralong_1m_stages", "--data", str(inputs / "rows"), *options])
    subjects = [one.partition(":")[0] for one in found]
    assert subjects[:2] == ["weights", "data"] and set(subjects) <= {"weights", "data", "save"}
    assert "give --load-hf DIR or --load CKPT" in found[0] and "requires 1048577" in found[1]
    assert "requires 8193" in found[subjects.index("data", 2)]


def test_every_rank_is_asked(inputs: Path, tmp_path: Path) -> None:
    """The rows of rank 1 are missing, and its tokenizer is none."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for path in inputs.iterdir():
            if rank == 0 or not path.name.startswith("rows"):
                (tmp_path / str(rank) / path.name).symlink_to(path)
    there = Path(".")
    command = [sys.executable, "-c", RUN, *words(there, *CP, save=there / "run")]
    done = processes.torchrun(command, 2, cwd=tmp_path)
    text = re.sub(r"\n {15}", " ", done.stdout)
    assert done.returncode == 1 and "checked by 2 ranks on 1 host: " in text
    (problem,) = re.findall(r"^problem +(.*)", text, re.MULTILINE)
    assert re.fullmatch(r"rank 1 \(host \S+\): data: rows.json is missing; make packed rows .*", problem)
    assert done.stderr.count("error: the run cannot start: 1 problem, see above") == 1
    for name in ("rows.bin", "rows.idx", "rows.json", "rows.mask.bin", "rows.mask.idx"):
        (tmp_path / "1" / name).symlink_to(inputs / name)
    done = processes.torchrun(command, 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nverdict: ready to train on 2 ranks\n")
    assert done.stdout.count("verdict") == 1 and not any(
        (tmp_path / str(rank) / "run").exists() for rank in range(2)
    )
    done = processes.torchrun(command, 3, cwd=_third(tmp_path))
    text = re.sub(r"\n {15}", " ", done.stdout)
    assert done.returncode == 1
    assert re.search(
        r"problem +ranks 0-2 \(host \S+\): ranks: .* needs a multiple of 2 ranks, but 3 were started", text
    )


def _third(folder: Path) -> Path:
    (folder / "2").symlink_to(folder / "1")
    return folder


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own memory and data sheet; a rank without one is a problem under torchrun alone."""
    run = recipes.get("ultralong_1m")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Hardware.of(run, "b200").describe() == "b200, 180 GB (assumed: no GPU here; --gpu)"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(UserError, match="runtime.device=cuda, but torch sees no GPU here"):
        Hardware.of(run, "b200").describe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sheet = {"name": "NVIDIA H100 80GB HBM3", "total_memory": 85_000_000_000}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**sheet))
    found = Hardware.of(run, "b200")
    assert found.describe() == "NVIDIA H100 80GB HBM3, 85 GB" and found.known and found.gpu is not None
    assert replace(found.gpu, memory=0) == replace(GPUS["h100"], memory=0)
    sheet["name"] = "Another GPU"
    assert not Hardware.of(run, "b200").known
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="at least 4 ranks on a node with 2 GPUs"):
        Hardware.of(run, "b200").describe()


def test_ranks_and_hosts_of_a_problem() -> None:
    def rank(host: str, **found: Any) -> RankFindings:
        return RankFindings(
            host=host,
            stages=[[Finding(subject=name, text=text, wrong="!" in text) for name, text in found.items()]],
        )

    a, b = rank("a", data="4 rows", save="free"), rank("b", data="gone!", save="free")
    lines, count = dry_run_report.lines(["tiny"], [a, a, b, b])
    assert count == 1 and lines[-1].split(maxsplit=1) == ["problem", "ranks 2-3 (host b): data: gone!"]
    lines, count = dry_run_report.lines(["tiny"], [a, rank("b", data="5 rows", save="free")])
    assert lines[-1].split(maxsplit=1) == ["problem", "rank 1 (host b): data differs from rank 0's: 5 rows"]
    _, count = dry_run_report.lines(["tiny"], [b, a])
    assert count == 1
    assert dry_run_report.lines(["tiny"], [a, a])[0][-1] == "verdict: ready to train on 2 ranks"


def test_stages_that_were_trained(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is complete is not trained again; another resumes its own checkpoint, with its settings."""
    write_rows(tmp_path / "short", torch.randint(61, (2, 513)).tolist())
    write_rows(tmp_path / "long", torch.randint(61, (2, 1025)).tolist())
    run = tmp_path / "run"
    data = [word for name in ("short", "long") for word in ("--data", str(tmp_path / name))]
    settings = ["tiny_extend:train.seq_length=1024", "train.global_batch=2"]
    settings += [
        "runtime.device=cpu",
        "train.iterations=1",
        "train.warmup=0",
        "tiny_extend:parallel.cp=1",
        "tiny:model.layers=1",
    ]

    def arguments(*more: str) -> list[str]:
        return ["--recipe", "tiny_stages", "--set", *settings, *more, *data, "--save", str(run)]

    # All stages have the ranks of one torchrun.
    train.main([*arguments("tiny_extend:parallel.cp=2"), "--dry-run"])
    assert len(re.findall(r"^ranks +2 = ", capsys.readouterr().out, re.MULTILINE)) == 2

    done = processes.run(
        [sys.executable, "tools/train.py", *arguments("tiny_extend:train.save_every=1")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run / "tiny_extend" / "complete").unlink()  # as if stopped before the last evaluation
    before = files(run)
    train.main([*arguments("tiny:train.precision=bf16"), "--dry-run"])
    text = re.sub(r"\n {15}", " ", capsys.readouterr().out)
    first, second = re.findall(r"^weights +(.*)", text, re.MULTILINE)
    assert first == "complete: this stage is not trained again"
    assert second.startswith(f"resumes from {run}/tiny_extend/iter_0000001: iteration 1; ")
    (problem,) = refused(capsys, [*arguments("tiny_extend:train.precision=bf16"), "--dry-run"])
    assert problem.startswith("weights: the run was started with train.precision=fp32 and cannot resume")
    assert files(run) == before


def test_assumed_gpus_and_a_link_to_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gpus in ("0", "-3"):
        with pytest.raises(UserError, match=f"^--gpus {gpus}: must be at least 1$"):
            train.main([*words(inputs, save=tmp_path / "run"), "--gpus", gpus])
    for option in (["--gpus", "8"], ["--gpu", "h200"]):
        with pytest.raises(SystemExit, match="2"):
            train.main([*words(inputs, save=tmp_path / "run")[:-1], *option])
        assert "--gpus and --gpu are of --dry-run" in capsys.readouterr().err
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for save in (link, link / "run"):
        assert refused(capsys, words(inputs, save=save)) == [
            f"save: --save {save}: {link} is not a directory"
        ]
