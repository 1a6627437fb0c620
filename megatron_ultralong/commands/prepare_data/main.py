"""Prepare data: pack documents and conversations into rows for tools/train.py; before that, refine answers
and remove benchmark text.

python tools/prepare_data.py decontaminate --input *.jsonl --benchmark mmlu=hub gsm8k=data/gsm8k --output DIR
python tools/prepare_data.py pretrain --input *.jsonl --tokenizer DIR --seq-length 1M --output runs/1m/text
python tools/prepare_data.py refine --input chat/*.jsonl --model gpt-4o-mini --output runs/sft/refined.jsonl
python tools/prepare_data.py sft --sources chat.yaml --tokenizer DIR --examples 100000 --output runs/1m/chat
python tools/prepare_data.py check runs/1m/text runs/1m/chat
"""

from __future__ import annotations

import argparse
import signal

from megatron_ultralong.commands.prepare_data import check, decontaminate, pretrain, refine, sft

COMMANDS = {
    "pretrain": pretrain,
    "refine": refine,
    "decontaminate": decontaminate,
    "check": check,
    "sft": sft,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: incomplete files are removed
    args.run(args)
