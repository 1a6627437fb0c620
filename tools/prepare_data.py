#!/usr/bin/env python
"""Prepare: raw documents to packed rows that tools/train.py reads, searched for benchmarks before.

    python tools/prepare_data.py decontaminate --input *.jsonl --benchmark mmlu=hub gsm8k=data/gsm8k --output clean
    python tools/prepare_data.py pretrain --input *.jsonl --tokenizer Llama-3.1-8B-Instruct --seq-length 1M --output runs/1m/text
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from megatron_ultralong.config import UserError, parse_count
from megatron_ultralong.runtime import errors


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "documents joined by a separator, in rows of S + 1 tokens (Megatron's .bin/.idx)"
    add_pretrain(commands.add_parser("pretrain", help=text, description=text))
    text = "documents that share n-grams with benchmarks, reported, left out or cut"
    add_decontaminate(commands.add_parser("decontaminate", help=text, description=text))
    return parser.parse_args()


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=pretrain)
    parser.add_argument("--input", type=Path, nargs="+", action="extend", required=True, metavar="FILE",
                        help=".txt (one document a file), .jsonl (one a line), both also as .gz and .zst; .parquet (one a row)")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face directory with tokenizer.json")
    parser.add_argument("--seq-length", required=True, metavar="S", help="tokens of a sequence, like 4096 or 128K")
    parser.add_argument("--output", required=True, metavar="PREFIX",
                        help="writes PREFIX.bin, .idx, .json, and .mask.bin, .mask.idx if a row was padded; replaces old ones")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="field or column that holds the text (default: text)")
    between = parser.add_mutually_exclusive_group()
    between.add_argument("--separator", metavar="TEXT", help="text between documents, encoded alone (default: <s>; '' = nothing)")
    between.add_argument("--separator-id", type=int, nargs="+", metavar="ID", help="token ids between documents instead")
    between.add_argument("--separator-token", choices=("bos", "eos"), help="that special token between documents instead")
    parser.add_argument("--last-row", choices=("pad", "drop"), default="pad",
                        help="the last row, not full: pad it and mask the padding's loss (default), or leave its tokens out")
    parser.add_argument("--document-starts", action="store_true",
                        help="also write PREFIX.docs.bin, .idx: where documents start, for training with data.documents=masked")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="processes that encode (default 0: this one, with the tokenizer's threads); the output is the same")


def pretrain(args: argparse.Namespace) -> None:
    seq_length = parse_count(args.seq_length, "--seq-length")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")

    # Imported here so that --help and mistakes in the arguments answer at once.
    from megatron_ultralong.data import packing

    separator = packing.Separator(text=args.separator, special=args.separator_token,
                                  ids=None if args.separator_id is None else tuple(args.separator_id))
    made = packing.pack(args.input, args.tokenizer, seq_length, args.output, text_key=args.text_key, separator=separator,
                        last_row=args.last_row, document_starts=args.document_starts, workers=args.workers)
    print(f"{args.output}: {made['rows']} rows of {seq_length} + 1 tokens from {made['documents']} documents; "
          f"{made['tokens']} tokens, {made['separator_tokens']} of them separators; {made['padding']} padding, "
          f"{made['dropped']} left out; {made['skipped']['empty']} empty documents skipped")


def add_decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=decontaminate)
    parser.add_argument("--input", type=Path, nargs="+", action="extend", required=True, metavar="FILE",
                        help=".txt (one document a file), .jsonl (one a line, or a conversation in `messages`), both also as .gz and .zst; "
                             ".parquet (one a row)")
    parser.add_argument("--benchmark", nargs="+", action="extend", required=True, metavar="NAME=WHERE",
                        help="what to search for: NAME of mmlu, mmlu_pro, math, gsm8k, humaneval, ruler, lveval, infinitebench, in WHERE = its "
                             "folder, a file of it, or `hub`; or text=FILE.jsonl, own strings")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="gets a file for each of the input, report.json, matches.jsonl, broken.jsonl; a stopped run goes on there")
    parser.add_argument("--action", choices=("report", "drop", "cut"), default="drop",
                        help="a contaminated document is only reported, left out (default), or what was found is cut out of it; a "
                             "conversation is left out either way")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="field or column that holds the text (default: text)")
    parser.add_argument("--ngram", type=int, default=13, metavar="N", help="words in a row that make a match (default: 13)")
    parser.add_argument("--min-words", type=int, default=8, metavar="N",
                        help="a shorter text of a benchmark is searched for whole from so many words on (default: 8)")
    parser.add_argument("--common", type=int, default=10, metavar="K",
                        help="n-grams that more than K examples of a benchmark share are its template's, and ignored (default: 10)")
    parser.add_argument("--contexts", action="store_true",
                        help="search for the long contexts (RULER, LV-Eval, InfiniteBench) too, not only questions, choices and answers")
    parser.add_argument("--normalise", default="words", metavar="HOW",
                        help="words (default: Unicode forms, case and punctuation do not count, a Chinese or Japanese character is a word), "
                             "exact (what stands between white space), or some of nfkc,lower,punctuation,cjk")
    parser.add_argument("--margin", type=int, default=0, metavar="N", help="--action cut: words cut before and after a match too (default: 0)")
    parser.add_argument("--pieces", choices=("join", "split"), default="join",
                        help="--action cut: what is left stays one document (default), or each piece becomes one")
    parser.add_argument("--min-piece", type=int, default=0, metavar="N", help="--action cut: pieces of fewer characters go too (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that search (default: one a core); the output is the same")


def decontaminate(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")

    # Imported here so that --help and mistakes in the arguments answer at once.
    from megatron_ultralong.data import contamination, contamination_report, words
    from megatron_ultralong.data import decontaminate as decontamination

    rules = decontamination.Rules(ngram=args.ngram, min_words=args.min_words, common=args.common, contexts=args.contexts)
    treatment = contamination.Treatment(action=args.action, margin=args.margin, pieces=args.pieces, min_piece=args.min_piece)
    report = decontamination.run(args.input, args.benchmark, args.output, rules=rules, normalise=words.Normalise.parse(args.normalise),
                                 treatment=treatment, text_key=args.text_key,
                                 workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers)
    print(contamination_report.table(report))
    print(f"{args.output / 'report.json'}: the same with samples; matches.jsonl has every match")


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was half-written is removed
    args.run(args)


if __name__ == "__main__":
    errors.main(main)
