"""`benchmark data`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "documents to tokens on disk, compared with Megatron-Core's builder and datatrove"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="directory with tokenizer.json"
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".jsonl files with `text` (default: a sample made of Python's own source files)",
    )
    parser.add_argument(
        "--megabytes", metavar="N", default="100", help="size of the sample (default: %(default)s)"
    )
    parser.add_argument(
        "--methods", metavar="A,B", help="only these of: ours, megatron, datatrove (default: all)"
    )
    parser.add_argument("--workers", metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--made",
        type=Path,
        metavar="DIR",
        default=Path("runs/benchmark/data"),
        help="folder that keeps the sample (default: %(default)s)",
    )
    common.add_common(parser, repeats="3")


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.io.workers import cores
    from megatron_ultralong.measure import data_preparation

    workers = common.count(args, "workers", str(cores()))
    inputs = args.input or data_preparation.write_sample_input(
        args.made, 4 * workers, common.count(args, "megabytes")
    )
    return data_preparation.run, data_preparation.DataSettings(
        inputs=tuple(inputs),
        tokenizer=args.tokenizer,
        workers=workers,
        repeats=common.count(args, "repeats"),
        methods=tuple(args.methods.split(",")) if args.methods else (),
    )
