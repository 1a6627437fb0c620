#!/usr/bin/env python
"""Train a recipe: continued pretraining or instruction tuning, under torchrun or as a single rank.

torchrun --nproc-per-node 8 tools/train.py --recipe ultralong_1m --load-hf DIR --data PREFIX --save runs/1m
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import recipes
from megatron_ultralong.config import override
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        required=True,
        help="recipe in megatron_ultralong/recipes.py: " + ", ".join(recipes.names()),
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings of the recipe, for example train.seq_length=64K parallel.cp=4",
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
        required=True,
        metavar="PREFIX",
        help="packed rows to train on: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...",
    )
    parser.add_argument("--valid", nargs="+", metavar="PREFIX", help="packed rows for the held-out loss")
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
        required=True,
        metavar="DIR",
        help="run directory; a run resumes from its newest complete checkpoint",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    run = override(recipes.get(args.recipe), args.set)

    # Imported here so that --help and wrong settings are answered at once.
    from megatron_ultralong.evaluate.tasks.perplexity_in_training import during_training
    from megatron_ultralong.train.run import RunFiles, train_run

    files = RunFiles(
        data=args.data,
        valid=args.valid,
        save=args.save,
        load=args.load,
        load_hf=args.load_hf,
        tokenizer=args.tokenizer,
    )
    train_run(run, files, [during_training(args.perplexity, args.save)] if args.perplexity else [])


if __name__ == "__main__":
    cli.main(main)
