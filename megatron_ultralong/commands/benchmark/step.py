"""`benchmark step`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "forward and backward, or a complete training step, of some Llama layers under every memory setting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        metavar="S,S",
        help="tokens of the sequence (default: 32K,128K on a GPU, 256,512 on a CPU)",
    )
    parser.add_argument(
        "--settings",
        metavar="A,B",
        help="only these of: none, full, all-but-attention, offload-layer-inputs, offload-all, query-chunks, "
        "query-chunks-offload, save-on-cpu (default: all)",
    )
    parser.add_argument(
        "--layers",
        metavar="N",
        help="layers in the shape of Llama-3.1-8B on a GPU, of a small model on a CPU; offloading keeps two "
        "layers' tensors on the device, so its effect shows from 3 layers on (default: 4)",
    )
    parser.add_argument(
        "--layer-chunk", metavar="N", help="memory.layer_chunk, tokens (default: 16K on a GPU, 128 on a CPU)"
    )
    parser.add_argument(
        "--loss-chunk", metavar="N", help="memory.loss_chunk, tokens (default: 4K on a GPU, 128 on a CPU)"
    )
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="a complete training step: AdamW after each backward, with float32 weights and moments in host "
        "memory (12 bytes per weight, and 2 pinned)",
    )
    parser.add_argument(
        "--longest",
        action="store_true",
        help="search for the longest sequence for which one step completes, starting from the first of --lengths",
    )
    parser.add_argument(
        "--granularity",
        metavar="N",
        help="resolution of --longest in tokens (default: 4K on a GPU, 32 on a CPU)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="BYTES",
        help="use at most this much device memory, like 60G (1024-based); required by --longest on a CPU",
    )
    common.add_common(parser)


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import step

    return step.run, step.StepSettings(
        model=step.slice_of(common.count(args, "layers", "4"), gpu),
        lengths=common.counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        settings=args.settings.split(",") if args.settings else list(step.SETTINGS),
        precision=common.dtype(args, gpu),
        layer_chunk=common.count(args, "layer_chunk", "16K" if gpu else "128"),
        loss_chunk=common.count(args, "loss_chunk", "4K" if gpu else "128"),
        repeats=common.count(args, "repeats"),
        optimizer=args.optimizer,
        longest=args.longest,
        granularity=common.count(args, "granularity", "4K" if gpu else "32"),
        limit=None if args.max_memory is None else common.byte_count(args.max_memory),
    )
