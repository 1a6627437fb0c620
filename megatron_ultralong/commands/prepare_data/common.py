"""What several subcommands of `prepare_data` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.errors import UserError


def print_attention(prefix: str, seq_length: int) -> None:
    """Say what attention inside the rows' documents costs."""
    from megatron_ultralong.planning import packing_report

    print("\n".join(packing_report.lines(Path(prefix), seq_length)))


def worker_count(args: argparse.Namespace) -> int:
    from megatron_ultralong.io import workers

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    return args.workers or workers.cores()
