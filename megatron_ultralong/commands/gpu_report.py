"""Measure everything that this project claims on a GPU, beside what `ultralong plan` predicts.

    ultralong gpu-report --output runs/gpu_report
    ultralong gpu-report --output runs/gpu_report --minutes 60 --model models/SmolLM2-135M-Instruct
    ultralong gpu-report --output runs/tiny --scale tiny --device cpu

Checks the machine, runs tests/gpu, then measures, the most important first: attention, loss, a step under
every memory setting, the longest step, generation, and a small model extended to four times its context. Rows
are kept in --output as soon as they are measured: started again with the same --output, the report continues
with what is missing, also after it was killed. Nothing is downloaded. The results are gpu_report.md and gpu_report.json in
--output; logs of the processes are in --output/logs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line
from megatron_ultralong.errors import UserError

GROUPS = "tests,attention,loss,step,longest,generation,extension"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=9.0,
        metavar="N",
        help="time of this call; rows that are not expected to fit are listed as missing (default: %(default)g)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/gpu_report"),
        metavar="DIR",
        help="folder of the report (default: %(default)s)",
    )
    add("--only", metavar="A,B", default=GROUPS, help="only these of: %(default)s")
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory of a small Llama to extend, like SmolLM2-135M-Instruct (default, in a clone: "
        "runs/smollm2/base, which examples/smollm2.sh makes, otherwise the demo's base model)",
    )
    add(
        "--scale",
        choices=["auto", "full", "tiny"],
        default="auto",
        help="full = shapes of Llama-3.1-8B at 16K to 512K tokens; tiny = to check that the report runs; auto = full "
        "on a GPU (default)",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto = a GPU if available (default)",
    )
    add("--retry-failed", action="store_true", help="measure rows again that failed or were not measured")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)
    groups = [name.strip() for name in args.only.split(",")]
    for name in groups:
        if name not in GROUPS.split(","):
            raise UserError(f"--only {name}: choose from {GROUPS}")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g} must be above 0")
    if args.model is not None and not (args.model / "config.json").is_file():
        raise UserError(f"--model {args.model} contains no config.json; give a Hugging Face directory")

    # Imported here so that --help answers at once.
    from megatron_ultralong.gpu_report.run import ReportSettings, run
    from megatron_ultralong.measure import timing

    device = timing.select_device(args.device).type
    scale = args.scale if args.scale != "auto" else ("full" if device == "cuda" else "tiny")
    if scale == "full" and device == "cpu":
        raise UserError("--scale full needs a GPU; use --scale tiny on a CPU")
    settings = ReportSettings(
        out=args.output.resolve(),
        minutes=args.minutes,
        groups=groups,
        device=device,
        scale=scale,
        model=None if args.model is None else args.model.resolve(),
        retry=args.retry_failed,
        command=command_line.as_typed(arguments),
    )
    path = run(settings, lambda line: print(line, flush=True))
    print(f"report: {path}")
    return 0
