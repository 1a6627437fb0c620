"""Peak memory of a step, measured and planned, for the complete product of memory modes and attention kernels
at any lengths, as Markdown.

    python -m tests.null_gpu.memory_table --lengths 128K,1M --output memory.md

Bytes of PyTorch's allocator on the null GPU (machine.py). Every row is appended to memory.jsonl as soon as it
is measured, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.config import Memory, Parallel, Runtime
from megatron_ultralong.measure.number_format import token_count
from megatron_ultralong.runtime import launch
from tests.null_gpu import machine, step_memory
from tests.null_gpu.step_memory import GIB, KERNELS, MODES, K

MEMORY = 2**42
"""Bytes of the null GPU: steps that no GPU could hold are measured as well."""
SECONDS = 3600.0
"""After which a process is ended, and another goes on: each must measure at least one row."""
Case = tuple[int, str, str]
"""(tokens, memory mode, kernel)."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", default="128K,1M", help="tokens of a rank, like 128K,1M")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="KERNEL")
    parser.add_argument(
        "--output", type=Path, required=True, help="the table; rows go to the same name .jsonl"
    )
    parser.add_argument("--on-null-gpu", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    lengths = [parse_count(text, "--lengths") for text in given.lengths.split(",")]
    cases = list(itertools.product(lengths, given.modes, given.kernels))
    rows = given.output.with_suffix(".jsonl")
    if given.on_null_gpu:
        ranks = launch.start(Runtime(device="cuda"), Parallel())
        measure(ranks, cases, rows)
        launch.stop()
        return 0
    if reason := machine.why_not():
        print(reason, file=sys.stderr)
        return 2
    while missing := len(cases) - len(measured(cases, rows)):
        # One process for as many rows as its time and memory allow.
        command = ["-m", "tests.null_gpu.memory_table", *(sys.argv[1:] if words is None else words)]
        try:
            output = machine.run([*command, "--on-null-gpu"], SECONDS, NULL_GPU_MEMORY=str(MEMORY)).stdout
        except subprocess.TimeoutExpired as error:
            output = str(error)
        now_missing = len(cases) - len(measured(cases, rows))
        print(f"{len(cases) - now_missing} of {len(cases)} rows", flush=True)
        given.output.write_text(markdown(cases, measured(cases, rows)))
        if now_missing == missing:
            print(f"{output}\nno row was measured in the last process", file=sys.stderr)
            return 1
    found = measured(cases, rows)
    given.output.write_text(markdown(cases, found))
    print(given.output.read_text())
    ratios = {case: size / planned(case) for case, size in found.items()}
    outside = {case: r for case, r in ratios.items() if not step_memory.least_ratio(case[2]) <= r <= 1.1}
    for case, r in outside.items():
        print(f"not within 10%: {case}: {r:.3f}", file=sys.stderr)
    return 1 if outside else 0


def measure(ranks: Any, cases: Iterable[Case], rows: Path) -> None:
    """Append what `rows` does not have yet."""
    have = measured(cases, rows)
    for case in cases:
        if case not in have:
            tokens, mode, kernel = case
            size = step_memory.measured(ranks, _memory(mode), KERNELS[kernel], Parallel(), tokens)
            row = {"tokens": tokens, "mode": mode, "kernel": kernel, "measured": size}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measured(cases: Iterable[Case], rows: Path) -> dict[Case, int]:
    """Return the bytes of these cases that have been measured."""
    if not rows.exists():
        return {}
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    found = {(row["tokens"], row["mode"], row["kernel"]): row["measured"] for row in known}
    return {case: found[case] for case in cases if case in found}


def planned(case: Case) -> int:
    tokens, mode, kernel = case
    return step_memory.planned(_memory(mode), KERNELS[kernel], Parallel(), tokens)


def _memory(mode: str) -> Memory:
    return replace(MODES[mode], layer_chunk=16 * K, loss_chunk=8 * K)


def markdown(cases: Sequence[Case], found: dict[Case, int]) -> str:
    """Return a table for each length: GiB measured and, in brackets, measured / planned; - = not measured."""
    lengths, modes, kernels = (list(dict.fromkeys(part)) for part in zip(*cases))
    lines: list[str] = []
    for tokens in lengths:
        lines += [
            f"| {token_count(tokens)} tokens | {' | '.join(kernels)} |",
            "|---" * (len(kernels) + 1) + "|",
        ]
        for mode in modes:
            row = [(tokens, mode, kernel) for kernel in kernels]
            cells = [
                f"{found[case] / GIB:.1f} ({found[case] / planned(case):.2f})" if case in found else "-"
                for case in row
            ]
            lines.append(f"| {mode} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
