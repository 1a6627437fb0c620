#!/usr/bin/env python
"""Prepare: raw documents, or conversations, to packed rows that tools/train.py reads.

    python tools/prepare_data.py pretrain --input *.jsonl --tokenizer Llama-3.1-8B-Instruct --seq-length 1M --output runs/1m/text
    python tools/prepare_data.py sft --sources chat.yaml --tokenizer Llama-3.1-8B-Instruct --examples 100000 --output runs/1m/chat
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from megatron_ultralong.config import UserError, parse_count
from megatron_ultralong.runtime import errors


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "documents joined by a separator, in rows of S + 1 tokens (Megatron's .bin/.idx)"
    add_pretrain(commands.add_parser("pretrain", help=text, description=text))
    text = "conversations in rows of S + 1 tokens with loss masks and document starts; only answers are trained on"
    add_sft(commands.add_parser("sft", help=text, description=text))
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


def add_sft(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=sft)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--sources", type=Path, metavar="FILE",
                       help="YAML file with `sources:`, a name each with input, domain and form; paths in it are relative to it")
    given.add_argument("--input", nargs="+", action="extend", metavar="FILE",
                       help=".jsonl (also .gz, .zst), .json (one list) or .parquet; directories and globs of them; one source, named input")
    parser.add_argument("--domain", choices=("general", "math", "code"), help="with --input: what all of it is (default: as each record's own "
                        "`domain` says, general where it says none)")
    parser.add_argument("--form", default="auto", help="with --input: auto (default: found out record by record), sharegpt, messages, alpaca, or "
                        "two columns like question/answer")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face directory with tokenizer.json")
    parser.add_argument("--output", metavar="PREFIX", help="writes PREFIX.bin, .idx, .mask.bin, .mask.idx, .docs.bin, .docs.idx, .json, and "
                        ".broken.jsonl if records could not be used; replaces old ones")
    parser.add_argument("--seq-length", default="8K", metavar="S", help="tokens of a sequence (default: 8K); must divide by 2 x CP")
    parser.add_argument("--cp", type=int, default=1, metavar="N", help="context parallel ranks it is for (default: 1)")
    parser.add_argument("--max-tokens", metavar="N", help="longest example (default: 8K, or S + 1 where that is less)")
    parser.add_argument("--long", choices=("drop", "cut"), default="drop",
                        help="longer ones: leave them out (default), or cut them after the last answer that fits")
    parser.add_argument("--examples", type=int, metavar="N", help="examples in all, the same from each source of a domain as far as it has them "
                        "(default: all)")
    parser.add_argument("--mix", metavar="SHARES", help="with --examples: like general=0.5,math=0.25,code=0.25 (default: as there are)")
    parser.add_argument("--template", choices=("auto", "llama3.1", "tokenizer"), default="auto",
                        help="chat template: Llama-3.1's, the tokenizer's own, or (auto, default) the former where both are the same")
    parser.add_argument("--date", default="26 Jul 2024", help="'Today Date' in Llama-3.1's system header (default: 26 Jul 2024, its own)")
    parser.add_argument("--seed", type=int, default=0, help="of which examples are taken and of the order of rows (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: one a core); the output is the same")
    parser.add_argument("--show", type=int, metavar="N", help="print the first N conversations token by token, trained ones marked; write nothing")


def sft(args: argparse.Namespace) -> None:
    if args.output is None and args.show is None:
        raise UserError("--output PREFIX is needed; or --show N to look at conversations first")
    if args.show is not None and args.show < 1:
        raise UserError(f"--show {args.show}: must be at least 1")
    if args.sources and (args.domain or args.form != "auto"):
        raise UserError("--domain and --form go with --input; in --sources they stand in the file")

    # Imported here so that --help answers at once.
    from megatron_ultralong.data import conversations, mix, sft_report
    from megatron_ultralong.data import sft as prepare_sft

    settings = prepare_sft.Settings(
        seq_length=parse_count(args.seq_length, "--seq-length"), cp=args.cp, long=args.long, examples=args.examples,
        max_tokens=None if args.max_tokens is None else parse_count(args.max_tokens, "--max-tokens"),
        mix=None if args.mix is None else mix.parse(args.mix), template=args.template, date=args.date, seed=args.seed,
        workers=prepare_sft.cores() if args.workers is None else args.workers)
    sources = mix.load(args.sources) if args.sources else [
        mix.Source(name="input", files=tuple(conversations.files(args.input)), domain=args.domain, form=args.form)]
    if args.show is not None:
        for line in sft_report.show(sources, args.tokenizer, args.template, args.date, args.show):
            print(line)
        return
    made = prepare_sft.prepare(sources, args.tokenizer, args.output, settings)
    print("\n".join([f"{args.output}:", *sft_report.report(made, Path(f"{args.output}.broken.jsonl"))]))


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was half-written is removed
    args.run(args)


if __name__ == "__main__":
    errors.main(main)
