#!/usr/bin/env python
"""Measure speed and memory of this program on one GPU or a CPU.

    python tools/benchmark.py attention --length 256K --cp 4,8 --documents 16 --out runs/benchmark
    python tools/benchmark.py placement --length 1M --cp 8,32,64 --out runs/benchmark
    python tools/benchmark.py loss --tokens 64K --chunks 1K,4K,16K --out runs/benchmark
    python tools/benchmark.py step --lengths 64K,128K --settings none,full,all-but-attention,offload-all
    python tools/benchmark.py step --longest --settings all-but-attention,offload-all
    python tools/benchmark.py step --longest --optimizer --layers 2 --settings query-chunks-offload
    python tools/benchmark.py train --model models/SmolLM2-135M-Instruct --lengths 2K,8K --out runs/benchmark
    python tools/benchmark.py checkpoint --folder runs --out runs/benchmark
    python tools/benchmark.py generate --lengths 128K,512K --out runs/benchmark
    python tools/benchmark.py data --tokenizer DIR --out runs/benchmark

These are not benchmarks of models; tools/evaluate.py runs those. Each command prints a table; --json, --plot
and --out also write it to files, with device, versions, date and command. Defaults are smaller on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    _attention_arguments(commands)
    _placement_arguments(commands)
    _loss_arguments(commands)
    _step_arguments(commands)
    _train_arguments(commands)
    _checkpoint_arguments(commands)
    _generate_arguments(commands)
    _data_arguments(commands)
    return parser.parse_args()


def main() -> int:
    args = arguments()

    # Imported here so that --help answers at once.
    from megatron_ultralong.io import atomic_files
    from megatron_ultralong.measure import report, timing

    device = timing.select_device(args.device)
    figures, plots = [args.json], [args.plot]
    if args.out is not None:
        name = "longest_step" if args.benchmark == "step" and args.longest else args.benchmark
        figures.append(args.out / f"{name}.json")
        plots.append(args.out / f"{name}.png")
    # Figures first: a plot that fails must lose nothing that was measured.
    outputs = [(report.write_json, path) for path in figures] + [(report.plot, path) for path in plots]
    for _, path in outputs:
        if path is not None:
            atomic_files.check_file_writable(path, str(path))
    measure = {
        "attention": _attention,
        "placement": _placement,
        "loss": _loss,
        "step": _step,
        "train": _train,
        "checkpoint": _checkpoint,
        "generate": _generate,
        "data": _data,
    }[args.benchmark]
    run, settings = measure(args, device.type == "cuda")
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    result = run(
        settings, device, command, lambda name: print(f"measuring {name}", file=sys.stderr, flush=True)
    )
    print(report.text(result))
    for write, path in outputs:
        if path is not None:
            write(result, path)
    return 0


# ---- attention ---------------------------------------------------------------------------------


def _attention_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "attention", help="one layer's context parallel attention: all ranks' work on one device"
    )
    parser.add_argument(
        "--length",
        metavar="S",
        help="tokens of the sequence, like 256K (default: 128K on a GPU, 1K on a CPU)",
    )
    parser.add_argument(
        "--cp", metavar="N,N", default="2,4,8", help="context parallel sizes, at least 2 (default: 2,4,8)"
    )
    parser.add_argument(
        "--ulysses",
        metavar="N,N",
        default="2",
        help="ranks that exchange heads, in the rows that combine all-to-all and ring (default: 2)",
    )
    parser.add_argument("--heads", metavar="N", help="query heads (default: 32 on a GPU, 8 on a CPU)")
    parser.add_argument("--kv-heads", metavar="N", help="KV heads (default: 8 on a GPU, 2 on a CPU)")
    parser.add_argument("--head-dim", metavar="N", help="head dimension (default: 128 on a GPU, 32 on a CPU)")
    parser.add_argument("--documents", metavar="N", help="add rows with N documents of random lengths")
    parser.add_argument(
        "--error-length",
        metavar="S",
        help="tokens of the comparison with float64 (default: 4K on a GPU, 512 on a CPU)",
    )
    parser.add_argument(
        "--kernel",
        choices=["auto", "cudnn", "flash", "flash3", "flash4"],
        default="auto",
        help="as runtime.attention_backend (default: auto)",
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="only these of: ring, all-to-all, hybrid, all_gather, te-style, naive, torch, ring-flash-attn, "
        "yunchang (default: all)",
    )
    _common_arguments(parser)


def _attention(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import attention, attention_methods, timing

    return attention.run, attention.AttentionSettings(
        length=_count(args, "length", "128K" if gpu else "1K"),
        cp=_counts(args, "cp"),
        ulysses=_counts(args, "ulysses"),
        heads=_count(args, "heads", "32" if gpu else "8"),
        kv_heads=_count(args, "kv_heads", "8" if gpu else "2"),
        head_dim=_count(args, "head_dim", "128" if gpu else "32"),
        dtype=timing.DTYPES[_dtype(args, gpu)],
        documents=None if args.documents is None else _count(args, "documents"),
        error_length=_count(args, "error_length", "4K" if gpu else "512"),
        kernel=args.kernel,
        methods=args.methods.split(",") if args.methods else attention_methods.METHODS,
        repeats=_count(args, "repeats"),
    )


# ---- placement ---------------------------------------------------------------------------------


def _placement_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "placement",
        help="documents of packed rows on context parallel ranks: work, keys sent, messages (counted)",
    )
    parser.add_argument("--length", metavar="S", default="1M", help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--cp", metavar="N,N", default="8,32,64", help="context parallel sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--documents",
        type=Path,
        metavar="FILE",
        help="your own: the prefix of packed rows with document starts, or a text file with a length a line "
        "(default: modelled distributions)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="adds Python's source files, in tokens of this tokenizer",
    )
    _common_arguments(parser)


def _placement(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import placement

    return placement.run, placement.PlacementSettings(
        length=_count(args, "length"),
        cp=tuple(_counts(args, "cp", "")),
        lengths=args.documents,
        tokenizer=args.tokenizer,
    )


# ---- loss --------------------------------------------------------------------------------------


def _loss_arguments(commands: Any) -> None:
    parser = commands.add_parser("loss", help="output layer and cross entropy")
    parser.add_argument("--tokens", metavar="N", help="tokens (default: 16K on a GPU, 1K on a CPU)")
    parser.add_argument("--hidden", metavar="N", help="hidden size (default: 4096 on a GPU, 64 on a CPU)")
    parser.add_argument(
        "--vocab", metavar="N", help="vocabulary size (default: 128256 on a GPU, 2000 on a CPU)"
    )
    parser.add_argument(
        "--chunks", metavar="N,N", help="tokens per chunk (default: 1K,4K,8K on a GPU, 64,256 on a CPU)"
    )
    parser.add_argument(
        "--error-tokens",
        metavar="N",
        help="tokens of the comparison with float64 (default: 512 on a GPU, 128 on a CPU)",
    )
    _common_arguments(parser)


def _loss(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import loss, timing

    return loss.run, loss.LossSettings(
        tokens=_count(args, "tokens", "16K" if gpu else "1K"),
        hidden=_count(args, "hidden", "4096" if gpu else "64"),
        vocab=_count(args, "vocab", "128256" if gpu else "2000"),
        chunks=_counts(args, "chunks", "1K,4K,8K" if gpu else "64,256"),
        dtype=timing.DTYPES[_dtype(args, gpu)],
        error_tokens=_count(args, "error_tokens", "512" if gpu else "128"),
        repeats=_count(args, "repeats"),
    )


# ---- step --------------------------------------------------------------------------------------


def _step_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "step",
        help="forward and backward, or a complete training step, of some Llama layers under every memory setting",
    )
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
        "--limit",
        metavar="BYTES",
        help="use at most this much device memory, like 60G (1024-based); required by --longest on a CPU",
    )
    _common_arguments(parser)


def _step(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import step

    return step.run, step.StepSettings(
        model=step.slice_of(_count(args, "layers", "4"), gpu),
        lengths=_counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        settings=args.settings.split(",") if args.settings else list(step.SETTINGS),
        precision=_dtype(args, gpu),
        layer_chunk=_count(args, "layer_chunk", "16K" if gpu else "128"),
        loss_chunk=_count(args, "loss_chunk", "4K" if gpu else "128"),
        repeats=_count(args, "repeats"),
        optimizer=args.optimizer,
        longest=args.longest,
        granularity=_count(args, "granularity", "4K" if gpu else "32"),
        limit=None if args.limit is None else _bytes(args.limit),
    )


# ---- train -------------------------------------------------------------------------------------


def _train_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="complete training steps of a model, in turns with the same in plain transformers"
    )
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
    _common_arguments(parser, repeats="3", note="pairs of steps, of which the median is reported")


def _train(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import train_step

    layers = None if args.layers is None else _count(args, "layers")
    model, rope = train_step.shape_of(args.model, layers)
    return train_step.run, train_step.TrainSettings(
        hf=args.model,
        model=model,
        rope=rope,
        lengths=_counts(args, "lengths"),
        settings=args.settings.split(","),
        precision=_dtype(args, gpu),
        layer_chunk=_count(args, "layer_chunk"),
        loss_chunk=_count(args, "loss_chunk"),
        repeats=_count(args, "repeats"),
    )


# ---- checkpoint --------------------------------------------------------------------------------


def _checkpoint_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "checkpoint", help="saves at once and in the background, loads, and their checksums"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", default=Path("."), help="where to save (default: here)"
    )
    parser.add_argument("--layers", metavar="N", help="layers of SmolLM2-135M's shape (default: 30)")
    parser.add_argument(
        "--tokens", metavar="S", default="1K", help="tokens of the steps beside a save (default: %(default)s)"
    )
    _common_arguments(parser, repeats="3")


def _checkpoint(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import checkpoint, train_step

    layers = None if args.layers is None else _count(args, "layers")
    model, rope = train_step.shape_of(None, layers)
    return checkpoint.run, checkpoint.CheckpointSettings(
        model=model,
        rope=rope,
        tokens=_count(args, "tokens"),
        precision=_dtype(args, gpu),
        folder=args.folder,
        repeats=_count(args, "repeats"),
    )


# ---- generate ----------------------------------------------------------------------------------


def _generate_arguments(commands: Any) -> None:
    parser = commands.add_parser("generate", help="prefill and decode, as in evaluate.py --engine megatron")
    parser.add_argument(
        "--lengths", metavar="S,S", help="tokens of the prompt (default: 32K,128K on a GPU, 256,512 on a CPU)"
    )
    parser.add_argument(
        "--sequences",
        metavar="N",
        default="1",
        help="sequences that continue the prompt together (default: %(default)s)",
    )
    parser.add_argument(
        "--written", metavar="N", default="32", help="tokens decoded in each sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--read-chunk",
        metavar="N",
        help="tokens of the prompt per prefill chunk (default: 16K on a GPU, 128 on a CPU)",
    )
    _common_arguments(parser, repeats="3")


def _generate(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import generation

    return generation.run, generation.GenerationSettings(
        model=generation.model_shape(gpu),
        lengths=_counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        sequences=_count(args, "sequences"),
        written=_count(args, "written"),
        chunk=_count(args, "read_chunk", "16K" if gpu else "128"),
        precision=_dtype(args, gpu),
        repeats=_count(args, "repeats"),
    )


# ---- data --------------------------------------------------------------------------------------


def _data_arguments(commands: Any) -> None:
    parser = commands.add_parser(
        "data", help="documents to tokens on disk, compared with Megatron-Core's builder and datatrove"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="directory with tokenizer.json"
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".jsonl files with `text` (default: a sample made of Python's own source files)",
    )
    parser.add_argument(
        "--megabytes", metavar="N", default="100", help="size of the sample (default: %(default)s)"
    )
    parser.add_argument(
        "--methods", metavar="A,B", help="only these of: ours, megatron, datatrove (default: all)"
    )
    parser.add_argument("--workers", metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--made",
        type=Path,
        metavar="DIR",
        default=Path("runs/benchmark/data"),
        help="folder that keeps the sample (default: %(default)s)",
    )
    _common_arguments(parser, repeats="3")


def _data(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    from megatron_ultralong.measure import data_preparation

    workers = _count(args, "workers", str(len(os.sched_getaffinity(0))))
    inputs = args.input or data_preparation.write_sample_input(
        args.made, 4 * workers, _count(args, "megabytes")
    )
    return data_preparation.run, data_preparation.DataSettings(
        inputs=tuple(inputs),
        tokenizer=args.tokenizer,
        workers=workers,
        repeats=_count(args, "repeats"),
        methods=tuple(args.methods.split(",")) if args.methods else (),
    )


# ---- common arguments and values ---------------------------------------------------------------


def _common_arguments(
    parser: argparse.ArgumentParser,
    repeats: str = "10",
    note: str = "timed runs, of which the median is reported; a run that takes over 20 s is timed once",
) -> None:
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto = a GPU if available (default)",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="precision (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        default=repeats,
        help=f"{note} (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart as PNG")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write both here, as NAME.json and NAME.png")


def _dtype(args: argparse.Namespace, gpu: bool) -> str:
    return args.dtype or ("bf16" if gpu else "fp32")


def _count(args: argparse.Namespace, name: str, default: str = "") -> int:
    return parse_count(getattr(args, name) or default, f"--{name.replace('_', '-')}")


def _counts(args: argparse.Namespace, name: str, default: str = "") -> list[int]:
    return [
        parse_count(text.strip(), f"--{name.replace('_', '-')}")
        for text in (getattr(args, name) or default).split(",")
    ]


def _bytes(text: str) -> int:
    if text[-1:].upper() == "G":
        return parse_count(text[:-1], "--limit") * 2**30
    try:
        return parse_count(text, "--limit")
    except UserError:
        raise UserError(f"--limit {text}: expected bytes, like 60G") from None


if __name__ == "__main__":
    cli.main(main)
