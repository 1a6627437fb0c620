"""`prepare_data sft`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.commands.prepare_data import common
from megatron_ultralong.errors import UserError

HELP = "pack conversations into rows of S + 1 tokens with loss masks and document starts; only answers are trained on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
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
        help="total number of examples; the sources of a domain contribute equally, as far as they have enough (default: all)",
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


def run(args: argparse.Namespace) -> None:
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
        workers=common.worker_count(args),
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
    common.print_attention(args.output, settings.seq_length)
