#!/usr/bin/env python
"""Evaluate a model. One subcommand a benchmark; results go to --out as JSON, with a plot.

    python tools/evaluate.py niah --model DIR --lengths 512,1K,4K --depths 0,25,50,75,100 --trials 8 --out results/niah
    python tools/evaluate.py standard --model DIR --tasks paper --run-code --out results/standard
    python tools/evaluate.py perplexity --model DIR --data books.jsonl --lengths 4K,32K --out results/perplexity
    python tools/evaluate.py report --results results --out results/report
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.config import UserError, parse_count
from megatron_ultralong.evaluate import curves, niah, plots, report, results, standard
from megatron_ultralong.runtime import errors


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    shared.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    shared.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
                        help="weights and activations (default: as stored, but fp32 on a CPU)")
    shared.add_argument("--batch", type=int, metavar="N", help="prompts at a time (default: as many as make 16K tokens)")
    shared.add_argument("--chat", default="auto", choices=("auto", "yes", "no"), help="use the chat template (default: where there is one)")
    shared.add_argument("--seed", type=int, default=0)

    task = tasks.add_parser("niah", parents=[shared], help="passkey retrieval: a grid of lengths and depths",
                            description="Passkey retrieval: one fact hidden in a long text, at every length and depth.")
    task.add_argument("--lengths", required=True, metavar="N,N,...", help="tokens of prompt and answer together, like 512,4K,1M")
    task.add_argument("--depths", default="0,25,50,75,100", metavar="P,P,... or N",
                      help="percent of the text before the needle, or one number: so many, evenly spaced (default: %(default)s)")
    task.add_argument("--trials", type=int, default=10, metavar="N", help="prompts for each length and depth (default: %(default)s)")
    task.add_argument("--digits", type=int, default=5, metavar="N", help="digits of a pass key (default: %(default)s)")
    task.add_argument("--haystack", type=Path, metavar="FILE", help="text to hide the needle in (default: own filler sentences)")
    task.add_argument("--answer-tokens", type=int, metavar="N", help="tokens to generate (default: what the answer takes; 24 in a chat)")
    task.set_defaults(function=run_niah)
    add_standard(tasks, shared)
    add_perplexity(tasks)
    add_report(tasks)
    return parser.parse_args()


def add_standard(tasks, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser("standard", parents=[shared], help="MMLU, MMLU-Pro, MATH, GSM8K, HumanEval, and any task of lm-evaluation-harness",
                            description="Tasks of lm-evaluation-harness; `paper` is the five of arXiv 2504.06214 by its protocol.")
    task.add_argument("--tasks", default="paper", metavar="NAME,NAME,...",
                      help="paper; one of its five: paper/mmlu, paper/mmlu_pro, paper/math, paper/gsm8k, paper/humaneval; or names of the harness "
                           "(default: %(default)s)")
    task.add_argument("--limit", type=int, metavar="N", help="questions of each task, the first N (default: all)")
    task.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    task.add_argument("--run-code", action="store_true", help="run the programs that the model writes for HumanEval, in limited processes")
    task.set_defaults(function=run_standard)


def add_perplexity(tasks) -> None:
    task = tasks.add_parser("perplexity", help="perplexity by position over long sequences",
                            description="Perplexity by position: of documents' beginnings, or of packed rows.")
    task.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    task.add_argument("--data", nargs="+", required=True, metavar="FILE or PREFIX", help="documents (.txt, .jsonl, .parquet) or packed rows")
    task.add_argument("--lengths", required=True, metavar="N,N,...", help="tokens of a row, like 4K,32K; documents that are shorter are passed over")
    task.add_argument("--rows", type=int, default=32, metavar="N", help="rows of each length, the first long enough (default: %(default)s)")
    task.add_argument("--text-key", default="text", metavar="NAME", help="field or column with the text (default: %(default)s)")
    task.add_argument("--beside", nargs="+", type=Path, default=[], metavar="FILE", help="perplexity.json of other models, drawn in the same figure")
    task.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    task.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    task.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
                      help="weights and activations (default: as stored, but fp32 on a CPU)")
    task.set_defaults(function=run_perplexity)


def add_report(tasks) -> None:
    task = tasks.add_parser("report", help="tables of several models' results beside the published figures",
                            description="Collects results (niah, ruler, lveval, infinitebench, standard, perplexity) into the paper's tables.")
    task.add_argument("--results", nargs="+", required=True, metavar="[NAME=]PATH",
                      help="result files, or directories that are searched for *.json; NAME is what tables call the models there")
    task.add_argument("--no-published", action="store_true", help="leave the published figures out")
    task.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report.md, the .csv files and the plots go")
    task.set_defaults(function=run_report)


def run_niah(args: argparse.Namespace) -> None:
    grid = niah.Grid(lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")), depths=_depths(args.depths),
                     trials=args.trials, digits=args.digits, chat=args.chat, seed=args.seed, answer_tokens=args.answer_tokens)
    backend = _backend(args)

    from tqdm import tqdm

    with tqdm(total=len(grid.lengths) * len(grid.depths) * grid.trials, desc="niah", unit="prompt", disable=None) as bar:
        result = niah.run(backend, grid, haystack=args.haystack, batch=args.batch, progress=bar.update)
    results.write_json(args.out / "niah.json", result)
    plots.heat_maps([result], [f"{result['model']['path']}, {len(result['trials'])} prompts"], args.out / "niah.png",
                    trained=[backend.max_position])
    print(results.grid_table(result))
    print(f"{args.out / 'niah.json'} and niah.png written; {result['accuracy']:.1%} of {len(result['trials'])} prompts correct, "
          f"{result['seconds']:.0f} s")


def run_standard(args: argparse.Namespace) -> None:
    settings = standard.Settings(tasks=tuple(name.strip() for name in args.tasks.split(",")), limit=args.limit, include_path=args.include_path,
                                 chat=args.chat, run_code=args.run_code)
    settings.names()  # a mistake there is told before the model is read
    result, samples = standard.run(_backend(args), settings, args.out)
    results.write_json(args.out / "standard.json", result)
    results.write_lines(args.out / "standard_samples.jsonl", samples)
    print(standard.table(result))
    print(f"{args.out / 'standard.json'} and standard_samples.jsonl written; {sum(result['questions'].values())} questions, {result['seconds']:.0f} s")


def run_perplexity(args: argparse.Namespace) -> None:
    from megatron_ultralong.evaluate import perplexity

    settings = perplexity.Settings(lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")), rows=args.rows,
                                   text_key=args.text_key)
    beside = [results.read_json(path) for path in args.beside]
    results.make_writable(args.out)
    from tqdm import tqdm

    from megatron_ultralong.evaluate.backends import HuggingFace

    backend = HuggingFace(args.model, device=args.device, dtype=args.dtype)
    with tqdm(total=len(settings.lengths) * settings.rows, desc="perplexity", unit="row", disable=None) as bar:
        result = perplexity.measure(backend, perplexity.read(args.data, backend.tokenizer, args.text_key), settings, bar.update)
    results.write_json(args.out / "perplexity.json", result)
    curves.by_position([result, *beside], args.out / "perplexity.png")
    print(perplexity.table(result))
    print(f"{args.out / 'perplexity.json'} and perplexity.png written, {result['seconds']:.0f} s")


def run_report(args: argparse.Namespace) -> None:
    results.make_writable(args.out)
    lines = report.write(args.results, args.out, with_published=not args.no_published)
    print("\n".join(lines))


def _backend(args: argparse.Namespace):
    """The model, once the output is known to be writable. Imported here so that --help and mistakes answer at once."""
    if args.batch is not None and args.batch < 1:
        raise UserError("--batch must be at least 1")
    results.make_writable(args.out)
    from megatron_ultralong.evaluate.backends import HuggingFace

    return HuggingFace(args.model, device=args.device, dtype=args.dtype)


def _depths(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--depths {text}: expected percents like 0,50,100, or one whole number of depths") from None
    if len(values) > 1:
        return tuple(values)
    count = values[0]
    if count != int(count) or count < 1:
        raise UserError(f"--depths {text}: one number means so many depths, evenly spaced; it must be a whole number from 1 on")
    return tuple(round(100 * i / (count - 1), 2) for i in range(int(count))) if count > 1 else (50.0,)


def main() -> None:
    args = arguments()
    args.function(args)


if __name__ == "__main__":
    errors.main(main)
