"""`prepare_data pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.commands.prepare_data import common
from megatron_ultralong.errors import UserError

HELP = "pack documents, joined by a separator, into rows of S + 1 tokens (Megatron's .bin/.idx)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
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


def run(args: argparse.Namespace) -> None:
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
        mix,
        args.tokenizer,
        packing,
        args.output,
        workers=common.worker_count(args),
        tokens_dir=args.tokens_dir,
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
        common.print_attention(args.output, seq_length)
