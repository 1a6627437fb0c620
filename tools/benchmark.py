"""Speed and memory of attention over context-parallel ranks, of the loss, of a whole step and of generation, on this machine's one GPU or
its CPU; of preparing data on its CPU.

    python tools/benchmark.py attention --length 256K --cp 4,8 --documents 16 --out runs/benchmark
    python tools/benchmark.py loss --tokens 64K --chunks 1K,4K,16K --out runs/benchmark
    python tools/benchmark.py step --lengths 64K,128K --settings none,full,all-but-attention,offload-all --out runs/benchmark
    python tools/benchmark.py step --longest --settings all-but-attention,offload-all
    python tools/benchmark.py step --longest --optimizer --layers 2 --settings query-chunks-offload
    python tools/benchmark.py generate --lengths 128K,512K --out runs/benchmark
    python tools/benchmark.py data --tokenizer DIR --out runs/benchmark

Each prints a table; --json, --plot and --out keep it, with device, versions, date and command. Defaults are smaller on a CPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_ultralong.config import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)

    attention = commands.add_parser(
        "attention", help="one layer's attention: every rank's work on one device, beside one kernel"
    )
    attention.add_argument(
        "--length",
        metavar="S",
        help="tokens of the sequence, like 256K (default: 128K on a GPU, 1K on a CPU)",
    )
    attention.add_argument(
        "--cp", metavar="N,N", default="2,4,8", help="context parallel sizes, from 2 (default: 2,4,8)"
    )
    attention.add_argument(
        "--ulysses",
        metavar="N,N",
        default="2",
        help="ranks that exchange heads in the rows that mix all-to-all and ring (default: 2)",
    )
    attention.add_argument("--heads", metavar="N", help="query heads (default: 32 on a GPU, 8 on a CPU)")
    attention.add_argument("--kv-heads", metavar="N", help="KV heads (default: 8 on a GPU, 2 on a CPU)")
    attention.add_argument("--head-dim", metavar="N", help="(default: 128 on a GPU, 32 on a CPU)")
    attention.add_argument("--documents", metavar="N", help="rows with N documents of random lengths as well")
    attention.add_argument(
        "--error-length",
        metavar="S",
        help="tokens of the comparison with float64 (default: 4K on a GPU, 512 on a CPU)",
    )
    attention.add_argument(
        "--kernel",
        choices=["auto", "cudnn", "flash"],
        default="auto",
        help="auto = the fastest there is (default)",
    )
    attention.add_argument(
        "--methods",
        metavar="A,B",
        help="only these of: ring, all-to-all, hybrid, gather, te-style, naive, torch, ring-flash-attn, "
        "yunchang (default: all)",
    )
    _common(attention)

    loss = commands.add_parser("loss", help="output layer and cross entropy")
    loss.add_argument("--tokens", metavar="N", help="(default: 16K on a GPU, 1K on a CPU)")
    loss.add_argument("--hidden", metavar="N", help="hidden size (default: 4096 on a GPU, 64 on a CPU)")
    loss.add_argument(
        "--vocab", metavar="N", help="rows of the vocabulary (default: 128256 on a GPU, 2000 on a CPU)"
    )
    loss.add_argument(
        "--chunks", metavar="N,N", help="tokens of a chunk (default: 1K,4K,8K on a GPU, 64,256 on a CPU)"
    )
    loss.add_argument(
        "--error-tokens",
        metavar="N",
        help="tokens of the comparison with float64 (default: 512 on a GPU, 128 on a CPU)",
    )
    _common(loss)

    step = commands.add_parser(
        "step",
        help="forward and backward, or a whole training step, of a slice of a Llama under every memory setting",
    )
    step.add_argument(
        "--lengths",
        metavar="S,S",
        help="tokens of the sequence (default: 32K,128K on a GPU, 256,512 on a CPU)",
    )
    step.add_argument(
        "--settings",
        metavar="A,B",
        help="only these of: none, full, all-but-attention, offload-layer-inputs, offload-all, query-chunks, "
        "query-chunks-offload, save-on-cpu (default: all)",
    )
    step.add_argument(
        "--layers",
        metavar="N",
        help="of Llama-3.1-8B's shape on a GPU, of a small one on a CPU; offloading leaves two layers' tensors "
        "on the device, so it shows from 3 on (default: 4)",
    )
    step.add_argument(
        "--layer-chunk", metavar="N", help="memory.layer_chunk, tokens (default: 16K on a GPU, 128 on a CPU)"
    )
    step.add_argument(
        "--loss-chunk", metavar="N", help="memory.loss_chunk, tokens (default: 4K on a GPU, 128 on a CPU)"
    )
    step.add_argument(
        "--optimizer",
        action="store_true",
        help="a whole training step: AdamW after each backward, its float32 weights and moments in "
        "host memory (12 bytes a weight, and 2 pinned)",
    )
    step.add_argument(
        "--longest",
        action="store_true",
        help="look for the longest sequence of which one step completes, from the first of --lengths on",
    )
    step.add_argument(
        "--granularity",
        metavar="N",
        help="tokens up to which --longest is exact (default: 4K on a GPU, 32 on a CPU)",
    )
    step.add_argument(
        "--limit",
        metavar="BYTES",
        help="use no more of the device's memory, like 60G (1024-based); --longest on a CPU needs it",
    )
    _common(step)

    generate = commands.add_parser(
        "generate", help="reading a prompt and writing tokens after it, as evaluate.py --engine megatron does"
    )
    generate.add_argument(
        "--lengths", metavar="S,S", help="tokens of the prompt (default: 32K,128K on a GPU, 256,512 on a CPU)"
    )
    generate.add_argument(
        "--sequences",
        metavar="N",
        default="1",
        help="that go on after the prompt, together (default: %(default)s)",
    )
    generate.add_argument(
        "--written", metavar="N", default="32", help="tokens of each (default: %(default)s)"
    )
    generate.add_argument(
        "--read-chunk",
        metavar="N",
        help="tokens of the prompt read at a time (default: 16K on a GPU, 128 on a CPU)",
    )
    _common(generate, repeats="3")

    data = commands.add_parser(
        "data", help="documents to tokens on disk, beside Megatron-Core's builder and datatrove"
    )
    data.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="directory with tokenizer.json"
    )
    data.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".jsonl files with `text` (default: made of Python's own source files)",
    )
    data.add_argument(
        "--megabytes", metavar="N", default="100", help="of the made input, in all (default: 100)"
    )
    data.add_argument(
        "--methods", metavar="A,B", help="only these of: ours, megatron, datatrove (default: all)"
    )
    data.add_argument("--workers", metavar="N", help="processes (default: one a core)")
    data.add_argument(
        "--made",
        type=Path,
        metavar="DIR",
        default=Path("runs/benchmark/data"),
        help="where the made input is kept (default: %(default)s)",
    )
    _common(data, repeats="3")
    return parser.parse_args()


def _common(parser: argparse.ArgumentParser, repeats: str = "10") -> None:
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="(default: a GPU where there is one)",
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--repeats",
        metavar="N",
        default=repeats,
        help="timed runs, of which the median counts; on a GPU one where it takes over 20 s (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them as PNG")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write both here, as NAME.json and NAME.png")


def main() -> int:
    args = arguments()

    # Imported here so that --help answers at once.
    from megatron_ultralong.measure import report, timing

    device = timing.device_of(args.device)
    files = [(report.write_json, args.json), (report.plot, args.plot)]
    report.check_files(args.json, args.plot)
    run: Any
    settings: Any
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    if args.benchmark == "attention":
        from megatron_ultralong.measure import attention

        run, settings = attention.run, _attention(args, device.type == "cuda")
    elif args.benchmark == "loss":
        from megatron_ultralong.measure import loss

        run, settings = loss.run, _loss(args, device.type == "cuda")
    elif args.benchmark == "generate":
        from megatron_ultralong.measure import generation

        run, settings = generation.run, _generate(args, device.type == "cuda")
    elif args.benchmark == "data":
        from megatron_ultralong.measure import data_preparation

        run, settings = data_preparation.run, _data(args)
    else:
        from megatron_ultralong.measure import step

        run, settings = step.run, _step(args, device.type == "cuda")
    if args.out is not None:
        name = "longest_step" if args.benchmark == "step" and args.longest else args.benchmark
        files += [(report.write_json, args.out / f"{name}.json"), (report.plot, args.out / f"{name}.png")]
        report.make_folder(args.out)
    found = run(
        settings, device, command, lambda name: print(f"measuring {name}", file=sys.stderr, flush=True)
    )
    print(report.text(found))
    for write, file in files:
        if file is not None:
            write(found, file)
    return 0


def _attention(args: argparse.Namespace, gpu: bool) -> Any:
    from megatron_ultralong.measure import attention, timing

    return attention.Settings(
        length=_count(args, "length", "128K" if gpu else "1K"),
        cp=_counts(args, "cp"),
        ulysses=_counts(args, "ulysses"),
        heads=_count(args, "heads", "32" if gpu else "8"),
        kv_heads=_count(args, "kv_heads", "8" if gpu else "2"),
        head_dim=_count(args, "head_dim", "128" if gpu else "32"),
        dtype=timing.dtype_of(args.dtype or ("bf16" if gpu else "fp32")),
        documents=None if args.documents is None else _count(args, "documents"),
        error_length=_count(args, "error_length", "4K" if gpu else "512"),
        kernel=args.kernel,
        methods=args.methods.split(",") if args.methods else attention.METHODS,
        repeats=_count(args, "repeats"),
    )


def _loss(args: argparse.Namespace, gpu: bool) -> Any:
    from megatron_ultralong.measure import loss, timing

    return loss.Settings(
        tokens=_count(args, "tokens", "16K" if gpu else "1K"),
        hidden=_count(args, "hidden", "4096" if gpu else "64"),
        vocab=_count(args, "vocab", "128256" if gpu else "2000"),
        chunks=_counts(args, "chunks", "1K,4K,8K" if gpu else "64,256"),
        dtype=timing.dtype_of(args.dtype or ("bf16" if gpu else "fp32")),
        error_tokens=_count(args, "error_tokens", "512" if gpu else "128"),
        repeats=_count(args, "repeats"),
    )


def _step(args: argparse.Namespace, gpu: bool) -> Any:
    from megatron_ultralong.measure import step

    return step.Settings(
        model=step.slice_of(_count(args, "layers", "4"), gpu),
        lengths=_counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        settings=args.settings.split(",") if args.settings else list(step.SETTINGS),
        precision=args.dtype or ("bf16" if gpu else "fp32"),
        layer_chunk=_count(args, "layer_chunk", "16K" if gpu else "128"),
        loss_chunk=_count(args, "loss_chunk", "4K" if gpu else "128"),
        repeats=_count(args, "repeats"),
        optimizer=args.optimizer,
        longest=args.longest,
        granularity=_count(args, "granularity", "4K" if gpu else "32"),
        limit=None if args.limit is None else _bytes(args.limit),
    )


def _generate(args: argparse.Namespace, gpu: bool) -> Any:
    from megatron_ultralong.measure import generation

    return generation.Settings(
        model=generation.shape(gpu),
        lengths=_counts(args, "lengths", "32K,128K" if gpu else "256,512"),
        sequences=_count(args, "sequences"),
        written=_count(args, "written"),
        chunk=_count(args, "read_chunk", "16K" if gpu else "128"),
        precision=args.dtype or ("bf16" if gpu else "fp32"),
        repeats=_count(args, "repeats"),
    )


def _data(args: argparse.Namespace) -> Any:
    import os

    from megatron_ultralong.measure import data_preparation

    workers = _count(args, "workers", str(len(os.sched_getaffinity(0))))
    files = args.input or data_preparation.made_input(args.made, 4 * workers, _count(args, "megabytes"))
    return data_preparation.Settings(
        inputs=tuple(files),
        tokenizer=args.tokenizer,
        workers=workers,
        repeats=_count(args, "repeats"),
        methods=tuple(args.methods.split(",")) if args.methods else (),
    )


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
