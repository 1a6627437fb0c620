"""Measure speed and memory of this program on one GPU or a CPU.

    ultralong benchmark attention --seq-length 256K --cp 4,8 --document-count 16 --output runs/benchmark
    ultralong benchmark placement --seq-length 1M --cp 8,32,64 --output runs/benchmark
    ultralong benchmark loss --tokens 64K --chunks 1K,4K,16K --output runs/benchmark
    ultralong benchmark step --lengths 64K,128K --settings none,full,all-but-attention,offload-all
    ultralong benchmark step --longest --settings all-but-attention,offload-all
    ultralong benchmark step --longest --optimizer --layers 2 --settings query-chunks-offload
    ultralong benchmark train --model models/SmolLM2-135M-Instruct --lengths 2K,8K --output runs/benchmark
    ultralong benchmark checkpoint --folder runs --output runs/benchmark
    ultralong benchmark generate --lengths 128K,512K --output runs/benchmark
    ultralong benchmark data --tokenizer DIR --output runs/benchmark

These are not benchmarks of models; `ultralong evaluate` runs those. Each command prints a table; --json, --plot
and --output also write it to files, with device, versions, date and command. Defaults are smaller on a CPU.
"""

from __future__ import annotations

import argparse
import sys

from megatron_ultralong import command_line
from megatron_ultralong.commands.benchmark import (
    attention,
    checkpoint,
    data,
    generate,
    loss,
    placement,
    step,
    train,
)

BENCHMARKS = {
    "attention": attention,
    "placement": placement,
    "loss": loss,
    "step": step,
    "train": train,
    "checkpoint": checkpoint,
    "generate": generate,
    "data": data,
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP)
        benchmark.add_arguments(command)
        command.set_defaults(measure=benchmark.settings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    from megatron_ultralong.io import atomic_files
    from megatron_ultralong.measure import report, timing

    device = timing.select_device(args.device)
    figures, plots = [args.json], [args.plot]
    if args.output is not None:
        name = "longest_step" if args.benchmark == "step" and args.longest else args.benchmark
        figures.append(args.output / f"{name}.json")
        plots.append(args.output / f"{name}.png")
    # Figures first: a plot that fails must lose nothing that was measured.
    outputs = [(report.write_json, path) for path in figures] + [(report.plot, path) for path in plots]
    for _, path in outputs:
        if path is not None:
            atomic_files.check_file_writable(path, str(path))
    run, settings = args.measure(args, device.type == "cuda")
    command = command_line.as_typed(arguments)
    result = run(
        settings, device, command, lambda name: print(f"measuring {name}", file=sys.stderr, flush=True)
    )
    print(report.text(result))
    for write, path in outputs:
        if path is not None:
            write(result, path)
    return 0
