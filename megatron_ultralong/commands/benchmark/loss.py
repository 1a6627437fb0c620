"""`benchmark loss`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "output layer and cross entropy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", metavar="N", help="tokens (default: 16K on a GPU, 1K on a CPU)")
    parser.add_argument("--hidden", metavar="N", help="hidden size (default: 4096 on a GPU, 64 on a CPU)")
    parser.add_argument(
        "--vocab", metavar="N", help="vocabulary size (default: 128256 on a GPU, 2000 on a CPU)"
    )
    parser.add_argument(
        "--chunks", metavar="N,N", help="tokens per chunk (default: 1K,4K,8K on a GPU, 64,256 on a CPU)"
    )
    parser.add_argument(
        "--error-tokens",
        metavar="N",
        help="tokens of the comparison with float64 (default: 512 on a GPU, 128 on a CPU)",
    )
    common.add_common(parser)


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import loss, timing

    return loss.run, loss.LossSettings(
        tokens=common.count(args, "tokens", "16K" if gpu else "1K"),
        hidden=common.count(args, "hidden", "4096" if gpu else "64"),
        vocab=common.count(args, "vocab", "128256" if gpu else "2000"),
        chunks=common.counts(args, "chunks", "1K,4K,8K" if gpu else "64,256"),
        dtype=timing.DTYPES[common.dtype(args, gpu)],
        error_tokens=common.count(args, "error_tokens", "512" if gpu else "128"),
        repeats=common.count(args, "repeats"),
    )
