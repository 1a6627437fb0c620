"""`benchmark generate`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "prefill and decode, as in evaluate.py --engine megatron"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", metavar="S,S", help="tokens of the prompt (default: 32K,128K on a GPU, 256,512 on a CPU)"
    )
    parser.add_argument(
        "--sequences",
        metavar="N",
        default="1",
        help="sequences that continue the prompt together (default: %(default)s)",
    )
    parser.add_argument(
        "--written", metavar="N", default="32", help="tokens decoded in each sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--read-chunk",
        metavar="N",
        help="tokens of the prompt per prefill chunk (default: 16K on a GPU, 128 on a CPU)",
    )
    common.add_common(parser, repeats="3")


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import generation

    return generation.run, generation.GenerationSettings(
        model=generation.model_shape(gpu),
        lengths=common.counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        sequences=common.count(args, "sequences"),
        written=common.count(args, "written"),
        chunk=common.count(args, "read_chunk", "16K" if gpu else "128"),
        precision=common.dtype(args, gpu),
        repeats=common.count(args, "repeats"),
    )
