"""A running tools/train.py on a small model, for tests that stop and kill it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_ultralong.checkpoint import run_directory
from megatron_ultralong.config import Model
from tests import processes
from tests.text import write_rows
from tests.tiny import hf_model

ROOT = Path(__file__).parents[1]
MODEL = Model(hidden_size=32, ffn_size=64, layers=4, heads=4, kv_heads=2, head_dim=8, vocab_size=61)
S, BATCH, SEED = 32, 4, 5
ROWS, HELD_OUT = 6, 3
"""6 rows in batches of 4: an epoch ends in the middle of every other iteration. 3 rows do not divide by
anything."""
LR, WARMUP, CLIP = 3e-3, 3, 1.5
FLOPS = 257_472
"""A token, by hand: 6 x (4 x (32 x 8 x 8 + 4 x 8 x 32 + 3 x 32 x 64) + 32 x 61) + 6 x 4 x 4 x 8 x 32."""
SETTINGS = [
    *(f"model.{name}={value}" for name, value in dataclasses.asdict(MODEL).items() if name != "norm_eps"),
    f"train.seq_length={S}",
    f"train.global_batch={BATCH}",
    f"train.seed={SEED}",
    "train.log_every=1",
    f"train.lr={LR}",
    "train.min_lr=0",
    f"train.warmup={WARMUP}",
    "train.schedule=constant",
    f"optim.clip={CLIP}",
    "optim.weight_decay=0.1",
    "memory.loss_chunk=24",
    "runtime.device=cpu",
]
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(?P<iteration>\d+)/\d+ \| consumed samples: (?P<samples>\d+) "
    r"\| epochs done: (?P<epochs>\d+) \| elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \| learning rate: (?P<lr>\S+) "
    r"\| global batch size: 4 \| lm loss: (?P<loss>\S+) \| grad norm: (?P<norm>\S+) \| target tokens: (?P<targets>\d+) "
    r"\| tokens/s/GPU: (?P<speed>[\d.]+) \| TFLOP/s/GPU: [\d.]+ \| peak memory \(GiB\): [\d.]+ \| ETA: (?:\d+ days?, )?\d+:\d\d:\d\d \|"
)


def write_inputs(folder: Path) -> Path:
    """`base`, a sharded Hugging Face model; `rows` with masks and `valid`, packed rows."""
    hf_model(MODEL).save_pretrained(folder / "base", max_shard_size="20KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 3
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, MODEL.vocab_size, (ROWS + HELD_OUT, S + 1), generator=generator)
    masks = (torch.rand(ROWS, S + 1, generator=generator) > torch.linspace(0.1, 0.7, ROWS)[:, None]).int()
    write_rows(folder / "rows", tokens[:ROWS].tolist(), masks.tolist())
    write_rows(folder / "valid", tokens[ROWS:].tolist())
    return folder


def saved(save: Path) -> list[int]:
    """Iterations of the complete checkpoints."""
    return [int(path.name[5:]) for path in run_directory.complete_checkpoints(save)]


class Tool:
    """A running `tools/train.py` and what it has printed; killed at the end of the block, with all that it
    started."""

    def __init__(
        self,
        inputs: Path,
        save: Path,
        *settings: str,
        more: tuple[str, ...] = (),
        ranks: int = 1,
        recipe: str = "tiny",
        base: Path | None = None,
        own_children: bool = False,
        timeout: float = 300.0,
    ) -> None:
        torchrun = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            if ranks > 1
            else []
        )
        command = [
            sys.executable,
            *torchrun,
            "tools/train.py",
            "--recipe",
            recipe,
            "--set",
            *SETTINGS,
            *settings,
            "--load-hf",
            str(base or inputs / "base"),
            "--data",
            str(inputs / "rows"),
            "--save",
            str(save),
            *more,
        ]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.stderr = inputs / f"{uuid.uuid4()}.stderr"
        with self.stderr.open("w") as file:
            self.process = processes.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=processes.PIPE,
                stderr=file,
                start_new_session=True,
                own_children=own_children,
            )
        self.lines: list[str] = []
        self.timer = threading.Timer(timeout, self.kill)

    def __enter__(self) -> Tool:
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            tool = psutil.Process(self.process.pid)
            for process in (
                *tool.children(recursive=True),
                tool,
            ):  # torchrun's ranks are sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def output(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            yield self.lines[-1]

    def wait_for(self, text: str) -> None:
        assert any(text in line for line in self.output()), f"ended without {text!r}: {self.errors()}"

    def finish(self) -> int:
        for _ in self.output():
            pass
        return self.process.wait()

    def errors(self) -> str:
        return self.stderr.read_text()

    def iterations(self) -> dict[int, dict[str, float]]:
        """Iteration -> the figures of its line."""
        found = [LINE.fullmatch(line) for line in self.lines if "] iteration " in line]
        assert found and all(found), self.lines
        return {int(m["iteration"]): {k: float(v) for k, v in m.groupdict().items()} for m in found if m}

    def held_out(self) -> dict[int, float]:
        """Iteration -> held-out loss."""
        held_out = re.compile(r" validation loss at iteration (\d+) \| lm loss value: (\S+) \|")
        found = [held_out.fullmatch(line) for line in self.lines if "validation" in line]
        assert all(found), self.lines
        return {int(m[1]): float(m[2]) for m in found if m}
