"""Arguments that all benchmarks share, and their values."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError


def add_common(
    parser: argparse.ArgumentParser,
    repeats: str = "10",
    note: str = "timed runs, of which the median is reported; a run that takes over 20 s is timed once",
) -> None:
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto = a GPU if available (default)",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="precision (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        default=repeats,
        help=f"{note} (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart as PNG")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write both here, as NAME.json and NAME.png"
    )


def dtype(args: argparse.Namespace, gpu: bool) -> str:
    return args.dtype or ("bf16" if gpu else "fp32")


def count(args: argparse.Namespace, name: str, default: str = "") -> int:
    return parse_count(getattr(args, name) or default, f"--{name.replace('_', '-')}")


def counts(args: argparse.Namespace, name: str, default: str = "") -> list[int]:
    return [
        parse_count(text.strip(), f"--{name.replace('_', '-')}")
        for text in (getattr(args, name) or default).split(",")
    ]


def byte_count(text: str) -> int:
    if text[-1:].upper() == "G":
        return parse_count(text[:-1], "--max-memory") * 2**30
    try:
        return parse_count(text, "--max-memory")
    except UserError:
        raise UserError(f"--max-memory {text}: expected bytes, like 60G") from None
