"""`prepare_data decontaminate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.commands.prepare_data import common
from megatron_ultralong.errors import UserError

HELP = "find documents that share n-grams with benchmarks, and report, drop or cut them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=".txt (one document per file), .jsonl (one per line, or a conversation in `messages`), both also as .gz and .zst; "
        ".parquet (one per row)",
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=WHERE",
        help="benchmarks to search for: NAME is one of mmlu, mmlu_pro, math, gsm8k, humaneval, ruler, lveval, infinitebench, and "
        "WHERE its folder, a file of it, or `hub`; or text=FILE.jsonl, your own strings",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for one file per input file, report.json, matches.jsonl, broken.jsonl; a stopped run resumes there",
    )
    parser.add_argument(
        "--action",
        choices=("report", "drop", "cut"),
        default="drop",
        help="only report contaminated documents, drop them (default), or cut the matches out of them; conversations are "
        "dropped, not cut",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="field or column that contains the text (default: text)",
    )
    parser.add_argument(
        "--form",
        help="the input is conversations, in the forms that sft reads (also .json lists, directories and globs): auto (detected "
        "record by record), sharegpt, messages, alpaca, or two columns like question/answer; all messages are searched, and the "
        "output is .jsonl with `messages`",
    )
    parser.add_argument(
        "--ngram", type=int, default=13, metavar="N", help="consecutive words that make a match (default: 13)"
    )
    parser.add_argument(
        "--min-words",
        type=int,
        default=8,
        metavar="N",
        help="search for benchmark texts shorter than an n-gram as complete texts, if they have at least N words (default: 8)",
    )
    parser.add_argument(
        "--common",
        type=int,
        default=10,
        metavar="K",
        help="ignore n-grams that more than K examples of a benchmark share: they belong to its template (default: 10)",
    )
    parser.add_argument(
        "--contexts",
        action="store_true",
        help="also search for the long contexts (RULER, LV-Eval, InfiniteBench), not only for questions, choices and answers",
    )
    parser.add_argument(
        "--normalise",
        default="words",
        metavar="HOW",
        help="words (ignore HTML entities, invisible characters, hyphenation at the end of lines, Unicode forms, case and "
        "punctuation; each Chinese or Japanese character is a word), exact (split at white space only), or some of "
        "entities,invisible,hyphenation,nfkc,lower,punctuation,cjk (default: words)",
    )
    parser.add_argument(
        "--margin",
        type=int,
        default=0,
        metavar="N",
        help="--action cut: also cut N words before and after each match (default: 0)",
    )
    parser.add_argument(
        "--pieces",
        choices=("join", "split"),
        default="join",
        help="--action cut: the remaining pieces stay one document (default), or become one document each",
    )
    parser.add_argument(
        "--min-piece",
        type=int,
        default=0,
        metavar="N",
        help="--action cut: also cut pieces of fewer characters (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that search (default: one per core); the output does not depend on it",
    )


def run(args: argparse.Namespace) -> None:
    if args.form and args.text_key != "text":
        raise UserError("--text-key is for documents, --form for conversations: give one of them")

    # Imported here so that --help and mistakes in the arguments answer at once.
    from megatron_ultralong.data.decontaminate import run as decontamination
    from megatron_ultralong.data.decontaminate.benchmark_index import NgramRules
    from megatron_ultralong.data.decontaminate.normalise import Normalisation
    from megatron_ultralong.data.decontaminate.report import format_table
    from megatron_ultralong.data.decontaminate.scan import ContaminationPolicy

    settings = decontamination.DecontaminationSettings(
        rules=NgramRules(
            ngram=args.ngram, min_words=args.min_words, common=args.common, contexts=args.contexts
        ),
        normalisation=Normalisation.parse(args.normalise),
        policy=ContaminationPolicy(
            action=args.action, margin=args.margin, pieces=args.pieces, min_piece=args.min_piece
        ),
        text_key=args.text_key,
        form=args.form,
    )
    report = decontamination.decontaminate(
        args.input, args.benchmark, args.output, settings, workers=common.worker_count(args)
    )
    print(format_table(report))
    print(f"{args.output / 'report.json'}: the same with samples; matches.jsonl lists every match")
