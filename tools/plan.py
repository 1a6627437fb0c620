#!/usr/bin/env python
"""Plan: memory and time of a run before it is launched, and the fastest layouts that fit. Estimates from
formulas: docs/plan.md.

    python tools/plan.py --model llama-3.1-8b --seq-length 1M --gpus 256 --gpu h100
    python tools/plan.py --recipe ultralong_4m --gpus 256 --gpu h200 --set parallel.tp=8 --json plan.json

With --set, dimensions (parallel.tp, pp, cp, dp) and memory modes (memory.recompute, memory.offload) that are
given stay; the others, and memory.offload=auto, are searched; parallel.ulysses and, where nothing else fits,
memory.query_chunks as well. Each plan ends in a line of settings for tools/train.py. Exit code 1 where
nothing fits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        metavar="NAME or DIR",
        help="llama-3.1-8b, smollm2-135m, their Hugging Face names, or a Hugging Face directory with "
        "config.json; with --recipe: instead of the model it starts from",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a run of megatron_ultralong/recipes.py; its own layout is shown as well",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings to change and to hold, as in tools/train.py",
    )
    parser.add_argument(
        "--seq-length", metavar="S", help="tokens of a sequence, like 128K or 1M (default: the recipe's)"
    )
    parser.add_argument(
        "--global-batch",
        type=int,
        metavar="N",
        help="sequences an iteration (default: the recipe's, or as many as make 8M tokens)",
    )
    parser.add_argument(
        "--document-length",
        metavar="N",
        help="with data.documents=masked: mean tokens of a document, like 8K, inside which "
        "attention stays (default: the whole row)",
    )
    parser.add_argument(
        "--gpus", type=int, required=True, metavar="N", help="GPUs of all nodes together, eight a node"
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="KIND",
        help="h100 (80 GB), h200 (141), a100 (80) or b200 (180); data-sheet figures (default: h100)",
    )
    parser.add_argument(
        "--host-memory",
        default="2T",
        metavar="BYTES",
        help="host memory a node for offloading, like 2T or 1500G (1024-based); an assumption (default: 2T)",
    )
    parser.add_argument(
        "--assume",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=NUMBER",
        help="other assumptions: shares of the data-sheet figures attention_forward, attention_backward, products, links, "
        "gpu_memory, host_memory; and hop_microseconds",
    )
    parser.add_argument("--show", type=int, default=4, metavar="N", help="layouts side by side (default: 4)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the same as JSON: bytes, FLOPs, seconds"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()

    # Imported here so that --help answers at once.
    from megatron_ultralong.planning import report as plan_report

    report = plan_report.report(
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
        show=args.show,
    )
    print(report.text)
    if args.json is not None:
        plan_report.write(args.json, report.values)
    return 0 if report.fits else 1


if __name__ == "__main__":
    cli.main(main)
