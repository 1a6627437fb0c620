#!/usr/bin/env python
"""Prepare data: pack documents and conversations into rows for tools/train.py; before that, refine answers
and remove benchmark text.

python tools/prepare_data.py decontaminate --input *.jsonl --benchmark mmlu=hub gsm8k=data/gsm8k --output DIR
python tools/prepare_data.py pretrain --input *.jsonl --tokenizer DIR --seq-length 1M --output runs/1m/text
python tools/prepare_data.py refine --input chat/*.jsonl --model gpt-4o-mini --output runs/sft/refined.jsonl
python tools/prepare_data.py sft --sources chat.yaml --tokenizer DIR --examples 100000 --output runs/1m/chat
python tools/prepare_data.py check runs/1m/text runs/1m/chat
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
from pathlib import Path

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "pack documents, joined by a separator, into rows of S + 1 tokens (Megatron's .bin/.idx)"
    add_pretrain(commands.add_parser("pretrain", help=text, description=text))
    text = "rewrite the answers of instruction data by a model behind an OpenAI-compatible endpoint; a stopped run resumes"
    add_refine(commands.add_parser("refine", help=text, description=text))
    text = "find documents that share n-grams with benchmarks, and report, drop or cut them"
    add_decontaminate(commands.add_parser("decontaminate", help=text, description=text))
    text = "read all files of packed rows and compare them with their manifest's checksums"
    add_check(commands.add_parser("check", help=text, description=text))
    text = "pack conversations into rows of S + 1 tokens with loss masks and document starts; only answers are trained on"
    add_sft(commands.add_parser("sft", help=text, description=text))
    return parser.parse_args()


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=check)
    parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="prefix of packed rows, like runs/1m/text"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the rows must have been made with this tokenizer too"
    )


def check(args: argparse.Namespace) -> None:
    from megatron_ultralong.data import packed_rows
    from megatron_ultralong.data.tokenizer import check_same

    for prefix in args.prefixes:
        manifest = packed_rows.read_manifest(prefix)
        rows = packed_rows.PackedDataset(prefix, manifest["seq_length"])
        verified = rows.check_files()
        largest = max(int(rows[row][0].max()) for row in range(len(rows)))
        if largest != manifest["max_token_id"]:
            raise UserError(
                f"{prefix} contains token id {largest}, but its manifest says {manifest['max_token_id']} is the largest; "
                "prepare the data again"
            )
        for row in range(len(rows)) if manifest.get("document_starts") else ():
            rows.document_starts(row)
        note = None if args.tokenizer is None else check_same(args.tokenizer, prefix, manifest)
        if note is not None:
            print(note)
        told = (
            "all files match their checksums" if verified else "no checksums; file sizes and values are valid"
        )
        print(f"{prefix}: {len(rows):,} rows of {manifest['seq_length']:,} + 1 tokens; {told}")


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
    parser.add_argument(
        "--special-tokens",
        choices=("text", "control"),
        help="special tokens that documents spell out, like <|eot_id|>: encode them as text (default), or as control tokens",
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
        help="keep the documents' tokens in this folder, for other sequence lengths and mixes of the same inputs",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one per core); the output does not depend on it",
    )


def pretrain(args: argparse.Namespace) -> None:
    seq_length = parse_count(args.seq_length, "--seq-length")
    if args.sources and (args.text_key or args.id_key or args.special_tokens):
        raise UserError(
            "--text-key, --id-key and --special-tokens belong to --input; a --sources file sets them for each source"
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
        else sources.from_inputs(
            args.input, args.text_key or "text", args.id_key, args.special_tokens or "text"
        )
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
    if args.document_starts:
        _print_attention(args.output, seq_length)


def add_refine(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=refine)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="conversations: .jsonl (also .gz, .zst), .json (one list) or .parquet, in the forms that sft reads; directories and "
        'globs of them. Records with "messages" keep their other keys',
    )
    parser.add_argument(
        "--form",
        default="auto",
        help="form of the records: auto (detected record by record), sharegpt, messages, alpaca, or two columns like "
        "question/answer; the output has the form messages (default: auto)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="NAME.jsonl",
        help="output file; also writes NAME.json (report) and NAME.journal.jsonl (log of all answers, to resume from)",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model at the endpoint")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible endpoint, like http://localhost:8000/v1 (default: OpenAI's)",
    )
    parser.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable that contains the key (default: OPENAI_API_KEY); may be unset for local servers",
    )
    parser.add_argument(
        "--domain",
        choices=("general", "math", "code"),
        default="general",
        help='prompt and checks of records without "domain" (default: general)',
    )
    parser.add_argument(
        "--turns",
        choices=("last", "all"),
        default="last",
        help="rewrite the last assistant message of each conversation (default), or all of them in order, each after the "
        "rewritten ones before it",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.yaml",
        help="custom prompts: any of system, general, math, code; the last three with the placeholders {conversation} and "
        "{answer}",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature (default: the endpoint's)"
    )
    parser.add_argument(
        "--max-tokens",
        default="4K",
        metavar="N",
        help="tokens of the longest answer, reasoning included (default: 4K)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=2,
        metavar="N",
        help="answers requested until one passes the checks; after that the original is kept (default: 2)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests in flight at a time (default: 16)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds for an answer (default: 300)"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="N",
        help="further tries, after increasing waits, if the endpoint is busy, broken or silent (default: 6)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="repeat the requests that failed in earlier runs, after all retries",
    )
    parser.add_argument(
        "--price-in", type=float, metavar="USD", help="price of a million prompt tokens, to show the cost"
    )
    parser.add_argument("--price-out", type=float, metavar="USD", help="price of a million completion tokens")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N conversations")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="USD",
        help="stop once the answers in the log, including earlier runs, have cost this much; requests in flight still count",
    )


def refine(args: argparse.Namespace) -> None:
    from megatron_ultralong.data.refine import run as refinement
    from megatron_ultralong.data.refine.prompts import RewritePrompts, load_prompts
    from megatron_ultralong.data.refine.settings import RefineSettings
    from megatron_ultralong.io import endpoint_client

    flags = {field.name for field in dataclasses.fields(RefineSettings)} - {"base_url", "backoff"}
    given = {name: getattr(args, name) for name in flags}
    given["max_tokens"] = parse_count(args.max_tokens, "--max-tokens")
    settings = RefineSettings(base_url=args.base_url or endpoint_client.OPENAI, **given)
    prompts = load_prompts(args.prompts) if args.prompts else RewritePrompts()
    report = refinement.refine(args.input, args.output, settings, prompts, form=args.form)
    kept = ", ".join(f"{count} {reason}" for reason, count in report["turns"].items() if reason != "refined")
    cost = "" if report["cost_usd"] is None else f", {report['cost_usd']:.2f} USD"
    print(
        f"{args.output}: {report['refined']} of {report['examples']} conversations refined; original answers kept: "
        f"{kept or 'none'}; {len(report['broken_lines'])} broken lines left out; {report['tokens_in']} prompt and "
        f"{report['tokens_out']} completion tokens{cost}"
    )
    for line in report["broken_lines"][:3]:
        print(f"broken: {line['place']}: {line['reason']}")
    if report["not_asked"]:
        print(
            f"the budget of {args.budget:g} USD is spent: {report['not_asked']} conversations were not requested and are not in "
            f"{args.output}; run the same command with a larger --budget to resume"
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


def decontaminate(args: argparse.Namespace) -> None:
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
        args.input, args.benchmark, args.output, settings, workers=_workers(args)
    )
    print(format_table(report))
    print(f"{args.output / 'report.json'}: the same with samples; matches.jsonl lists every match")


def add_sft(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=sft)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--sources",
        type=Path,
        metavar="FILE",
        help="YAML file with `sources:`, one name each with input, domain and form; paths are relative to its folder",
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
        help="with --input: domain of all records (default: each record's own `domain`, general if it has none)",
    )
    parser.add_argument(
        "--form",
        default="auto",
        help="with --input: form of the records: auto (detected record by record), sharegpt, messages, alpaca, or two columns "
        "like question/answer (default: auto)",
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
        help="writes PREFIX.bin, .idx, .mask.bin, .mask.idx, .docs.bin, .docs.idx, .json, and .broken.jsonl if records could not "
        "be used; replaces earlier files",
    )
    parser.add_argument(
        "--seq-length",
        default="8K",
        metavar="S",
        help="tokens per sequence; must be divisible by 2 x CP (default: 8K)",
    )
    parser.add_argument(
        "--cp", type=int, default=1, metavar="N", help="context parallel size of the training (default: 1)"
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        help="tokens of the longest example (default: 8K, or S + 1 if that is less)",
    )
    parser.add_argument(
        "--long",
        choices=("drop", "cut"),
        default="drop",
        help="drop longer examples (default), or cut them after the last answer that fits",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="total number of examples, equal over the sources of a domain as far as available (default: all)",
    )
    parser.add_argument(
        "--mix",
        metavar="SHARES",
        help="with --examples: shares like general=0.5,math=0.25,code=0.25 (default: as available)",
    )
    parser.add_argument(
        "--fit",
        choices=("best", "single"),
        default="best",
        help="several complete conversations per row, by best fit (default), or one per row, the rest padded",
    )
    parser.add_argument(
        "--template",
        choices=("auto", "llama3.1", "tokenizer"),
        default="auto",
        help="chat template: Llama-3.1's, the tokenizer's own, or auto: Llama-3.1's if both render the same text, otherwise the "
        "tokenizer's own (default: auto)",
    )
    parser.add_argument(
        "--date",
        default="26 Jul 2024",
        help="'Today Date' in Llama-3.1's system header (default: 26 Jul 2024, the template's own)",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("text", "control"),
        default="text",
        help="special tokens that contents spell out, like <|eot_id|>: encode them as text (default), or as control tokens",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the selected examples and of the order of rows (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that encode (default: one per core); the output does not depend on it",
    )
    parser.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print the first N conversations token by token, trained tokens marked, and write nothing",
    )


def sft(args: argparse.Namespace) -> None:
    if args.output is None and args.show is None:
        raise UserError("give --output PREFIX, or --show N to look at conversations first")
    if args.show is not None and args.show < 1:
        raise UserError(f"--show {args.show}: must be at least 1")
    if args.sources and (args.domain or args.form != "auto"):
        raise UserError("--domain and --form belong to --input; with --sources, set them in the file")

    # Imported here so that --help answers at once.
    from megatron_ultralong.data import conversations
    from megatron_ultralong.data.sft import pack, report, select_examples
    from megatron_ultralong.data.sft.encode_sources import ChatEncoder
    from megatron_ultralong.data.sft.settings import SftSettings

    settings = SftSettings(
        seq_length=parse_count(args.seq_length, "--seq-length"),
        cp=args.cp,
        long=args.long,
        examples=args.examples,
        max_tokens=None if args.max_tokens is None else parse_count(args.max_tokens, "--max-tokens"),
        mix=None if args.mix is None else select_examples.parse_mix(args.mix),
        fit=args.fit,
        template=args.template,
        date=args.date,
        special_tokens=args.special_tokens,
        seed=args.seed,
        workers=_workers(args),
    )
    if args.sources:
        sources = select_examples.load_sources(args.sources)
    else:
        files = tuple(conversations.files(args.input))
        sources = [
            select_examples.ConversationSource(name="input", files=files, domain=args.domain, form=args.form)
        ]
    if args.show is not None:
        encoder = ChatEncoder.load(args.tokenizer, args.template, args.date, args.special_tokens)
        for line in report.show_conversations(sources, encoder, args.show):
            print(line)
        return
    manifest = pack.pack_conversations(sources, args.tokenizer, args.output, settings)
    summary = report.summary_lines(manifest, Path(f"{args.output}.broken.jsonl"))
    print("\n".join([f"{args.output}:", *summary]))
    _print_attention(args.output, settings.seq_length)


def _print_attention(prefix: str, seq_length: int) -> None:
    """Say what attention inside the rows' documents costs."""
    from megatron_ultralong.planning import packing_report

    print("\n".join(packing_report.lines(Path(prefix), seq_length)))


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
