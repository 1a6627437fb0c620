"""Search the factors of LongRoPE for a model and a length, by perplexity and without training.

    ultralong search-rope --model models/SmolLM2-135M-Instruct --seq-length 32K --data book.txt --output factors.json
    torchrun ... -m megatron_ultralong train --set rope.type=longrope rope.factors=factors.json ...

The losses measured so far are kept in NAME.losses.jsonl beside --output: the same command resumes a stopped search.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.new_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    add("--seq-length", required=True, metavar="N", help="tokens of a row, like 32K: the length to extend to")
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="long documents (.txt, .jsonl, .parquet) or packed rows",
    )
    add("--output", type=Path, required=True, metavar="FILE.json", help="the factors found, for rope.factors")
    add("--samples", type=int, default=5, help="rows that a candidate is measured on (default: 5)")
    add("--original-length", metavar="N", help="context length before scaling (default: that of config.json)")
    for name, default, text in (
        ("population", 64, "candidates at the start"),
        ("rounds", 40, "rounds"),
        ("mutations", 16, "new candidates of a round by mutation"),
        ("crossovers", 16, "new candidates of a round by crossover"),
        ("parents", 32, "candidates that a round keeps"),
        ("seed", 0, "seed of the search"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = command_line.parse(build_parser(), arguments)

    # Imported here so that --help answers at once.
    import math

    import torch

    from megatron_ultralong.checkpoint.hf.config import read_config
    from megatron_ultralong.command_settings import parse_count
    from megatron_ultralong.errors import UserError
    from megatron_ultralong.evaluate.backends.model_files import fingerprint
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
    from megatron_ultralong.evaluate.tasks import perplexity, rope_search
    from megatron_ultralong.io import atomic_files

    base = read_config(args.model)
    theta, original = base.rope.base()
    settings = rope_search.SearchSettings(
        theta=theta,
        original_length=parse_count(args.original_length, "--original-length")
        if args.original_length
        else original,
        length=parse_count(args.seq_length, "--seq-length"),
        head_dim=base.model.head_dim,
        **{
            name: getattr(args, name)
            for name in ("population", "rounds", "mutations", "crossovers", "parents", "seed")
        },
    )
    if base.rope.depends_on_length():
        raise UserError(f"--model {args.model}: its RoPE depends on the length ({base.rope.describe()})")
    if args.samples < 1:
        raise UserError("--samples must be at least 1")
    atomic_files.check_writable(args.output.parent, f"--output {args.output}")
    backend = TransformersModel(args.model, device=args.device)
    rows: list[list[int]] = []
    for ids, _ in perplexity.read_rows(args.data, backend.tokenizer):
        if len(ids) > settings.length and len(rows) < args.samples:
            rows.append(ids[: settings.length + 1].tolist())
    if len(rows) < args.samples:
        raise UserError(
            f"--data: only {len(rows)} documents have more than {settings.length} tokens; give longer ones, or "
            f"--samples {max(1, len(rows))}"
        )
    rotary = backend.model.model.rotary_emb

    def loss(factors: rope_search.Factors) -> float:
        frequencies, rotary.attention_scaling = settings.rope(factors).inverse_frequencies(
            settings.head_dim, settings.length
        )
        rotary.inv_freq.copy_(frequencies)
        total = sum(backend.token_nll(row).double().sum() for row in rows)
        return float(total) / (len(rows) * settings.length)

    kept = rope_search.Losses(
        args.output.with_name(f"{args.output.stem}.losses.jsonl"),
        {
            "model": fingerprint(args.model),
            "data": perplexity.file_sizes(args.data),
            "rows": args.samples,
            "length": settings.length,
            "original_length": settings.original_length,
        },
    )
    if len(kept):
        print(f"resumes with {len(kept)} measured candidates")

    def measure(factors: rope_search.Factors) -> float:
        return kept.measure(factors, loss)

    with torch.inference_mode():
        for name, factors in rope_search.starting_points(settings).items():
            print(f"perplexity with the factors of {name}: {math.exp(measure(factors)):.4f}")
        best = rope_search.search(
            settings,
            measure,
            lambda number, best: print(
                f"round {number}/{settings.rounds}: best perplexity {math.exp(best.nll):.4f}", flush=True
            ),
        )
    kept.close()
    atomic_files.write_json(args.output, list(best.factors), what=f"--output {args.output}")
    print(f"factors for {settings.length} tokens (factor {settings.factor:g}): {args.output}")
