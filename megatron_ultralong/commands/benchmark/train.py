"""`benchmark train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.commands.benchmark import common

HELP = "complete training steps of a model, in turns with the same in plain transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory (default: SmolLM2-135M's shape with random weights)",
    )
    parser.add_argument("--layers", metavar="N", help="layers of the default model (default: 30)")
    parser.add_argument("--lengths", metavar="S,S", default="2K,8K", help="tokens (default: %(default)s)")
    parser.add_argument(
        "--settings",
        metavar="A,B",
        default="none,recompute",
        help="none: all activations are saved; recompute: everything but attention is computed again, in "
        "transformers gradient checkpointing (default: %(default)s)",
    )
    parser.add_argument(
        "--layer-chunk", metavar="N", default="16K", help="memory.layer_chunk, tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--loss-chunk", metavar="N", default="1K", help="memory.loss_chunk, tokens (default: %(default)s)"
    )
    common.add_common(parser, repeats="3", note="pairs of steps, of which the median is reported")


def settings(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import train_step

    layers = None if args.layers is None else common.count(args, "layers")
    model, rope = train_step.shape_of(args.model, layers)
    return train_step.run, train_step.TrainSettings(
        hf=args.model,
        model=model,
        rope=rope,
        lengths=common.counts(args, "lengths"),
        settings=args.settings.split(","),
        precision=common.dtype(args, gpu),
        layer_chunk=common.count(args, "layer_chunk"),
        loss_chunk=common.count(args, "loss_chunk"),
        repeats=common.count(args, "repeats"),
    )
