"""`benchmark attention`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "one layer's context parallel attention: all ranks' work on one device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-length",
        metavar="S",
        help="tokens of the sequence, like 256K (default: 128K on a GPU, 1K on a CPU)",
    )
    parser.add_argument(
        "--cp", metavar="N,N", default="2,4,8", help="context parallel sizes, at least 2 (default: 2,4,8)"
    )
    parser.add_argument(
        "--ulysses",
        metavar="N,N",
        default="2",
        help="ranks that exchange heads, in the rows that combine all-to-all and ring (default: 2)",
    )
    parser.add_argument("--heads", metavar="N", help="query heads (default: 32 on a GPU, 8 on a CPU)")
    parser.add_argument("--kv-heads", metavar="N", help="KV heads (default: 8 on a GPU, 2 on a CPU)")
    parser.add_argument("--head-dim", metavar="N", help="head dimension (default: 128 on a GPU, 32 on a CPU)")
    parser.add_argument("--document-count", metavar="N", help="add rows with N documents of random lengths")
    parser.add_argument(
        "--error-tokens",
        metavar="S",
        help="tokens of the comparison with float64 (default: 4K on a GPU, 512 on a CPU)",
    )
    parser.add_argument(
        "--kernel",
        choices=["auto", "cudnn", "flash", "flash3", "flash4"],
        default="auto",
        help="as runtime.attention_backend (default: auto)",
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="only these of: ring, all-to-all, hybrid, all_gather, te-style, naive, torch, ring-flash-attn, "
        "yunchang (default: all)",
    )
    common.add_common(parser)


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import attention, attention_methods, timing

    return attention.run, attention.AttentionSettings(
        length=common.count(args, "seq_length", "128K" if gpu else "1K"),
        cp=common.counts(args, "cp"),
        ulysses=common.counts(args, "ulysses"),
        heads=common.count(args, "heads", "32" if gpu else "8"),
        kv_heads=common.count(args, "kv_heads", "8" if gpu else "2"),
        head_dim=common.count(args, "head_dim", "128" if gpu else "32"),
        dtype=timing.DTYPES[common.dtype(args, gpu)],
        documents=None if args.document_count is None else common.count(args, "document_count"),
        error_length=common.count(args, "error_tokens", "4K" if gpu else "512"),
        kernel=args.kernel,
        methods=args.methods.split(",") if args.methods else attention_methods.METHODS,
        repeats=common.count(args, "repeats"),
    )
