"""A real model extended to a longer context in small: training with YaRN, export, and comparison of the
export with the checkpoint, by the tools that extend large models. Nothing is downloaded.

The text is Python's language reference, which comes with Python. It is packed here: `ultralong prepare`
needs packages that a rented GPU may not have.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Model, Run
from megatron_ultralong.data import row_writer
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.gpu_report.sizes import ExtensionSettings
from megatron_ultralong.io import atomic_files
from megatron_ultralong.measure.number_format import byte_count, integer, three_digits
from megatron_ultralong.measure.report import ReportColumn

EVERY = 10
"""One document in `EVERY` is held out."""
COLUMNS = (
    ReportColumn("iteration_seconds", "s/iteration", three_digits, "median, without the first iteration"),
    ReportColumn("tokens_per_second", "tokens/s", integer),
    ReportColumn("peak_bytes", "peak", byte_count, "allocated on the GPU"),
    ReportColumn("first_loss", "held-out loss after 1 iteration", three_digits),
    ReportColumn("last_loss", "held-out loss at the end", three_digits),
    ReportColumn("seconds", "seconds", three_digits, "all stages together"),
)
_ITERATION = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_HELD_OUT = re.compile(r"validation loss at iteration \d+ \| lm loss value: (\S+)")
_PEAK = re.compile(r"GPU memory at its peak: (\d+) bytes")


def planned_run(settings: ExtensionSettings) -> tuple[Run, Model]:
    """Return the run, offload settled to off, and the model's shape."""
    model = hf_config.read_config(settings.model).model
    run = override(recipes.get("smollm2_135m"), _run_settings(settings))
    return replace(run, memory=replace(run.memory, offload="off")), model


def _run_settings(settings: ExtensionSettings) -> list[str]:
    found = hf_config.read_config(settings.model)
    original = found.max_position
    return [
        f"rope.factor={settings.factor}",
        f"rope.original_length={original}",
        f"rope.theta={found.rope.theta}",
        f"train.seq_length={settings.factor * original}",
        f"train.iterations={settings.iterations}",
        f"train.global_batch={settings.batch}",
        f"train.precision={settings.precision}",
        "train.warmup=1",
        "train.eval_every=1",
        "train.eval_rows=1",
        "train.log_every=1",
        f"train.save_every={settings.iterations}",
    ]


def measure(settings: ExtensionSettings, device: str) -> dict[str, Any]:
    """Run all stages and return the figures. RuntimeError with a tool's last line if one fails."""
    start = time.perf_counter()
    folder, length = settings.folder, planned_run(settings)[0].train.seq_length
    folder.mkdir(parents=True, exist_ok=True)
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = load_tokenizer(settings.model)
    for name, documents in (
        ("text", [text for i, text in enumerate(texts) if i % EVERY]),
        ("held_out", texts[::EVERY]),
    ):
        _write_rows(folder / name, [tokenizer.ids(text) for text in documents], length)
    trained = folder / "train" / f"iter_{settings.iterations:07d}"
    log = folder / "train.log"
    if not log.is_file():  # a part of a training has no times of the first iterations
        for name in ("train", "hf"):
            shutil.rmtree(folder / name, ignore_errors=True)
        atomic_files.write_text(
            log,
            _tool(
                "train",
                "--recipe",
                "smollm2_135m",
                "--set",
                f"runtime.device={device}",
                *_run_settings(settings),
                "--load-hf",
                settings.model,
                "--data",
                folder / "text",
                "--valid",
                folder / "held_out",
                "--save",
                folder / "train",
            ),
        )
    if not (folder / "hf").is_dir():
        _tool("convert", "export", "--load", trained, "--output", folder / "hf")
    _tool("convert", "verify", "--load-hf", folder / "hf", "--load", trained)
    text = log.read_text(encoding="utf-8")
    return _figures(text, settings.batch * length) | {"seconds": time.perf_counter() - start}


def _write_rows(prefix: Path, documents: list[list[int]], length: int) -> None:
    """Pack documents, as often as it takes for one, into rows of `length` + 1 tokens, unless they exist."""
    if Path(f"{prefix}.json").is_file():
        return
    stream = numpy.concatenate([numpy.array(ids, numpy.int32) for ids in documents])
    stream = numpy.tile(stream, 1 + length // len(stream))
    rows = stream[: len(stream) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    with row_writer.staged(str(prefix)) as stage:
        writer = row_writer.RowWriter(stage, length + 1, numpy.int32, masks=False, starts=False)
        writer.add(rows)
        writer.finish()
        manifest = {"format": 1, "kind": "pretrain", "seq_length": length, "rows": writer.rows}
        row_writer.write_manifest(stage, manifest | {"max_token_id": writer.largest})


def _tool(name: str, *words: Any) -> str:
    """Run `ultralong NAME`; return what it printed. RuntimeError with its last line if it fails."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "megatron_ultralong", name, *map(str, words)]
    print("$", *command, flush=True)
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        raise RuntimeError(f"ultralong {name} ended with exit code {done.returncode}: {last}")
    return done.stdout


def _figures(log: str, tokens: int) -> dict[str, Any]:
    """Figures of a training's log lines, whose iterations have `tokens` tokens."""
    seconds = [float(value) / 1e3 for value in _ITERATION.findall(log)]
    losses = [float(value) for value in _HELD_OUT.findall(log)]
    iteration = statistics.median(seconds[1:] or seconds)
    peak = _PEAK.search(log)
    return {
        "iteration_seconds": iteration,
        "tokens_per_second": tokens / iteration,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": int(peak[1]) if peak else None,
    }
