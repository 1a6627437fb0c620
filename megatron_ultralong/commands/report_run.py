"""Make one HTML page of a training run, from what it recorded in its run directory.

    ultralong report-run runs/1m/pretrain
    ultralong report-run runs/1m/pretrain --results runs/1m/results --output report.html

Curves and tables of loss, learning rate, gradient norm, speed, time by part, memory, validation and
evaluations, with restarts; layout and settings; the plan beside what was measured. The page contains all that
it shows and opens in any browser. It can be made while the run trains.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory: --save of `ultralong train`; of one stage")
    add(
        "--results",
        nargs="+",
        default=[],
        metavar="PATH",
        help="results files of `ultralong evaluate`, or folders of them: scores of the run's checkpoints (RUN/iter_NNNNNNN)",
    )
    add("--output", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    from megatron_ultralong.io import atomic_files
    from megatron_ultralong.run_report import page, read

    record = read.read(args.run)
    out = args.output or args.run / "report.html"
    atomic_files.check_file_writable(out, f"--output {out}")
    notes = read.add_results(record, args.results)
    atomic_files.write_text(out, page.page(record, notes), what=f"--output {out}")
    print(out)
