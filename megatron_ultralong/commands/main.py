"""`ultralong NAME ...`: one command for every stage. `python -m megatron_ultralong` is the same, also for
torchrun: torchrun --nproc-per-node 8 -m megatron_ultralong train ..."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

from megatron_ultralong import __version__
from megatron_ultralong.commands import completion
from megatron_ultralong.runtime import cli

COMMANDS = {
    "prepare": (
        "prepare_data.main",
        "pack documents and conversations; refine, decontaminate and check data",
    ),
    "plan": ("plan", "estimate memory and time of a run, and find layouts that fit"),
    "train": ("train", "train a recipe: continued pretraining or instruction tuning"),
    "convert": ("convert_hf", "Hugging Face directories to checkpoints and back; verify and check them"),
    "evaluate": ("evaluate", "passkeys, RULER, LV-Eval, InfiniteBench, standard benchmarks, perplexity"),
    "report-run": ("report_run", "make one HTML page of a training run"),
    "inspect-rope": ("inspect_rope", "compare the RoPE that models and checkpoints really use"),
    "search-rope": ("search_rope", "search LongRoPE's factors for a model and a length"),
    "ablate": ("ablate", "run a grid of trainings, and make a table over seeds"),
    "benchmark": ("benchmark.main", "measure speed and memory of this program"),
    "gpu-report": ("gpu_report", "measure everything on one GPU beside what `plan` predicts"),
    "check-cluster": ("check_cluster", "check nodes, links and storage before a run"),
    "check-context-parallel": ("check_context_parallel", "change one token, and list which outputs change"),
}
"""By name: module of megatron_ultralong/commands, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultralong",
        usage="%(prog)s [--version] [--completion SHELL] COMMAND ...",
        description="Extend Llama models to 1M, 2M and 4M tokens of context.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<24}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`ultralong COMMAND --help` describes one. On several GPUs: torchrun ... -m megatron_ultralong COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"megatron_ultralong {__version__}")
    parser.add_argument(
        "--completion",
        choices=completion.SHELLS,
        metavar="SHELL",
        help="print the script with which bash, zsh or fish completes this command",
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    return parser


def main() -> None:
    parser = build_parser()
    # What follows a command is parsed by it.
    args = parser.parse_args(sys.argv[1:3] if sys.argv[1:2] == ["--completion"] else sys.argv[1:2])
    if args.completion is not None:
        cli.main(lambda: print(completion.script(COMMANDS, args.completion)))
    name = args.command
    if name is None:
        parser.error("the following arguments are required: COMMAND")
    if name not in COMMANDS:
        (nearest,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        parser.error(f"there is no command {name!r}; did you mean {nearest}?")
    module, _ = COMMANDS[name]
    sys.argv = [f"ultralong {name}", *sys.argv[2:]]  # argparse takes the first word for the program's name
    cli.main(importlib.import_module(f"megatron_ultralong.commands.{module}").main)
