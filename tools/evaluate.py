#!/usr/bin/env python
"""Evaluate a model. One subcommand a benchmark; results go to --out as JSON, with a plot.

    python tools/evaluate.py niah --model DIR --lengths 512,1K,4K --depths 0,25,50,75,100 --trials 8 --out results/niah
    torchrun --nproc-per-node 8 tools/evaluate.py niah --ckpt CKPT --tp 4 --cp 2 --lengths 128K,1M --out results/niah
    python tools/evaluate.py niah --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR --lengths 128K --out results/niah
    python tools/evaluate.py lveval --model DIR --data LVEval --lengths 16k,32k --official checkouts/LVEval --out results/lveval
    python tools/evaluate.py infinitebench --model DIR --data hub --tasks passkey,longbook_qa_eng --out results/infinitebench

The model is a Hugging Face directory in plain transformers, our own model over many ranks (a checkpoint, or a Hugging Face directory read in
place), or one behind an OpenAI-compatible endpoint. A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError, parse_count
from megatron_ultralong.evaluate import infinitebench, lveval, niah, options, plots, results, staged
from megatron_ultralong.runtime import errors


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    shared = argparse.ArgumentParser(add_help=False)
    options.add_model_arguments(shared)
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    shared.add_argument("--seed", type=int, default=0, help="of prompts, and of sampling (default: %(default)s)")

    task = tasks.add_parser("niah", parents=[shared], help="passkey retrieval: a grid of lengths and depths",
                            description="Passkey retrieval: one fact hidden in a long text, at every length and depth.")
    task.add_argument("--lengths", required=True, metavar="N,N,...", help="tokens of prompt and answer together, like 512,4K,1M")
    task.add_argument("--depths", default="0,25,50,75,100", metavar="P,P,... or N",
                      help="percent of the text before the needle, or one number: so many, evenly spaced (default: %(default)s)")
    task.add_argument("--trials", type=int, default=10, metavar="N", help="prompts for each length and depth (default: %(default)s)")
    task.add_argument("--digits", type=int, default=5, metavar="N", help="digits of a pass key (default: %(default)s)")
    task.add_argument("--haystack", type=Path, metavar="FILE", help="text to hide the needle in (default: own filler sentences)")
    task.add_argument("--answer-tokens", type=int, metavar="N", help="tokens to generate (default: what the answer takes; 24 in a chat)")
    task.set_defaults(function=run_niah)

    add_lveval(tasks, shared)
    add_infinitebench(tasks, shared)
    return parser.parse_args()


def run_niah(args: argparse.Namespace) -> None:
    grid = niah.Grid(lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")), depths=_depths(args.depths),
                     trials=args.trials, digits=args.digits, chat=args.chat, seed=args.seed, answer_tokens=args.answer_tokens)
    results.make_writable(args.out)

    from tqdm import tqdm

    with options.open_backend(args) as backend, tqdm(total=len(grid.lengths) * len(grid.depths) * grid.trials, desc="niah", unit="prompt",
                                                     disable=None) as bar:
        result = niah.run(backend, grid, haystack=args.haystack, batch=args.batch or (64 if args.base_url else None),
                          answers=args.out / "niah.predictions.jsonl", progress=bar.update)
    results.write_json(args.out / "niah.json", result)
    plots.heat_maps([result], [f"{result['model']['path']}, {len(result['trials'])} prompts"], args.out / "niah.png",
                    trained=[result["model"]["max_position"]])
    print(results.grid_table(result))
    print(f"{args.out / 'niah.json'} and niah.png written; {result['accuracy']:.1%} of {len(result['trials'])} prompts correct, "
          f"{result['seconds']:.0f} s")


# ---- LV-Eval and InfiniteBench --------------------------------------------------------------------------------

def add_lveval(tasks: Any, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser("lveval", parents=[shared], help="LV-Eval: questions about long mixed passages, 16k to 256k words",
                            description="LV-Eval, from its official files: 11 sets, 5 lengths, F1 that needs the answer's keywords.")
    _add_staged(task, "LV-Eval's", "SET_LENGTH.jsonl or SET.zip")
    task.add_argument("--sets", metavar="SET,SET,...", help=f"of {', '.join(lveval.SETS)} (default: those in --data)")
    task.add_argument("--lengths", metavar="N,N,...", help=f"of {', '.join(lveval.LEVELS)} (default: those in --data)")
    task.set_defaults(function=run_lveval)


def run_lveval(args: argparse.Namespace) -> None:
    choice = lveval.Choice(sets=staged.names(args.sets, lveval.SETS), levels=staged.names(args.lengths and args.lengths.lower(), lveval.LEVELS),
                           limit=args.limit, official=args.official)
    _run_staged(args, "lveval", choice, lveval)


def add_infinitebench(tasks: Any, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser("infinitebench", parents=[shared], help="InfiniteBench: 12 tasks on contexts of 100K tokens and more",
                            description="InfiniteBench, from its official files: 12 tasks, each with its own rule.")
    _add_staged(task, "InfiniteBench's", "TASK.jsonl")
    task.add_argument("--tasks", metavar="TASK,TASK,...", help=f"of {', '.join(infinitebench.TASKS)} (default: those in --data)")
    task.set_defaults(function=run_infinitebench)


def run_infinitebench(args: argparse.Namespace) -> None:
    choice = infinitebench.Choice(tasks=staged.names(args.tasks, infinitebench.TASKS), limit=args.limit, official=args.official)
    _run_staged(args, "infinitebench", choice, infinitebench)


def _add_staged(task: argparse.ArgumentParser, whose: str, names: str) -> None:
    task.add_argument("--data", metavar="DIR", help=f"{whose} files ({names}), or hub = download them; needed by the stage prepare")
    task.add_argument("--official", type=Path, metavar="DIR", help=f"a checkout of {whose} repository: prompts in its words (default: our own words)")
    task.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each (default: all)")
    task.add_argument("--max-length", metavar="N", help="tokens of prompt and answer together; of longer prompts the middle is left out "
                      "(default: the positions of the model's config)")
    task.add_argument("--stage", default="all", choices=("all", *staged.STAGES), help="write the prompts, answer them, score the answers; each from "
                      "the files in --out that the one before left (default: all; what is done already is not done again)")


def _run_staged(args: argparse.Namespace, name: str, choice: Any, benchmark: Any) -> None:
    from tqdm import tqdm

    max_length = parse_count(args.max_length, "--max-length") if args.max_length else None
    results.make_writable(args.out)
    prepares = args.stage in ("all", "prepare")
    if prepares:
        if args.data is None:
            raise UserError("--data DIR is needed, or --stage predict or score to go on from what is in --out")
        benchmark.find_files(args.data, choice)  # a wrong folder is told before a model is loaded
    # With several ranks only the first one comes into the block, and does all that is not the model's work.
    with options.open_backend(args) if args.stage in ("all", "predict") else contextlib.nullcontext() as backend:
        if prepares:
            with tqdm(desc=f"{name}: prepare", unit="prompt", disable=None) as bar:
                benchmark.prepare(args.out, args.data, choice, bar.update)
        if backend is not None:
            with tqdm(total=staged.count(args.out, name), desc=f"{name}: predict", unit="prompt", disable=None) as bar:
                staged.predict(backend, args.out, name, max_length=max_length, batch=args.batch or (64 if args.base_url else None), progress=bar.update)
    if args.stage in ("all", "score"):
        result = benchmark.results(args.out)
        results.write_json(args.out / f"{name}.json", result)
        print(benchmark.table(result))
        print(f"{args.out / f'{name}.json'} written")


def _depths(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--depths {text}: expected percents like 0,50,100, or one whole number of depths") from None
    if len(values) > 1:
        return tuple(values)
    count = values[0]
    if count != int(count) or count < 1:
        raise UserError(f"--depths {text}: one number means so many depths, evenly spaced; it must be a whole number from 1 on")
    return tuple(round(100 * i / (count - 1), 2) for i in range(int(count))) if count > 1 else (50.0,)


def main() -> None:
    args = arguments()
    args.function(args)


if __name__ == "__main__":
    errors.main(main)
