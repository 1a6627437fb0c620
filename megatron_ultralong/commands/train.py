"""Train a recipe: continued pretraining or instruction tuning, under torchrun or as a single rank.

torchrun --nproc-per-node 8 -m megatron_ultralong train --recipe ultralong_1m --load-hf DIR --data PREFIX --save runs/1m

A recipe of several stages takes --data once for each stage, and has a run directory for each in --save:

torchrun --nproc-per-node 8 -m megatron_ultralong train --recipe prolong --load-hf DIR --data 64K --data 512K \\
    --data SFT --save runs/prolong
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ultralong import command_line, recipes, settings_text
from megatron_ultralong.command_settings import of_stage, override
from megatron_ultralong.errors import UserError

if TYPE_CHECKING:
    from megatron_ultralong.train.dry_run import Evaluations
    from megatron_ultralong.train.run import RunFiles
    from megatron_ultralong.train.stages import Stage


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    parser.add_argument(
        "--recipe",
        required=True,
        help="a recipe's name (--list-recipes), or FILE.py or FILE.py:NAME with a function that returns one",
    )
    parser.add_argument("--list-recipes", action=_ListRecipes, nargs=0, help="print the recipes, and exit")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the value of every setting, in the form that --set takes, and exit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check paths, data, tokenizer, weights and ranks, on every rank of torchrun, estimate memory and time, and "
        "exit: with 0 if the run can start; nothing is written",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run without torchrun: GPUs of the run (default: as many as the layout needs)",
    )
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help="with --dry-run on a machine without a GPU: h100 (default), h200, a100 or b200",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings of the recipe, for example train.seq_length=64K parallel.cp=4; of one stage: "
        "STAGE:KEY=VALUE; `--set help` describes every setting",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--load-hf", type=Path, metavar="DIR", help="start from a Hugging Face Llama directory, read in place"
    )
    start.add_argument(
        "--load",
        type=Path,
        metavar="CKPT",
        help="start from the weights of a checkpoint: a run directory or one iteration",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer to copy into the checkpoints, in place of the loaded model's",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="append",
        metavar="PREFIX",
        help="packed rows to train on: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...; once for each stage",
    )
    parser.add_argument(
        "--valid",
        nargs="+",
        action="append",
        metavar="PREFIX",
        help="packed rows for the held-out loss; once for each stage",
    )
    parser.add_argument(
        "--perplexity",
        nargs="+",
        metavar="PREFIX or FILE",
        help="packed rows or long documents (.txt, .jsonl, .parquet): perplexity by position, "
        "computed together with the held-out loss",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="run directory; a run resumes from its newest complete checkpoint",
    )
    return parser


def _is_help(setting: str) -> bool:
    """`help`, or that of a stage."""
    return setting.rpartition(":")[2] == "help"


class _ListRecipes(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(recipes.listed()))
        parser.exit()


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = command_line.parse(parser, arguments)
    describes = any(map(_is_help, args.set))
    if not (args.print_config or describes):
        missing = [f"--{name}" for name in ("data", "save") if getattr(args, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        if not args.dry_run and (args.gpus is not None or args.gpu is not None):
            parser.error("--gpus and --gpu are of --dry-run; torchrun and the machine decide otherwise")
    settings = [setting for setting in args.set if not _is_help(setting)]
    of_recipe = recipes.stages(args.recipe)
    stages = [run.name for run in of_recipe]
    runs = [override(run, of_stage(settings, run.name, args.recipe, stages)) for run in of_recipe]
    if describes or args.print_config:
        for run in runs:
            lines = settings_text.described(run) if describes else settings_text.stated(run)
            print("\n".join([*settings_text.heading(run), *lines]))
        return
    for option, given in (("--data", args.data), ("--valid", args.valid)):
        if given is not None and len(given) != len(runs):
            raise UserError(
                f"{option} is given {len(given)} times, but {args.recipe} has {len(runs)} stages "
                f"({', '.join(run.name for run in runs)}); give it once for each"
            )

    # Imported here so that --help and wrong settings are answered at once.
    from megatron_ultralong.evaluate.tasks.perplexity_in_training import during_training
    from megatron_ultralong.train.run import PrepareEvaluation, RunFiles, train_run
    from megatron_ultralong.train.stages import Stage, train_stages

    files = RunFiles(
        data=args.data[0],
        valid=args.valid[0] if args.valid else None,
        save=args.save,
        load=args.load,
        load_hf=args.load_hf,
        tokenizer=args.tokenizer,
    )

    def evaluations(save: Path) -> list[PrepareEvaluation]:
        return [during_training(args.perplexity, save)] if args.perplexity else []

    of_runs = [
        Stage(run=run, data=data, valid=valid)
        for run, data, valid in zip(runs, args.data, args.valid or [None] * len(runs), strict=True)
    ]
    if args.dry_run:
        _dry_run(of_runs, files, args, evaluations)
        return
    if len(runs) == 1:
        train_run(runs[0], files, evaluations(args.save))
        return
    is_main = int(os.environ.get("RANK", "0")) == 0
    train_stages(of_runs, files, lambda line: print(line, flush=True) if is_main else None, evaluations)


def _dry_run(
    stages: list[Stage], files: RunFiles, args: argparse.Namespace, evaluations: Evaluations
) -> None:
    """UserError where the run cannot start; the table says why."""
    from megatron_ultralong.train.dry_run import Assumed, dry_run

    lines, problems = dry_run(
        stages, files, Assumed(gpus=args.gpus, gpu=args.gpu or Assumed.gpu), evaluations
    )
    if lines:
        print("\n".join(lines), flush=True)
    if problems:
        raise UserError(f"the run cannot start: {problems} problem{'s' * (problems > 1)}, see above")
