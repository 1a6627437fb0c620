"""`benchmark checkpoint`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "saves at once and in the background, loads, and their checksums"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", default=Path("."), help="where to save (default: here)"
    )
    parser.add_argument("--layers", metavar="N", help="layers of SmolLM2-135M's shape (default: 30)")
    parser.add_argument(
        "--seq-length",
        metavar="S",
        default="1K",
        help="tokens of the steps beside a save (default: %(default)s)",
    )
    common.add_common(parser, repeats="3")


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import checkpoint, train_step

    layers = None if args.layers is None else common.count(args, "layers")
    model, rope = train_step.shape_of(None, layers)
    return checkpoint.run, checkpoint.CheckpointSettings(
        model=model,
        rope=rope,
        tokens=common.count(args, "seq_length"),
        precision=common.dtype(args, gpu),
        folder=args.folder,
        repeats=common.count(args, "repeats"),
    )
