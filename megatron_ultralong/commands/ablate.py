"""Run an ablation: a grid of training runs from one base model, each evaluated, with a table over seeds.

    ultralong ablate --grid examples/ablations/methods.yaml --output runs/ablations/methods
    ultralong ablate --grid examples/ablations/methods.yaml --output runs/ablations/methods --only method=yarn,ntk seed=1

Each cell runs `ultralong` train, convert export and evaluate in a process of its own, whose
commands and output are in OUT/cells/NAME/log.txt. The same command resumes a stopped grid: finished cells
are not repeated unless their settings changed. The table is in OUT/ablation.md, .csv and .json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add("--grid", type=Path, required=True, metavar="FILE.yaml", help="the grid (docs/ablations.md)")
    add("--output", type=Path, required=True, metavar="DIR", help="directory for everything that is written")
    add(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="cells at a time, each with one thread (default: %(default)s)",
    )
    add(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="AXIS=VALUE,...",
        help="only these values of an axis, or of `seed`",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="check the grid, list its cells and run nothing")
    shown.add_argument("--report", action="store_true", help="only write the table of the finished cells")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    import os

    from megatron_ultralong.ablate import grid, plan, report, run, scores
    from megatron_ultralong.errors import UserError

    if args.jobs < 1:
        raise UserError("--jobs must be at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that run the cells
    chosen = plan.Places(out=args.output, grid=grid.read(args.grid, grid.parse_only(args.only)))
    plan.check(chosen)
    if args.list:
        for line in plan.listed(chosen, run.state):
            print(line)
        return 0
    failed: list[str] = []
    if not args.report:
        failed = run.run(chosen, args.jobs, lambda line: print(line, flush=True))
    places = plan.Places(out=args.output, grid=grid.read(args.grid))
    cells = plan.cell_jobs(places)
    rows = scores.rows(cells, [job.name for _, job in cells if run.state(job) == "finished"])
    if not rows:
        raise UserError(
            f"{args.output} contains no finished cell" + (f"; failed: {failed[0]}" if failed else "")
        )
    print("\n".join(["", *report.write(rows, places.grid, args.output)]))
    print(f"{args.output / 'ablation.md'}, .csv, .json and plots written")
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}")
    return 0
