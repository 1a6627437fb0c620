"""Prepare data: pack documents and conversations into rows for `ultralong train`; before that, refine answers
and remove benchmark text.

ultralong prepare decontaminate --input *.jsonl --benchmark mmlu=hub gsm8k=data/gsm8k --output DIR
ultralong prepare pretrain --input *.jsonl --tokenizer DIR --seq-length 1M --output runs/1m/text
ultralong prepare refine --input chat/*.jsonl --model gpt-4o-mini --output runs/sft/refined.jsonl
ultralong prepare sft --sources chat.yaml --tokenizer DIR --examples 100000 --output runs/1m/chat
ultralong prepare check runs/1m/text runs/1m/chat
"""

from __future__ import annotations

import argparse
import signal

from megatron_ultralong import command_line
from megatron_ultralong.commands.prepare_data import check, decontaminate, pretrain, refine, sft

COMMANDS = {
    "pretrain": pretrain,
    "refine": refine,
    "decontaminate": decontaminate,
    "check": check,
    "sft": sft,
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = command_line.parse(build_parser(), arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: incomplete files are removed
    args.run(args)
