"""Convert a Hugging Face Llama directory to a sharded checkpoint and back, or to one of Megatron-LM; compare
the two, or verify a checkpoint's files.

ultralong convert import --load-hf Llama-3.1-8B-Instruct --output runs/base
ultralong convert export --load runs/1m --output Llama-3.1-8B-1M
torchrun --nproc-per-node 8 -m megatron_ultralong convert verify --load-hf Llama-3.1-8B-Instruct --load runs/base
ultralong convert check --load runs/1m
ultralong convert export-megatron --load-hf Llama-3.1-8B-1M --output megatron/Llama-3.1-8B-1M
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line

COMMANDS = {
    "import": "convert a Hugging Face directory to a sharded checkpoint (training can also read the directory in place)",
    "export": "convert a sharded checkpoint to a Hugging Face directory",
    "export-megatron": "convert a Hugging Face directory to a checkpoint for Megatron-LM's pretrain_gpt.py --load (torch_dist)",
    "verify": "compare all weights bit by bit; lists the tensors that differ and exits with code 1",
    "check": "read all files of a checkpoint and compare them with its checksums; exits with code 1 where one is damaged",
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for name in ("import", "export-megatron", "verify"):
        add[name].add_argument(
            "--load-hf", type=Path, required=True, metavar="DIR", help="Hugging Face Llama directory"
        )
    for name in ("export", "verify"):
        add[name].add_argument(
            "--load", type=Path, required=True, help="run directory (its newest iteration) or one iteration"
        )
    add["check"].add_argument(
        "--load", type=Path, required=True, help="run directory (all of its iterations) or one iteration"
    )
    add["import"].add_argument("--output", type=Path, required=True, metavar="CKPT", help="new run directory")
    add["export"].add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new Hugging Face directory"
    )
    add["export-megatron"].add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new directory for Megatron-LM's --load"
    )
    add["export-megatron"].add_argument(
        "--target-tp",
        type=int,
        default=1,
        metavar="N",
        help="tensor parallel ranks of Megatron-LM: the vocabulary is padded to a multiple of 128 x N (default: 1)",
    )
    add["export"].add_argument(
        "--clex-scale",
        type=float,
        metavar="T",
        help="with rope.type=clex: scale at which the frequencies are frozen, for T x original_length tokens "
        "(default: the largest trained)",
    )
    add["export"].add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="with lora.rank: Hugging Face directory of the model that the adapters are merged with",
    )
    add["export"].add_argument(
        "--adapter", action="store_true", help="with lora.rank: write the adapters alone, as PEFT reads them"
    )
    for name in ("import", "export", "export-megatron"):
        add[name].add_argument(
            "--dtype",
            choices=("bf16", "fp16", "fp32"),
            help="dtype of the weights written (default: each as it is stored)",
        )
    for name in ("import", "export", "export-megatron", "verify"):
        add[name].add_argument(
            "--tp", type=int, help="tensor parallel ranks of the conversion, independent of the checkpoint's"
        )
        add[name].add_argument(
            "--pp", type=int, help="pipeline parallel ranks; tp x pp = ranks started (default: both chosen)"
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help is answered at once.
    from megatron_ultralong.checkpoint import convert, run_directory
    from megatron_ultralong.checkpoint.hf import dtypes
    from megatron_ultralong.checkpoint.hf.config import read_config
    from megatron_ultralong.checkpoint.hf.writer import check_output
    from megatron_ultralong.checkpoint.megatron_lm import bridge
    from megatron_ultralong.checkpoint.megatron_lm.export import export_megatron

    if args.command == "check":
        return _check(args.load)
    if args.command in ("export", "export-megatron"):
        check_output(args.output)
    if args.command == "export":
        model = bridge.read_state(run_directory.resolve(args.load)).model
    else:
        model = read_config(args.load_hf).model
    with convert.started(model, args.tp, args.pp) as (ranks, parallel):
        different: list[str] = []
        if args.command == "verify":
            different = convert.verify(args.load_hf, args.load, ranks, parallel)
            lines = [f"differs: {line}" for line in different]
            lines = lines or [f"identical: all weights of {args.load_hf} and {args.load}"]
        elif args.command == "import":
            dtype = dtypes.DTYPES.get(args.dtype)
            lines = [f"wrote {convert.import_hf(args.load_hf, args.output, ranks, parallel, dtype)}"]
        elif args.command == "export-megatron":
            dtype = dtypes.DTYPES.get(args.dtype)
            out, notes = export_megatron(args.load_hf, args.output, ranks, parallel, args.target_tp, dtype)
            lines = [f"wrote {out}", *(f"note: {line}" for line in notes)]
        elif args.adapter:
            out, notes = convert.export_adapter(args.load, args.output, args.base and str(args.base))
            lines = [f"wrote {out}", *(f"note: {line}" for line in notes)]
        else:
            dtype = dtypes.DTYPES.get(args.dtype)
            out, notes = convert.export_hf(
                args.load,
                args.output,
                ranks,
                parallel,
                dtype,
                clex_scale=args.clex_scale,
                base_model=args.base,
            )
            lines = [f"wrote {out}", *(f"note: {line}" for line in notes)]
        if ranks.is_main:
            print("\n".join(lines), flush=True)
    return 1 if different else 0


def _check(place: Path) -> int:
    """Print a line for each checkpoint; 1 where one is damaged."""
    from megatron_ultralong.checkpoint import integrity, run_directory
    from megatron_ultralong.config import Parallel, Runtime
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    damaged = False
    for checkpoint in run_directory.all_of(place):
        fault = integrity.fault_on_all_ranks(checkpoint)
        damaged = damaged or fault is not None
        if ranks.is_main:
            print(f"{checkpoint}: {integrity.summary(checkpoint) if fault is None else f'damaged: {fault}'}")
    launch.stop()
    return int(damaged)
