#!/usr/bin/env python
"""Prepare: raw documents to packed rows that tools/train.py reads.

    python tools/prepare_data.py pretrain --input *.jsonl --tokenizer Llama-3.1-8B-Instruct --seq-length 1M --output runs/1m/text
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


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was half-written is removed
    args.run(args)


if __name__ == "__main__":
    errors.main(main)
