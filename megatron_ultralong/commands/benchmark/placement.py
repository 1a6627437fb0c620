"""`benchmark placement`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "documents of packed rows on context parallel ranks: work, keys sent, messages (counted)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-length", metavar="S", default="1M", help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--cp", metavar="N,N", default="8,32,64", help="context parallel sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--documents",
        type=Path,
        metavar="FILE",
        help="your own: the prefix of packed rows with document starts, or a text file with a length a line "
        "(default: modelled distributions)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="adds Python's source files, in tokens of this tokenizer",
    )
    common.add_common(parser)


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import placement

    return placement.run, placement.PlacementSettings(
        length=common.count(args, "seq_length"),
        cp=tuple(common.counts(args, "cp", "")),
        lengths=args.documents,
        tokenizer=args.tokenizer,
    )
