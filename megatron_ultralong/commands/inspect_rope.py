"""Show side by side the RoPE that models really use, and which of them agree.

    ultralong inspect-rope models/Llama-3.1-8B-Instruct runs/1m/pretrain
    ultralong inspect-rope models/Llama-3.1-8B-1M model.gguf megatron.txt --json rope.json
    ultralong inspect-rope megatron/iter_0001000 --head-dim 128

A source is a Hugging Face directory or its config.json; a checkpoint of this program (run directory or
iteration); a Megatron-LM checkpoint (its common.pt), or Megatron-LM's arguments in a text, YAML or JSON file;
or a GGUF file of a Llama. Nothing is loaded but settings. Exit code: 0 if all sources agree to 1e-6, 1 if some
differ, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="a file or directory that states a RoPE")
    add(
        "--head-dim",
        metavar="N",
        help="head dimension of the sources that do not state one",
    )
    add(
        "--seq-length",
        metavar="N",
        help="tokens of the sequence, like 128K, for methods that depend on it (default: each source's original length)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the report as JSON, with all frequencies")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    from megatron_ultralong.checkpoint.rope_sources import compare, read, report
    from megatron_ultralong.command_settings import parse_count
    from megatron_ultralong.io import atomic_files

    head_dim, length = (
        None if text is None else parse_count(text, option)
        for option, text in (("--head-dim", args.head_dim), ("--seq-length", args.seq_length))
    )
    if args.json is not None:
        atomic_files.check_writable(args.json.parent, f"--json {args.json}")
    sources = [source for path in args.sources for source in read.read_source(path)]
    computed = [compare.compute(source, head_dim, length) for source in sources]
    agreements = compare.compare(computed)
    print(report.text(computed, agreements))
    if args.json is not None:
        atomic_files.write_json(args.json, report.values(computed, agreements), what=f"--json {args.json}")
    return 0 if len(agreements) == 1 and len(agreements[0].close) == 1 else 1
