#!/usr/bin/env python
"""Prepare data: pack documents and conversations into rows for tools/train.py; before that, refine answers and remove
benchmark text.

python tools/prepare_data.py decontaminate --input *.jsonl --benchmark mmlu=hub gsm8k=data/gsm8k --output clean
python tools/prepare_data.py pretrain --input *.jsonl --tokenizer Llama-3.1-8B-Instruct --seq-length 1M --output runs/1m/text
python tools/prepare_data.py refine --input chat/*.jsonl --model gpt-4o-mini --output runs/sft/refined.jsonl
python tools/prepare_data.py sft --sources chat.yaml --tokenizer Llama-3.1-8B-Instruct --examples 100000 --output runs/1m/chat
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from megatron_ultralong.config import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "pack documents, joined by a separator, into rows of S + 1 tokens (Megatron's .bin/.idx)"
    add_pretrain(commands.add_parser("pretrain", help=text, description=text))
    text = "answers of instruction data rewritten by a model behind an OpenAI-compatible endpoint; goes on where it was stopped"
    add_refine(commands.add_parser("refine", help=text, description=text))
    text = "documents that share n-grams with benchmarks, reported, left out or cut"
    add_decontaminate(commands.add_parser("decontaminate", help=text, description=text))
    text = "conversations in rows of S + 1 tokens with loss masks and document starts; only answers are trained on"
    add_sft(commands.add_parser("sft", help=text, description=text))
    return parser.parse_args()


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=pretrain)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        metavar="PATH",
        help=".txt (one document per file), .jsonl (one per line), both also as .gz and .zst; .parquet (one per row); .idx (a "
        "Megatron corpus); directories and globs of them",
    )
    given.add_argument(
        "--sources",
        type=Path,
        metavar="FILE.yaml",
        help="several named inputs with weights, rates or shares by length of document, and a token budget",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face directory with tokenizer.json",
    )
    parser.add_argument(
        "--seq-length", required=True, metavar="S", help="tokens per sequence, like 4096 or 128K"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PREFIX",
        help="write PREFIX.bin, .idx, .json, .documents.parquet and .lengths.png, and where needed .mask, .docs and "
        ".broken.jsonl; files of an earlier run are replaced",
    )
    parser.add_argument("--text-key", metavar="NAME", help="field or column with the text (default: text)")
    parser.add_argument(
        "--id-key", metavar="NAME", help="field or column that names a document in the reports"
    )
    between = parser.add_mutually_exclusive_group()
    between.add_argument(
        "--separator",
        metavar="TEXT",
        help="text between documents, encoded alone (default: <s>; '' = none)",
    )
    between.add_argument(
        "--separator-id",
        type=int,
        nargs="+",
        metavar="ID",
        help="token ids between documents, instead of a text",
    )
    between.add_argument(
        "--separator-token", choices=("bos", "eos"), help="special token between documents, instead of a text"
    )
    parser.add_argument(
        "--fit",
        choices=("cross", "best"),
        default="cross",
        help="cross: documents continue in the next row (default); best: complete in one row where they fit, by best fit, with "
        "padding",
    )
    parser.add_argument(
        "--last-row",
        choices=("pad", "drop"),
        default="pad",
        help="the last, incomplete row: pad it, with the padding masked in the loss (default), or leave its tokens out",
    )
    parser.add_argument(
        "--document-starts",
        action="store_true",
        help="also write where documents start (PREFIX.docs.bin, .idx), which data.documents=masked requires",
    )
    parser.add_argument(
        "--broken",
        choices=("skip", "stop"),
        default="skip",
        help="documents that cannot be read: leave out, count and list in PREFIX.broken.jsonl (default), or stop",
    )
    parser.add_argument(
        "--empty",
        choices=("skip", "stop"),
        default="skip",
        help="documents without text: leave out and count (default), or stop",
    )
    parser.add_argument(
        "--duplicates",
        choices=("keep", "drop", "stop"),
        default="keep",
        help="documents with the same tokens as an earlier one: keep and count (default), leave out and count, or stop",
    )
    parser.add_argument(
        "--tokens-dir",
        type=Path,
        metavar="DIR",
        help="keep the documents' tokens in this folder, to use them again for other sequence lengths and mixes of the same inputs",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one per core); the output does not depend on it",
    )


def pretrain(args: argparse.Namespace) -> None:
    seq_length = parse_count(args.seq_length, "--seq-length")
    if args.sources and (args.text_key or args.id_key):
        raise UserError(
            "--text-key and --id-key belong to --input; a --sources file sets them for each source"
        )

    # Imported here so that --help and wrong arguments answer at once.
    from megatron_ultralong.data.pretrain import pack, packing_report, sources

    packing = pack.Packing(
        seq_length=seq_length,
        separator=pack.Separator(
            text=args.separator,
            special=args.separator_token,
            ids=None if args.separator_id is None else tuple(args.separator_id),
        ),
        fit=args.fit,
        last_row=args.last_row,
        duplicates=args.duplicates,
        document_starts=args.document_starts,
        broken=args.broken,
        empty=args.empty,
    )
    mix = (
        sources.load(args.sources)
        if args.sources
        else sources.from_inputs(args.input, args.text_key or "text", args.id_key)
    )
    manifest = pack.pack(
        mix, args.tokenizer, packing, args.output, workers=_workers(args), tokens_dir=args.tokens_dir
    )
    print(packing_report.length_table(manifest))
    print(
        f"{args.output}: {manifest['rows']} rows of {seq_length} + 1 tokens from {manifest['documents']} documents; "
        f"{manifest['tokens']} tokens, {manifest['separator_tokens']} of them in separators; {manifest['padding']} tokens of "
        f"padding, {manifest['dropped']} left out; {manifest['skipped']['empty']} empty documents skipped"
    )
    for line in packing_report.warnings(manifest, args.output):
        print(line)


def add_refine(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=refine)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="conversations: .jsonl (also .gz, .zst), .json (one list) or .parquet, as sft reads them; directories and globs of "
        'them. Of {"messages": [{"role": ..., "content": ...}, ...]} other keys than "id" and "domain" are kept too',
    )
    parser.add_argument(
        "--form",
        default="auto",
        help="auto (default: found out record by record), sharegpt, messages, alpaca, or two columns "
        "like question/answer; written as messages",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="NAME.jsonl",
        help="writes it whole or not at all, with NAME.json (report) and NAME.journal.jsonl (every answer, to go on from)",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="as the endpoint calls it")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible endpoint, like http://localhost:8000/v1 (default: OpenAI's)",
    )
    parser.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable that holds the key (default: OPENAI_API_KEY); it may be unset for local servers",
    )
    parser.add_argument(
        "--domain",
        choices=("general", "math", "code"),
        default="general",
        help='which prompt and checks lines without "domain" get (default: general)',
    )
    parser.add_argument(
        "--turns",
        choices=("last", "all"),
        default="last",
        help="rewrite each conversation's last assistant message (default), or all, later ones seeing the new ones before",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.yaml",
        help="other prompts: any of system, general, math, code; the last three with the places {conversation} and {answer}",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="(default: the endpoint's own)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="longest answer, thinking included (default: 4096)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=2,
        metavar="N",
        help="answers asked for until one passes the checks; then the original is kept (default: 2)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=16,
        metavar="N",
        help="requests on their way at a time (default: 16)",
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds for an answer (default: 300)"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="N",
        help="tries after the first where the endpoint is busy, broken or silent, after growing waits (default: 6)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="ask again for what failed in earlier runs, after all retries",
    )
    parser.add_argument(
        "--price-in", type=float, metavar="USD", help="price of a million tokens sent, to show the cost"
    )
    parser.add_argument("--price-out", type=float, metavar="USD", help="price of a million tokens answered")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N conversations")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="USD",
        help="stop asking once the journal's answers, of earlier runs too, have cost this much; those on their way still count",
    )


def refine(args: argparse.Namespace) -> None:
    from megatron_ultralong.data.refine import next_step
    from megatron_ultralong.data.refine import prompts as refine_prompts
    from megatron_ultralong.data.refine import run as refine
    from megatron_ultralong.io import endpoint_client

    names = (
        "model",
        "key_env",
        "domain",
        "turns",
        "temperature",
        "max_tokens",
        "attempts",
        "concurrency",
        "timeout",
        "retries",
        "retry_failed",
        "price_in",
        "price_out",
        "limit",
        "budget",
    )
    settings = next_step.Settings(
        base_url=args.base_url or endpoint_client.OPENAI, **{name: getattr(args, name) for name in names}
    )
    prompts = refine_prompts.load(args.prompts) if args.prompts else refine_prompts.Prompts()
    made = refine.refine(args.input, args.output, settings, prompts, form=args.form)
    kept = ", ".join(f"{count} {reason}" for reason, count in made["turns"].items() if reason != "refined")
    cost = "" if made["cost_usd"] is None else f", {made['cost_usd']:.2f} USD"
    print(
        f"{args.output}: {made['refined']} of {made['examples']} conversations refined; answers kept as they were: {kept or 'none'}; "
        f"{len(made['broken_lines'])} broken lines left out; {made['tokens_in']} tokens in, {made['tokens_out']} out{cost}"
    )
    for line in made["broken_lines"][:3]:
        print(f"broken: {line['place']}: {line['reason']}")
    if made["not_asked"]:
        print(
            f"the budget of {args.budget:g} USD is used up: {made['not_asked']} conversations are not asked for and not in {args.output}; "
            "the same command with a larger --budget goes on"
        )


def add_decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=decontaminate)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=".txt (one document a file), .jsonl (one a line, or a conversation in `messages`), both also as .gz and .zst; "
        ".parquet (one a row)",
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=WHERE",
        help="what to search for: NAME of mmlu, mmlu_pro, math, gsm8k, humaneval, ruler, lveval, infinitebench, in WHERE = its "
        "folder, a file of it, or `hub`; or text=FILE.jsonl, own strings",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets a file for each of the input, report.json, matches.jsonl, broken.jsonl; a stopped run goes on there",
    )
    parser.add_argument(
        "--action",
        choices=("report", "drop", "cut"),
        default="drop",
        help="a contaminated document is only reported, left out (default), or what was found is cut out of it; a "
        "conversation is left out either way",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="field or column that holds the text (default: text)",
    )
    parser.add_argument(
        "--form",
        help="the input is conversations, as sft reads them (.json lists, directories and globs too): auto = found out "
        "record by record, sharegpt, messages, alpaca, or two columns like question/answer; all messages are searched, and what "
        "is left is written as .jsonl with `messages`",
    )
    parser.add_argument(
        "--ngram", type=int, default=13, metavar="N", help="words in a row that make a match (default: 13)"
    )
    parser.add_argument(
        "--min-words",
        type=int,
        default=8,
        metavar="N",
        help="a shorter text of a benchmark is searched for whole from so many words on (default: 8)",
    )
    parser.add_argument(
        "--common",
        type=int,
        default=10,
        metavar="K",
        help="n-grams that more than K examples of a benchmark share are its template's, and ignored (default: 10)",
    )
    parser.add_argument(
        "--contexts",
        action="store_true",
        help="search for the long contexts (RULER, LV-Eval, InfiniteBench) too, not only questions, choices and answers",
    )
    parser.add_argument(
        "--normalise",
        default="words",
        metavar="HOW",
        help="words (default: Unicode forms, case and punctuation do not count, a Chinese or Japanese character is a word), "
        "exact (what stands between white space), or some of nfkc,lower,punctuation,cjk",
    )
    parser.add_argument(
        "--margin",
        type=int,
        default=0,
        metavar="N",
        help="--action cut: words cut before and after a match too (default: 0)",
    )
    parser.add_argument(
        "--pieces",
        choices=("join", "split"),
        default="join",
        help="--action cut: what is left stays one document (default), or each piece becomes one",
    )
    parser.add_argument(
        "--min-piece",
        type=int,
        default=0,
        metavar="N",
        help="--action cut: pieces of fewer characters go too (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that search (default: one a core); the output is the same",
    )


def decontaminate(args: argparse.Namespace) -> None:
    if args.form and args.text_key != "text":
        raise UserError("--text-key is for documents, --form for conversations: give one of them")

    # Imported here so that --help and mistakes in the arguments answer at once.
    from megatron_ultralong.data.decontaminate import normalise, scan
    from megatron_ultralong.data.decontaminate import report as contamination_report
    from megatron_ultralong.data.decontaminate import run as decontamination

    rules = decontamination.Rules(
        ngram=args.ngram, min_words=args.min_words, common=args.common, contexts=args.contexts
    )
    treatment = scan.Treatment(
        action=args.action, margin=args.margin, pieces=args.pieces, min_piece=args.min_piece
    )
    report = decontamination.run(
        args.input,
        args.benchmark,
        args.output,
        rules=rules,
        normalise=normalise.Normalise.parse(args.normalise),
        treatment=treatment,
        text_key=args.text_key,
        form=args.form,
        workers=_workers(args),
    )
    print(contamination_report.table(report))
    print(f"{args.output / 'report.json'}: the same with samples; matches.jsonl has every match")


def add_sft(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=sft)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--sources",
        type=Path,
        metavar="FILE",
        help="YAML file with `sources:`, a name each with input, domain and form; paths in it are relative to it",
    )
    given.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="FILE",
        help=".jsonl (also .gz, .zst), .json (one list) or .parquet; directories and globs of them; one source, named input",
    )
    parser.add_argument(
        "--domain",
        choices=("general", "math", "code"),
        help="with --input: what all of it is (default: as each record's own "
        "`domain` says, general where it says none)",
    )
    parser.add_argument(
        "--form",
        default="auto",
        help="with --input: auto (default: found out record by record), sharegpt, messages, alpaca, or "
        "two columns like question/answer",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face directory with tokenizer.json",
    )
    parser.add_argument(
        "--output",
        metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .mask.bin, .mask.idx, .docs.bin, .docs.idx, .json, and "
        ".broken.jsonl if records could not be used; replaces old ones",
    )
    parser.add_argument(
        "--seq-length",
        default="8K",
        metavar="S",
        help="tokens of a sequence (default: 8K); must divide by 2 x CP",
    )
    parser.add_argument(
        "--cp", type=int, default=1, metavar="N", help="context parallel ranks it is for (default: 1)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", help="longest example (default: 8K, or S + 1 where that is less)"
    )
    parser.add_argument(
        "--long",
        choices=("drop", "cut"),
        default="drop",
        help="longer ones: leave them out (default), or cut them after the last answer that fits",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="examples in all, the same from each source of a domain as far as it has them (default: all)",
    )
    parser.add_argument(
        "--mix",
        metavar="SHARES",
        help="with --examples: like general=0.5,math=0.25,code=0.25 (default: as there are)",
    )
    parser.add_argument(
        "--fit",
        choices=("best", "single"),
        default="best",
        help="whole conversations together in rows, by best fit (default), or each in a row of its own, the rest padded",
    )
    parser.add_argument(
        "--template",
        choices=("auto", "llama3.1", "tokenizer"),
        default="auto",
        help="chat template: Llama-3.1's, the tokenizer's own, or (auto, default) the former where both are the same",
    )
    parser.add_argument(
        "--date",
        default="26 Jul 2024",
        help="'Today Date' in Llama-3.1's system header (default: 26 Jul 2024, its own)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of which examples are taken and of the order of rows (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that encode (default: one a core); the output is the same",
    )
    parser.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print the first N conversations token by token, trained ones marked; write nothing",
    )


def sft(args: argparse.Namespace) -> None:
    if args.output is None and args.show is None:
        raise UserError("--output PREFIX is needed; or --show N to look at conversations first")
    if args.show is not None and args.show < 1:
        raise UserError(f"--show {args.show}: must be at least 1")
    if args.sources and (args.domain or args.form != "auto"):
        raise UserError("--domain and --form go with --input; in --sources they stand in the file")

    # Imported here so that --help answers at once.
    from megatron_ultralong.data import conversations
    from megatron_ultralong.data.sft import pack as prepare_sft
    from megatron_ultralong.data.sft import report as sft_report
    from megatron_ultralong.data.sft import select_examples

    settings = prepare_sft.Settings(
        seq_length=parse_count(args.seq_length, "--seq-length"),
        cp=args.cp,
        long=args.long,
        examples=args.examples,
        max_tokens=None if args.max_tokens is None else parse_count(args.max_tokens, "--max-tokens"),
        mix=None if args.mix is None else select_examples.parse(args.mix),
        fit=args.fit,
        template=args.template,
        date=args.date,
        seed=args.seed,
        workers=_workers(args),
    )
    sources = (
        select_examples.load(args.sources)
        if args.sources
        else [
            select_examples.Source(
                name="input", files=tuple(conversations.files(args.input)), domain=args.domain, form=args.form
            )
        ]
    )
    if args.show is not None:
        for line in sft_report.show(sources, args.tokenizer, args.template, args.date, args.show):
            print(line)
        return
    made = prepare_sft.prepare(sources, args.tokenizer, args.output, settings)
    print("\n".join([f"{args.output}:", *sft_report.report(made, Path(f"{args.output}.broken.jsonl"))]))


def _workers(args: argparse.Namespace) -> int:
    from megatron_ultralong.io import workers

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    return args.workers or workers.cores()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: incomplete files are removed
    args.run(args)


if __name__ == "__main__":
    cli.main(main)
