#!/usr/bin/env python
"""The demo: extend the context of a small Llama from 512 to 4,096 tokens with the complete pipeline.

    python examples/demo/demo.py      (make demo sets up first)

The stages are the passkey grid before training, documents, packed rows, YaRN continued pretraining on two
context parallel CPU ranks, export to Hugging Face, and the passkey grid after training. Each uses the same
tool as a cluster does. The base model, `base/`, was trained by `make_base.sh`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, short_count
from megatron_ultralong.evaluate.report import heat_map, read_results
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import cli

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(__file__).resolve().parent / "base"
OUT = Path("runs/demo")  # relative to ROOT, where every stage runs

FACTOR, BASE_LENGTH = 8, 512
LENGTH = FACTOR * BASE_LENGTH
LENGTHS = (512, 1024, 2048, 4096)
DEPTHS, TRIALS = "0,25,50,75,100", 8
"""Five depths of eight prompts: 40 per length."""
ITERATIONS, BATCH = 60, 2
ENOUGH = 0.95
"""Accuracy required at every length."""


def main() -> int:
    began = time.time()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    for name in ("train", "hf", "before", "after"):
        shutil.rmtree(ROOT / OUT / name, ignore_errors=True)

    say(f"1/5  passkey grid of the base model: context {BASE_LENGTH}")
    before = passkey(BASE, "before")
    say(f"2/5  documents, packed into rows of {LENGTH} + 1 tokens")
    corpus.write_documents(
        BASE, ROOT / OUT / "text.jsonl", length=LENGTH, rows=ITERATIONS * BATCH, seed=1, listed=0
    )
    tool(
        "prepare_data.py",
        "pretrain",
        "--input",
        OUT / "text.jsonl",
        "--tokenizer",
        BASE,
        "--seq-length",
        LENGTH,
        "--separator-token",
        "eos",
        "--output",
        OUT / "text",
    )
    say(
        f"3/5  continued pretraining at {LENGTH} tokens with YaRN factor {FACTOR}, two context parallel ranks"
    )
    tool(
        "train.py",
        "--recipe",
        "tiny_extend",
        "--set",
        "runtime.device=cpu",
        f"train.seq_length={LENGTH}",
        f"rope.factor={FACTOR}",
        f"train.iterations={ITERATIONS}",
        f"train.global_batch={BATCH}",
        "--load-hf",
        BASE,
        "--data",
        OUT / "text",
        "--save",
        OUT / "train",
        ranks=2,
    )
    say("4/5  export to Hugging Face")
    tool("convert_hf.py", "export", "--load", OUT / "train", "--output", OUT / "hf")
    say("5/5  passkey grid of the export, in plain transformers")
    after = passkey(OUT / "hf", "after")

    seconds = round(time.time() - began)
    summary = {
        name: {str(one.length): (one.score or 0.0) / 100 for one in result.scores}
        for name, result in (("before", before), ("after", after))
    }
    atomic_files.write_json(ROOT / OUT / "summary.json", {**summary, "seconds": seconds})
    draw(before, after, ROOT / OUT / "passkey.png")
    return report(summary, seconds)


def draw(before: BenchmarkResult, after: BenchmarkResult, path: Path) -> None:
    """Write the two passkey grids as one PNG (also the README's: docs/images/draw.py)."""
    heat_map.heat_maps(
        [before, after],
        [f"before: context {BASE_LENGTH}", f"after: YaRN {FACTOR}x, {ITERATIONS} iterations"],
        path,
        trained=[BASE_LENGTH, LENGTH],
    )


def report(summary: dict[str, dict[str, float]], seconds: int) -> int:
    """Print the result and the paths of the files; return the exit code, 1 if the accuracy is too low."""
    say("pass keys found, of 40 per length")
    print("tokens".rjust(9) + "".join(f"{short_count(length):>8}" for length in LENGTHS))
    for name, values in summary.items():
        print(name.rjust(9) + "".join(f"{values[str(length)]:>8.0%}" for length in LENGTHS))
    shown = min(summary["after"].values()) >= ENOUGH
    print(
        f"\ncontext {BASE_LENGTH} -> {LENGTH} in {seconds} s"
        if shown
        else f"\nfailed: accuracy below {ENOUGH:.0%} at some length after {seconds} s of training and evaluation"
    )
    print(
        f"Hugging Face model                {OUT}/hf\npasskey grid before and after     {OUT}/passkey.png\nall figures"
        f"                       {OUT}/summary.json"
    )
    return 0 if shown else 1


def passkey(model: Path, name: str) -> BenchmarkResult:
    tool(
        "evaluate.py",
        "niah",
        "--model",
        model,
        "--lengths",
        ",".join(map(str, LENGTHS)),
        "--depths",
        DEPTHS,
        "--samples",
        TRIALS,
        "--device",
        "cpu",
        "--output",
        OUT / name,
    )
    return read_results.read_for(ROOT / OUT / name / "niah.json", heat_map.check)


def tool(name: str, *arguments: Any, ranks: int = 1) -> None:
    """Run one of the project's tools as users do, from the top of the repository.

    Raises UserError if it fails; the tool has printed the reason.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, f"tools/{name}", *map(str, arguments)]
    print(
        "$",
        " ".join(
            ["torchrun", *launcher[2:], *command[len(launcher) + 1 :]]
            if launcher
            else ["python", *command[1:]]
        ),
        flush=True,
    )
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"tools/{name} failed; see above")


def say(line: str) -> None:
    print(f"\n== {line} ==", flush=True)


if __name__ == "__main__":
    cli.main(main)
