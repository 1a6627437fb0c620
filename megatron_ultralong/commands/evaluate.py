"""Evaluate a model. One subcommand per benchmark; results go to --output as JSON, with a plot.

    ultralong evaluate niah --model DIR --lengths 512,1K,4K --depths 0,50,100 --output results/niah
    torchrun --nproc-per-node 8 -m megatron_ultralong evaluate niah --load CKPT --tp 4 --lengths 1M --output results/niah
    ultralong evaluate niah --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR \\
        --lengths 128K --output results/niah
    ultralong evaluate ruler --model DIR --lengths 4K,8K,16K --samples 50 --output results/ruler
    ultralong evaluate lveval --model DIR --data hub --official LVEval --output results/lveval
    ultralong evaluate infinitebench --model DIR --data hub --tasks passkey --output results/infinitebench
    ultralong evaluate standard --model DIR --tasks paper --run-code --output results/standard
    torchrun --nproc-per-node 8 -m megatron_ultralong evaluate perplexity --load CKPT --data books.jsonl --lengths 4K,1M \\
        --output results/perplexity
    ultralong evaluate published --model DIR --output results
    ultralong evaluate report --results results --output results/report
    ultralong evaluate compare --results a/niah.json b/niah.json --output both.png

The model is a Hugging Face directory in plain transformers, this project's model over many ranks (a
checkpoint, or a Hugging Face directory that is read in place), or one behind an OpenAI-compatible endpoint. A
run that was stopped resumes when the same command is given again.
"""

from __future__ import annotations

import argparse

from megatron_ultralong import command_line
from megatron_ultralong.evaluate.report import commands as report
from megatron_ultralong.evaluate.tasks import infinitebench, lveval, perplexity
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.standard import run as standard

BENCHMARKS = {  # how to add one: docs/how-to-add-a-benchmark.md
    "niah": niah,
    "ruler": ruler,
    "lveval": lveval,
    "infinitebench": infinitebench,
    "standard": standard,
    "perplexity": perplexity,
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    commands = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP, description=benchmark.DESCRIPTION)
        benchmark.add_arguments(command)
        command.set_defaults(function=benchmark.run_command)

    command = commands.add_parser(
        "report",
        help="tables of several models' results next to the published figures",
        description="Collects results (niah, ruler, lveval, infinitebench, standard, perplexity) into the paper's tables.",
    )
    report.add_report_arguments(command)
    command.set_defaults(function=report.run_report)

    command = commands.add_parser(
        "published",
        help="a model's results beside its published figures, and what differs",
        description="The benchmarks of arXiv 2504.06214: measured, published, and what differs between the two.",
    )
    report.add_published_arguments(command)
    command.set_defaults(function=report.run_published)

    command = commands.add_parser(
        "compare",
        help="several niah.json as heat maps side by side",
        description="Passkey grids side by side in one plot.",
    )
    report.add_compare_arguments(command)
    command.set_defaults(function=report.run_compare)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = command_line.parse(build_parser(), arguments)
    args.function(args)
