"""Check the nodes of a cluster before a run: versions, clocks, memory, shared storage, links, a small step.

torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m megatron_ultralong check-cluster \\
    --recipe ultralong_1m --shared runs/ultralong_1m
torchrun --nproc-per-node 2 -m megatron_ultralong check-cluster --cp 2

Measures the parallel groups of a recipe's layout, or of --tp, --cp and --pp. Takes under a minute. The last line
is the verdict; exit code 1 where something is wrong, and the line says what to change.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from megatron_ultralong import command_line, recipes
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Parallel, Runtime


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--recipe", metavar="NAME", help="recipe whose layout and device are checked")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings of the recipe",
    )
    for name, text in (("tp", "tensor"), ("cp", "context"), ("pp", "pipeline")):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} parallel ranks (default: the recipe's, or 1)"
        )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: the recipe's, or auto")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that all nodes must share, like that of --save (default: this one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)
    run = override(recipes.get(args.recipe or "tiny"), args.set)
    changed = {name: getattr(args, name) for name in ("tp", "cp", "pp") if getattr(args, name) is not None}
    parallel = dataclasses.replace(run.parallel if args.recipe else Parallel(), **changed)
    runtime = run.runtime if args.recipe else Runtime()
    if args.device is not None:
        runtime = dataclasses.replace(runtime, device=args.device)

    # Imported here so that --help and wrong settings are answered at once.
    from megatron_ultralong.check_cluster import run as checks
    from megatron_ultralong.runtime import launch

    ranks = launch.start(runtime, parallel)
    findings = checks.check_all(ranks, args.shared)
    if ranks.is_main:
        print(checks.text(findings, ranks), flush=True)
        if args.json is not None:
            checks.write(findings, ranks, args.json)
    launch.stop()
    return int(any(one.problems for one in findings))
