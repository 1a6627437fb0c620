"""Estimate memory and time of a run before it is launched, and find the fastest layouts that fit.

    ultralong plan --model llama-3.1-8b --seq-length 1M --gpus 256 --gpu h100
    ultralong plan --recipe ultralong_4m --gpus 256 --gpu h200 --set parallel.tp=8 --json plan.json
    ultralong plan --recipe ultralong_1m_stages --gpus 256 --save-rate 20G

All figures are estimates from formulas (docs/plan.md), not measurements. The search varies parallel.tp, pp,
cp, dp and ulysses, memory.recompute and memory.offload, and, where nothing else fits, memory.query_chunks.
Settings given with --set are kept, except memory.offload=auto, which is searched. For each layout the report
ends with a line of settings for `ultralong train`. With a recipe, or with train.iterations, it says the hours
and GPU-hours of the whole run; of several stages, each is planned, and their sum is printed last. Exit code:
0 if a layout fits, 1 if none does, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME or DIR",
        help="llama-3.1-8b, qwen3-8b and others of megatron_ultralong/shapes.py, their Hugging Face names, or a "
        "Hugging Face directory with config.json; "
        "with --recipe: used instead of the model the recipe starts from",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="a recipe of megatron_ultralong/recipes.py, also of several stages; its own layout is shown as well",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings to change, as in `ultralong train` (of one stage: STAGE:KEY=VALUE); the search keeps them",
    )
    add(
        "--seq-length", metavar="S", help="tokens per sequence, like 128K or 1M (default: that of the recipe)"
    )
    add(
        "--global-batch",
        type=int,
        metavar="N",
        help="sequences per iteration (default: that of the recipe, or as many as make 8M tokens)",
    )
    add(
        "--document-length",
        metavar="N",
        help="with data.documents=masked: tokens of each document, like 8K; attention stays inside documents "
        "(default: the length of the row)",
    )
    add(
        "--documents",
        type=Path,
        metavar="FILE",
        help="instead of --document-length: the prefix of packed rows with document starts, or a text file with the "
        "length of a document a line",
    )
    add("--gpus", type=int, required=True, metavar="N", help="GPUs on all nodes together, eight per node")
    add(
        "--gpu",
        default="h100",
        metavar="KIND",
        help="h100 (80 GB), h200 (141), a100 (80) or b200 (180), by their data sheets (default: %(default)s)",
    )
    add(
        "--host-memory",
        default="2T",
        metavar="BYTES",
        help="assumed host memory per node for offloading, like 2T or 1500G (1024-based) (default: %(default)s)",
    )
    add(
        "--assume",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=NUMBER",
        help="other assumptions: the fractions of the data-sheet figures attention_forward, attention_backward, "
        "products, links, gpu_memory and host_memory; and hop_microseconds",
    )
    add(
        "--save-rate",
        metavar="BYTES",
        help="bytes per second that checkpoints are written with, by all nodes together, like 10G (1024-based): "
        "the hours of the run then include its checkpoints",
    )
    add("--show", type=int, default=4, metavar="N", help="layouts shown side by side (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report as JSON: bytes, FLOPs, seconds")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    from megatron_ultralong.io import atomic_files
    from megatron_ultralong.planning import report

    if args.json is not None:
        atomic_files.check_file_writable(args.json, f"--json {args.json}")
    plan = report.report(
        report.PlanRequest(
            model=args.model,
            recipe=args.recipe,
            settings=args.set,
            seq_length=args.seq_length,
            global_batch=args.global_batch,
            gpus=args.gpus,
            gpu=args.gpu,
            host_memory=args.host_memory,
            assumptions=args.assume,
            document_length=args.document_length,
            documents=args.documents,
            save_rate=args.save_rate,
            show=args.show,
        )
    )
    print(plan.text, flush=True)  # before the JSON where that goes to standard output too
    if args.json is not None:
        atomic_files.write_json(args.json, plan.values, what=f"--json {args.json}")
    return 0 if plan.fits else 1
