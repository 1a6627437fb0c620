"""`prepare_data check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.errors import UserError

HELP = "read all files of packed rows and compare them with their manifest's checksums"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="prefix of packed rows, like runs/1m/text"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the rows must have been made with this tokenizer too"
    )


def run(args: argparse.Namespace) -> None:
    from megatron_ultralong.data import packed_rows
    from megatron_ultralong.data.tokenizer import check_same

    for prefix in args.prefixes:
        manifest = packed_rows.read_manifest(prefix)
        if not isinstance(manifest.get("seq_length"), int):
            raise UserError(f"{prefix}.json does not state seq_length; prepare the data again")
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
