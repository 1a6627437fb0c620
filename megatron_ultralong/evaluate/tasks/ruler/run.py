"""RULER (arXiv 2404.06654): the command. Its three stages read and write files (settings.py), resume where
they were stopped, and can run alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.pipeline import command
from megatron_ultralong.evaluate.tasks.ruler.predict import predict
from megatron_ultralong.evaluate.tasks.ruler.prepare import prepare
from megatron_ultralong.evaluate.tasks.ruler.score import score, table
from megatron_ultralong.evaluate.tasks.ruler.settings import OFFICIAL_SAMPLES, RulerSettings
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS

HELP = "RULER: 13 synthetic tasks at lengths from 4K to 4M"
DESCRIPTION = (
    "RULER in three stages. Each writes files in --output and resumes where it was stopped: data/TASK/LENGTH.jsonl, "
    "predictions/TASK/LENGTH.jsonl, ruler.json."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_common_arguments(parser)
    parser.add_argument(
        "--tasks", default="all", metavar="T,T,...", help=f"all, or some of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of prompt and answer together, like 4K,128K,1M",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=OFFICIAL_SAMPLES,
        metavar="N",
        help="prompts for each task and length (default: %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--haystack",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text of the tasks with an essay; the authors use Paul Graham's essays (default: own filler sentences)",
    )
    parser.add_argument(
        "--squad",
        type=Path,
        metavar="FILE",
        help="SQuAD's dev-v2.0.json, for qa_1 (default: qa_1 is left out)",
    )
    parser.add_argument(
        "--hotpotqa",
        type=Path,
        metavar="FILE",
        help="hotpot_dev_distractor_v1.json, for qa_2 (default: qa_2 is left out)",
    )
    wording = parser.add_mutually_exclusive_group()
    wording.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="checkout of NVIDIA/RULER whose wording is used (default: the official wording where lm-evaluation-harness is "
        "installed, which contains it, otherwise this project's own)",
    )
    wording.add_argument("--own-words", action="store_true", help="use this project's own wording")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="existing prompts, made here or by NVIDIA/RULER (LENGTH/data/TASK/validation.jsonl); nothing is prepared",
    )
    parser.add_argument(
        "--stage", choices=("prepare", "predict", "score"), help="run only this stage (default: all three)"
    )


def run_command(args: argparse.Namespace) -> None:
    settings = RulerSettings(
        out=args.output,
        tasks=tuple(TASKS) if args.tasks == "all" else tuple(text.strip() for text in args.tasks.split(",")),
        lengths=command.parse_lengths(args.lengths),
        samples=args.samples,
        seed=args.seed,
        chat=args.chat,
        haystack=tuple(args.haystack),
        squad=args.squad,
        hotpotqa=args.hotpotqa,
        official=args.official,
        own_words=args.own_words,
        data=args.data,
    )
    stages = (
        [args.stage] if args.stage else ["predict", "score"] if args.data else ["prepare", "predict", "score"]
    )
    for task in settings.tasks:
        if task not in settings.runnable():
            print(f"{task} is left out: give --{TASKS[task].data} FILE")
    if not settings.runnable():
        raise UserError("--tasks: no task can be run")
    command.check_out(args.output)
    total = len(settings.runnable()) * len(settings.lengths) * settings.samples
    # Under torchrun only rank 0 enters the block, and does everything but the model's work.
    with options.open_backend(args) if "predict" in stages else options.no_backend() as backend:
        if "prepare" in stages:
            tokenizer = backend.tokenizer if backend is not None else options.load_tokenizer(args)
            with command.progress_bar("prepare", total) as bar:
                prepare(settings, tokenizer, bar.update)
        if backend is not None:
            with command.progress_bar("predict", total) as bar:
                predict(settings, backend, batch=options.batch_size(args), progress=bar.update)
    if "score" in stages:
        result = score(settings)
        command.write_results(result, args.output, table(result))
