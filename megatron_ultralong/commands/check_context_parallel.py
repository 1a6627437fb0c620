"""Check what each token of a layout sees: change one token, and list which outputs change.

ultralong check-context-parallel --document-count 6
torchrun --nproc-per-node 8 -m megatron_ultralong check-context-parallel --recipe ultralong_1m --load-hf DIR \\
    --set train.seq_length=64K parallel.tp=1 parallel.cp=8 --document-count 40

The exit code is 1 if an output changed that must not (attention crosses documents, or sees later tokens), or
if outputs of a rank do not see a token that they should.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

from megatron_ultralong import command_line, recipes
from megatron_ultralong.command_settings import override, parse_count
from megatron_ultralong.errors import UserError

LEAST = {"fp32": 0.99, "bf16": 0.5}
"""Share of a rank's later tokens whose output must change: a change may round away, above all in bf16."""


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    parser.add_argument(
        "--recipe", default="tiny", help="recipe whose layout and model are checked (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings of the recipe",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--load-hf", type=Path, metavar="DIR", help="the model of a Hugging Face directory")
    start.add_argument("--load", type=Path, metavar="CKPT", help="the model of a checkpoint")
    parser.add_argument(
        "--document-count",
        type=int,
        default=5,
        metavar="N",
        help="documents of random lengths in the row, which attention stays inside; 1 = the whole row (default: 5)",
    )
    parser.add_argument("--probes", default="8", metavar="N", help="tokens that are changed (default: 8)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the row and of the tokens that are changed (default: 0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(build_parser(), arguments)
    run = recipes.get(args.recipe)
    masked = ["data.documents=masked"] if args.document_count > 1 else []
    run = override(run, ["train.micro_batch=1", *masked, *args.set])
    length = run.train.seq_length
    args.probes = parse_count(args.probes, "--probes")
    for name, most in (("document-count", length), ("probes", length)):
        value = getattr(args, name.replace("-", "_"))
        if not 1 <= value <= most:
            raise UserError(f"--{name} {value}: must be at least 1 and at most {most}")
    choose = random.Random(args.seed)
    starts = [0, *sorted(choose.sample(range(1, length), args.document_count - 1))]
    # The first and last token, those at a border of documents, and any.
    edges = sorted({0, length - 1, *(at for start in starts[1:] for at in (start - 1, start))})
    positions = sorted(choose.sample(edges, min(len(edges), (args.probes + 1) // 2)))
    others = sorted(set(range(length)) - set(positions))
    positions = sorted({*positions, *choose.sample(others, args.probes - len(positions))})

    # Imported here so that --help and wrong settings are answered at once.
    from megatron_ultralong.train import perturbation
    from megatron_ultralong.train.run import model_alone, ranks_per_node

    with model_alone(run, args.load, args.load_hf) as trainer:
        ranks, precision = trainer.ranks, run.train.precision
        probes = perturbation.probe(trainer, starts, positions, args.seed, ranks_per_node(run))
        faults = [fault for one in probes for fault in one.faults(LEAST[precision])]
        if ranks.is_main:
            p = run.parallel
            print(
                f"{length:,} tokens in {len(starts)} document{'s' * (len(starts) > 1)}, {precision}, TP {p.tp} x PP "
                f"{p.pp} x CP {p.cp} (Ulysses {p.ulysses}) on {ranks.world} ranks"
            )
            for one in probes:
                changed, later = sum(one.changed.values()), sum(one.later.values())
                print(
                    f"token {one.position:>8} of rank {one.rank}, in {one.document[0]} to {one.document[1] - 1}: "
                    f"{changed} of {later} outputs that see it changed, {len(one.elsewhere)} others"
                )
            print(
                "\n".join(f"fault: {fault}" for fault in faults) or "every token is seen where it should be"
            )
            if args.json is not None:
                values = {
                    "starts": starts,
                    "probes": [dataclasses.asdict(one) for one in probes],
                    "faults": faults,
                }
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(values, indent=2) + "\n")
    return 1 if faults else 0
