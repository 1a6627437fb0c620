"""A recipe of several stages through tools/train.py, stopped and killed in the middle."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint import training_state
from megatron_ultralong.rope.methods import YaRN
from tests import processes
from tests.text import write_rows

ROOT = Path(__file__).parents[2]
MODEL = ("hidden_size=32", "ffn_size=48", "layers=1", "heads=2", "kv_heads=2", "head_dim=16", "vocab_size=61")
SETTINGS = [
    *(f"tiny:model.{setting}" for setting in MODEL),
    "train.global_batch=2",
    "train.warmup=0",
    "train.log_every=1",
    "train.save_every=2",
    "tiny:train.seq_length=512",
    "tiny:train.iterations=3",
    "tiny_extend:train.seq_length=1024",
    "tiny_extend:train.iterations=4",
    "tiny_extend:parallel.cp=1",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(0)
    for name, length in (("short", 512), ("long", 1024)):
        tokens = torch.randint(0, 61, (8, length + 1), generator=generator)
        write_rows(folder / name, tokens.tolist())
    return folder


def command(rows: Path, save: Path, *more: object) -> list[Any]:
    data = ["--data", rows / "short", "--data", rows / "long"]
    tool = [sys.executable, ROOT / "tools" / "train.py", "--recipe", "tiny_stages", *data]
    return [*tool, "--save", save, "--set", *SETTINGS, *more]


def losses(text: str) -> list[str]:
    return re.findall(r"lm loss: (\S+)", text)


@pytest.mark.slow
def test_stages(rows: Path, tmp_path: Path) -> None:
    assert recipes.STAGES["tiny_stages"] == ("tiny", "tiny_extend")
    whole = processes.run(command(rows, tmp_path / "whole"), capture_output=True)
    assert whole.returncode == 0, whole.stderr
    said = [line for line in whole.stdout.splitlines() if line.startswith("stage ")]
    first = tmp_path / "whole" / "tiny" / "iter_0000003"
    assert said == [
        "stage 1 of 2: tiny: starts, 3 iterations",
        f"stage 2 of 2: tiny_extend: starts from {first}, 4 iterations",
    ]
    assert len(losses(whole.stdout)) == 7
    state = training_state.read(tmp_path / "whole" / "tiny_extend" / "iter_0000004")
    # The factor follows the length; instruction tuning after it would keep this RoPE.
    assert isinstance(state.rope, YaRN) and state.rope.factor == 2.0 and state.max_length == 1024

    # Stopped in the first stage, killed in the second.
    broken = tmp_path / "broken"
    saved = "saved checkpoint of iteration 2 "  # reported after iteration 3
    for wanted, number in ((["iteration 1/3"], signal.SIGTERM), (["iteration 3/4", saved], signal.SIGKILL)):
        with processes.Popen(command(rows, broken), stdout=processes.PIPE, stderr=processes.PIPE) as run:
            assert run.stdout is not None
            while line := run.stdout.readline():
                if wanted[0] in line and not wanted[1:]:
                    run.send_signal(number)
                    break
                wanted = wanted[wanted[0] in line :]
            rest = run.communicate(timeout=120)[0]
            assert run.returncode == (0 if number == signal.SIGTERM else -9)
            assert "stage 2" not in rest or number == signal.SIGKILL
        time.sleep(0.1)
    again = processes.run(command(rows, broken), capture_output=True)
    assert again.returncode == 0, again.stderr
    said = [line for line in again.stdout.splitlines() if line.startswith("stage ")]
    assert said[0] == "stage 1 of 2: tiny: complete after 3 iterations"
    assert re.fullmatch(r"stage 2 of 2: tiny_extend: resumes at iteration [23], 4 iterations", said[1])
    found = losses(again.stdout)
    assert found and found == losses(whole.stdout)[-len(found) :]
    # Each stage has a layout of its own.
    layouts = ("tiny:parallel.tp=2", "tiny_extend:parallel.cp=2")
    ranks = processes.torchrun(command(rows, tmp_path / "ranks", *layouts), 2)
    assert ranks.returncode == 0, ranks.stderr
    assert "tp 2 x pp 1 x cp 1" in ranks.stdout and "tp 1 x pp 1 x cp 2" in ranks.stdout
    one, two = ([float(loss) for loss in losses(run.stdout)] for run in (whole, ranks))
    assert one == pytest.approx(two, rel=1e-4)

    # The file that is written after the last evaluation decides.
    (broken / "tiny_extend" / "complete").unlink()
    done = processes.run(command(rows, broken), capture_output=True)
    assert done.returncode == 0 and "tiny_extend: resumes at iteration 4" in done.stdout
    done = processes.run(command(rows, broken), capture_output=True)
    assert done.returncode == 0 and not losses(done.stdout) and done.stdout.count("complete after") == 2

    # A first stage that trains on would leave the second one behind.
    done = processes.run(command(rows, broken, "tiny:train.iterations=5"), capture_output=True)
    assert done.returncode == 2 and done.stderr == (
        f"error: {broken / 'tiny_extend'} was trained from another checkpoint of stage tiny, which is not complete; "
        "remove it, or use a new --save folder\n"
    )


def test_mistakes_are_found_before_the_first_stage(rows: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    for arguments, message in (
        (
            command(rows, save, "tiny_extend:parallel.cp=2"),
            "stage tiny_extend: parallel.tp=1 x pp=1 x cp=2 needs a multiple of 2 ranks, but 1 were started",
        ),
        (
            command(rows, save, "nothing:train.lr=1"),
            "tiny_stages has no stage nothing; its stages: tiny, tiny_extend",
        ),
        (
            [*command(rows, save), "--data", rows / "long"],
            "--data is given 3 times, but tiny_stages has 2 stages (tiny, tiny_extend); give it once for each",
        ),
        (
            command(rows, save, "tiny_extend:train.seq_length=512", "tiny_extend:rope.factor=1"),
            "stage tiny_extend: ",
        ),
    ):
        done = processes.run(arguments, capture_output=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
        assert not save.exists() and not losses(done.stdout)
