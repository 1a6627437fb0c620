#!/usr/bin/env python
"""Evaluate a model. One subcommand a benchmark; results go to --out as JSON, with a plot.

    python tools/evaluate.py niah --model DIR --lengths 512,1K,4K --depths 0,25,50,75,100 --trials 8 --out results/niah
    python tools/evaluate.py ruler --model DIR --lengths 4K,8K,16K --samples 50 --out results/ruler
    python tools/evaluate.py compare --results a/niah.json b/niah.json --out both.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.config import UserError, parse_count
from megatron_ultralong.evaluate import niah, plots, results, ruler
from megatron_ultralong.evaluate.ruler_tasks import TASKS
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
    task.add_argument("--needles", type=int, default=1, metavar="N",
                      help="pass keys in a prompt, all asked for, spread evenly from the depth on; the score is the share found (default: 1)")
    task.set_defaults(function=run_niah)
    add_ruler(tasks, shared)

    task = tasks.add_parser("compare", help="several niah.json as heat maps side by side", description="Passkey grids side by side in one plot.")
    task.add_argument("--results", type=Path, nargs="+", required=True, metavar="FILE", help="niah.json of each model")
    task.add_argument("--titles", nargs="+", metavar="TEXT", help="one a file (default: the model's directory)")
    task.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the plot")
    task.set_defaults(function=run_compare)
    return parser.parse_args()


def add_ruler(tasks: argparse._SubParsersAction, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser(
        "ruler", parents=[shared], help="RULER: 13 synthetic tasks at lengths from 4K to 4M",
        description="RULER in three stages. Each writes files under --out and goes on where it was stopped: data/TASK/LENGTH.jsonl, "
                    "predictions/TASK/LENGTH.jsonl, ruler.json.")
    task.add_argument("--tasks", default="all", metavar="T,T,...", help=f"all, or some of {', '.join(TASKS)}")
    task.add_argument("--lengths", required=True, metavar="N,N,...", help="tokens of prompt and answer together, like 4K,128K,1M")
    task.add_argument("--samples", type=int, default=ruler.OFFICIAL_SAMPLES, metavar="N",
                      help="prompts for each task and length (default: %(default)s, as the authors)")
    task.add_argument("--haystack", type=Path, nargs="+", default=[], metavar="FILE",
                      help="text of the tasks with an essay; the authors use Paul Graham's essays (default: own filler sentences)")
    task.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's dev-v2.0.json, for qa_1 (default: qa_1 is left out)")
    task.add_argument("--hotpotqa", type=Path, metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2 (default: qa_2 is left out)")
    task.add_argument("--official", type=Path, metavar="DIR", help="checkout of NVIDIA/RULER: take its wording (default: this project's own)")
    task.add_argument("--data", type=Path, metavar="DIR", help="prompts made before, here or by NVIDIA/RULER (LENGTH/data/TASK/validation.jsonl); "
                                                              "nothing is prepared")
    task.add_argument("--stage", choices=("prepare", "predict", "score"), help="only this one (default: all three)")
    task.set_defaults(function=run_ruler)


def run_niah(args: argparse.Namespace) -> None:
    grid = niah.Grid(lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")), depths=_depths(args.depths),
                     trials=args.trials, digits=args.digits, needles=args.needles, chat=args.chat, seed=args.seed, answer_tokens=args.answer_tokens)
    backend = _backend(args)

    from tqdm import tqdm

    with tqdm(total=len(grid.lengths) * len(grid.depths) * grid.trials, desc="niah", unit="prompt", disable=None) as bar:
        result = niah.run(backend, grid, haystack=args.haystack, batch=args.batch, progress=bar.update)
    results.write_json(args.out / "niah.json", result)
    plots.heat_maps([result], [f"{result['model']['path']}, {len(result['trials'])} prompts"], args.out / "niah.png",
                    trained=[backend.max_position])
    print(results.grid_table(result))
    print(f"{args.out / 'niah.json'} and niah.png written; {result['accuracy']:.1%} of {len(result['trials']) * grid.needles} pass keys found, "
          f"{result['seconds']:.0f} s")


def run_ruler(args: argparse.Namespace) -> None:
    settings = ruler.Settings(
        out=args.out, tasks=tuple(TASKS) if args.tasks == "all" else tuple(text.strip() for text in args.tasks.split(",")),
        lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")), samples=args.samples, seed=args.seed,
        chat=args.chat, haystack=tuple(args.haystack), squad=args.squad, hotpotqa=args.hotpotqa, official=args.official, data=args.data)
    stages = [args.stage] if args.stage else ["predict", "score"] if args.data else ["prepare", "predict", "score"]
    for task in settings.tasks:
        if task not in settings.runnable():
            print(f"{task} is left out: give --{TASKS[task].data} FILE")
    if not settings.runnable():
        raise UserError("--tasks: nothing is left to do")
    results.make_writable(args.out)

    from tqdm import tqdm

    total = len(settings.runnable()) * len(settings.lengths) * settings.samples
    if "prepare" in stages:
        from megatron_ultralong.evaluate.backends import load_tokenizer

        with tqdm(total=total, desc="prepare", unit="prompt", disable=None) as bar:
            ruler.prepare(settings, load_tokenizer(args.model), bar.update)
    if "predict" in stages:
        backend = _backend(args)
        with tqdm(total=total, desc="predict", unit="prompt", disable=None) as bar:
            ruler.predict(settings, backend, bar.update)
    if "score" in stages:
        result = ruler.score(settings)
        results.write_json(args.out / "ruler.json", result)
        print(ruler.report(result))
        print(f"{args.out / 'ruler.json'} written")


def run_compare(args: argparse.Namespace) -> None:
    found = [results.read_json(path) for path in args.results]
    for path, result in zip(args.results, found, strict=True):
        if result.get("task") != "niah":
            raise UserError(f"{path}: no passkey results; give files that `niah` wrote")
    titles = args.titles or [str(result["model"]["path"]) for result in found]
    if len(titles) != len(found):
        raise UserError(f"--titles: {len(found)} files need {len(found)} titles, not {len(titles)}")
    plots.heat_maps(found, titles, args.out, trained=[result["model"].get("max_position") for result in found])
    print(f"{args.out} written")


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
