#!/usr/bin/env python
"""Evaluate a model. One subcommand a benchmark; results go to --out as JSON, with a plot.

    python tools/evaluate.py niah --model DIR --lengths 512,1K,4K --depths 0,25,50,75,100 --trials 8 --out results/niah
    torchrun --nproc-per-node 8 tools/evaluate.py niah --ckpt CKPT --tp 4 --cp 2 --lengths 128K,1M --out results/niah
    python tools/evaluate.py niah --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR --lengths 128K --out results/niah
    python tools/evaluate.py ruler --model DIR --lengths 4K,8K,16K --samples 50 --out results/ruler
    python tools/evaluate.py lveval --model DIR --data LVEval --lengths 16k,32k --official checkouts/LVEval --out results/lveval
    python tools/evaluate.py infinitebench --model DIR --data hub --tasks passkey,longbook_qa_eng --out results/infinitebench
    python tools/evaluate.py standard --model DIR --tasks paper --run-code --out results/standard
    torchrun --nproc-per-node 8 tools/evaluate.py perplexity --ckpt CKPT --data books.jsonl --lengths 4K,1M --out results/perplexity
    python tools/evaluate.py report --results results --out results/report
    python tools/evaluate.py compare --results a/niah.json b/niah.json --out both.png

The model is a Hugging Face directory in plain transformers, our own model over many ranks (a checkpoint, or a Hugging Face directory read in
place), or one behind an OpenAI-compatible endpoint. A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.pipeline import results, stages
from megatron_ultralong.evaluate.report import curves, heat_map
from megatron_ultralong.evaluate.report import tables as report_tables
from megatron_ultralong.evaluate.tasks import infinitebench, lveval, niah
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS
from megatron_ultralong.evaluate.tasks.standard import run as standard
from megatron_ultralong.runtime import cli


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    shared = argparse.ArgumentParser(add_help=False)
    options.add_model_arguments(shared)
    shared.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    shared.add_argument(
        "--seed", type=int, default=0, help="of prompts, and of sampling (default: %(default)s)"
    )

    task = tasks.add_parser(
        "niah",
        parents=[shared],
        help="passkey retrieval: a grid of lengths and depths",
        description="Passkey retrieval: one fact hidden in a long text, at every length and depth.",
    )
    task.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of prompt and answer together, like 512,4K,1M",
    )
    task.add_argument(
        "--depths",
        default="0,25,50,75,100",
        metavar="P,P,... or N",
        help="percent of the text before the needle, or one number: so many, evenly spaced (default: %(default)s)",
    )
    task.add_argument(
        "--trials",
        type=int,
        default=10,
        metavar="N",
        help="prompts for each length and depth (default: %(default)s)",
    )
    task.add_argument(
        "--digits", type=int, default=5, metavar="N", help="digits of a pass key (default: %(default)s)"
    )
    task.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="text to hide the needle in (default: own filler sentences)",
    )
    task.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="tokens to generate (default: what the answer takes; 24 in a chat)",
    )
    task.add_argument(
        "--needles",
        type=int,
        default=1,
        metavar="N",
        help="pass keys in a prompt, all asked for, spread evenly from the depth on; the score is the share found (default: 1)",
    )
    task.set_defaults(function=run_niah)

    add_ruler(tasks, shared)
    add_lveval(tasks, shared)
    add_infinitebench(tasks, shared)
    add_standard(tasks, shared)
    add_perplexity(tasks)
    add_report(tasks)

    task = tasks.add_parser(
        "compare",
        help="several niah.json as heat maps side by side",
        description="Passkey grids side by side in one plot.",
    )
    task.add_argument(
        "--results", type=Path, nargs="+", required=True, metavar="FILE", help="niah.json of each model"
    )
    task.add_argument("--titles", nargs="+", metavar="TEXT", help="one a file (default: the model's name)")
    task.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the plot")
    task.set_defaults(function=run_compare)
    return parser.parse_args()


def add_ruler(tasks: argparse._SubParsersAction, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser(
        "ruler",
        parents=[shared],
        help="RULER: 13 synthetic tasks at lengths from 4K to 4M",
        description="RULER in three stages. Each writes files under --out and goes on where it was stopped: data/TASK/LENGTH.jsonl, "
        "predictions/TASK/LENGTH.jsonl, ruler.json.",
    )
    task.add_argument("--tasks", default="all", metavar="T,T,...", help=f"all, or some of {', '.join(TASKS)}")
    task.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of prompt and answer together, like 4K,128K,1M",
    )
    task.add_argument(
        "--samples",
        type=int,
        default=ruler.OFFICIAL_SAMPLES,
        metavar="N",
        help="prompts for each task and length (default: %(default)s, as the authors)",
    )
    task.add_argument(
        "--haystack",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text of the tasks with an essay; the authors use Paul Graham's essays (default: own filler sentences)",
    )
    task.add_argument(
        "--squad",
        type=Path,
        metavar="FILE",
        help="SQuAD's dev-v2.0.json, for qa_1 (default: qa_1 is left out)",
    )
    task.add_argument(
        "--hotpotqa",
        type=Path,
        metavar="FILE",
        help="hotpot_dev_distractor_v1.json, for qa_2 (default: qa_2 is left out)",
    )
    words = task.add_mutually_exclusive_group()
    words.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="checkout of NVIDIA/RULER: take its wording (default: the official one where "
        "lm-evaluation-harness is installed, which has it, else this project's own)",
    )
    words.add_argument("--own-words", action="store_true", help="this project's own wording")
    task.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prompts made before, here or by NVIDIA/RULER (LENGTH/data/TASK/validation.jsonl); "
        "nothing is prepared",
    )
    task.add_argument(
        "--stage", choices=("prepare", "predict", "score"), help="only this one (default: all three)"
    )
    task.set_defaults(function=run_ruler)


def run_niah(args: argparse.Namespace) -> None:
    grid = niah.Grid(
        lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")),
        depths=_depths(args.depths),
        trials=args.trials,
        digits=args.digits,
        needles=args.needles,
        chat=args.chat,
        seed=args.seed,
        answer_tokens=args.answer_tokens,
    )
    results.make_writable(args.out)

    from tqdm import tqdm

    with (
        options.open_backend(args) as backend,
        tqdm(
            total=len(grid.lengths) * len(grid.depths) * grid.trials, desc="niah", unit="prompt", disable=None
        ) as bar,
    ):
        result = niah.run(
            backend,
            grid,
            haystack=args.haystack,
            batch=args.batch or (64 if args.base_url else None),
            answers=args.out / "niah.predictions.jsonl",
            progress=bar.update,
        )
    results.write_json(args.out / "niah.json", result)
    heat_map.heat_maps(
        [result],
        [f"{result['model']['path']}, {len(result['trials'])} prompts"],
        args.out / "niah.png",
        trained=[result["model"]["max_position"]],
    )
    print(results.grid_table(result))
    print(
        f"{args.out / 'niah.json'} and niah.png written; {result['accuracy']:.1%} of {len(result['trials']) * grid.needles} pass keys found, "
        f"{result['seconds']:.0f} s"
    )


def run_ruler(args: argparse.Namespace) -> None:
    settings = ruler.Settings(
        out=args.out,
        tasks=tuple(TASKS) if args.tasks == "all" else tuple(text.strip() for text in args.tasks.split(",")),
        lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")),
        samples=args.samples,
        seed=args.seed,
        chat=args.chat,
        haystack=tuple(args.haystack),
        squad=args.squad,
        hotpotqa=args.hotpotqa,
        official=args.official,
        own_words=args.own_words,
        data=args.data,
    )
    stages = (
        [args.stage] if args.stage else ["predict", "score"] if args.data else ["prepare", "predict", "score"]
    )
    for task in settings.tasks:
        if task not in settings.runnable():
            print(f"{task} is left out: give --{TASKS[task].data} FILE")
    if not settings.runnable():
        raise UserError("--tasks: nothing is left to do")
    results.make_writable(args.out)

    from tqdm import tqdm

    total = len(settings.runnable()) * len(settings.lengths) * settings.samples
    # With several ranks only the first one comes into the block, and does all that is not the model's work.
    with options.open_backend(args) if "predict" in stages else options.no_backend() as backend:
        if "prepare" in stages:
            tokenizer = backend.tokenizer if backend is not None else options.load_tokenizer(args)
            with tqdm(total=total, desc="prepare", unit="prompt", disable=None) as bar:
                ruler.prepare(settings, tokenizer, bar.update)
        if backend is not None:
            with tqdm(total=total, desc="predict", unit="prompt", disable=None) as bar:
                ruler.predict(
                    settings,
                    backend,
                    batch=args.batch or (64 if args.base_url else None),
                    progress=bar.update,
                )
    if "score" in stages:
        result = ruler.score(settings)
        results.write_json(args.out / "ruler.json", result)
        print(ruler.report(result))
        print(f"{args.out / 'ruler.json'} written")


def run_compare(args: argparse.Namespace) -> None:
    found = [_read_checked(path, heat_map.check) for path in args.results]
    titles = args.titles or curves.labels(found)
    if len(titles) != len(found):
        raise UserError(f"--titles: {len(found)} files need {len(found)} titles, not {len(titles)}")
    heat_map.heat_maps(
        found, titles, args.out, trained=[(result.get("model") or {}).get("max_position") for result in found]
    )
    print(f"{args.out} written")


def _read_checked(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Results that can be drawn; UserError where they are none."""
    result = results.read_json(path)
    try:
        check(result)
    except ValueError as error:
        raise UserError(f"{path} {error}") from None
    return result


# ---- LV-Eval and InfiniteBench -----------------------------------------------------------------


def add_lveval(tasks: Any, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser(
        "lveval",
        parents=[shared],
        help="LV-Eval: questions about long mixed passages, 16k to 256k words",
        description="LV-Eval, from its official files: 11 sets, 5 lengths, F1 that needs the answer's keywords.",
    )
    _add_staged(task, "LV-Eval's", "SET_LENGTH.jsonl or SET.zip")
    task.add_argument(
        "--sets", metavar="SET,SET,...", help=f"of {', '.join(lveval.SETS)} (default: those in --data)"
    )
    task.add_argument(
        "--lengths", metavar="N,N,...", help=f"of {', '.join(lveval.LEVELS)} (default: those in --data)"
    )
    task.set_defaults(function=run_lveval)


def run_lveval(args: argparse.Namespace) -> None:
    choice = lveval.Choice(
        sets=stages.names(args.sets, lveval.SETS),
        levels=stages.names(args.lengths and args.lengths.lower(), lveval.LEVELS),
        limit=args.limit,
        official=args.official,
    )
    _run_staged(args, "lveval", choice, lveval)


def add_infinitebench(tasks: Any, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser(
        "infinitebench",
        parents=[shared],
        help="InfiniteBench: 12 tasks on contexts of 100K tokens and more",
        description="InfiniteBench, from its official files: 12 tasks, each with its own rule.",
    )
    _add_staged(task, "InfiniteBench's", "TASK.jsonl")
    task.add_argument(
        "--tasks",
        metavar="TASK,TASK,...",
        help=f"of {', '.join(infinitebench.TASKS)} (default: those in --data)",
    )
    task.set_defaults(function=run_infinitebench)


def run_infinitebench(args: argparse.Namespace) -> None:
    choice = infinitebench.Choice(
        tasks=stages.names(args.tasks, infinitebench.TASKS), limit=args.limit, official=args.official
    )
    _run_staged(args, "infinitebench", choice, infinitebench)


def _add_staged(task: argparse.ArgumentParser, whose: str, names: str) -> None:
    task.add_argument(
        "--data",
        metavar="DIR",
        help=f"{whose} files ({names}), or hub = download them; needed by the stage prepare",
    )
    task.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help=f"a checkout of {whose} repository: prompts in its words (default: our own words)",
    )
    task.add_argument(
        "--limit", type=int, metavar="N", help="only the first N questions of each (default: all)"
    )
    task.add_argument(
        "--max-length",
        metavar="N",
        help="tokens of prompt and answer together; of longer prompts the middle is left out "
        "(default: the positions of the model's config; an endpoint does not say them, and then nothing is cut)",
    )
    task.add_argument(
        "--stage",
        default="all",
        choices=("all", *stages.STAGES),
        help="write the prompts, answer them, score the answers; each from "
        "the files in --out that the one before left (default: all; what is done already is not done again)",
    )


def _run_staged(args: argparse.Namespace, name: str, choice: Any, benchmark: Any) -> None:
    from tqdm import tqdm

    max_length = parse_count(args.max_length, "--max-length") if args.max_length else None
    results.make_writable(args.out)
    prepares = args.stage in ("all", "prepare")
    if prepares:
        if args.data is None:
            raise UserError(
                "--data DIR is needed, or --stage predict or score to go on from what is in --out"
            )
        benchmark.find_files(args.data, choice)  # a wrong folder is told before a model is loaded
    # With several ranks only the first one comes into the block, and does all that is not the model's work.
    with options.open_backend(args) if args.stage in ("all", "predict") else options.no_backend() as backend:
        if prepares:
            with tqdm(desc=f"{name}: prepare", unit="prompt", disable=None) as bar:
                benchmark.prepare(args.out, args.data, choice, bar.update)
        if backend is not None:
            with tqdm(
                total=stages.count(args.out, name), desc=f"{name}: predict", unit="prompt", disable=None
            ) as bar:
                stages.predict(
                    backend,
                    args.out,
                    name,
                    max_length=max_length,
                    batch=args.batch or (64 if args.base_url else None),
                    progress=bar.update,
                )
    if args.stage in ("all", "score"):
        result = benchmark.results(args.out)
        results.write_json(args.out / f"{name}.json", result)
        print(benchmark.table(result))
        print(f"{args.out / f'{name}.json'} written")


# ---- standard benchmarks, perplexity, report ---------------------------------------------------


def add_standard(tasks, shared: argparse.ArgumentParser) -> None:
    task = tasks.add_parser(
        "standard",
        parents=[shared],
        help="MMLU, MMLU-Pro, MATH, GSM8K, HumanEval, and any task of lm-evaluation-harness",
        description="Tasks of lm-evaluation-harness; `paper` is the five of arXiv 2504.06214 by its protocol.",
    )
    task.add_argument(
        "--tasks",
        default="paper",
        metavar="NAME,NAME,...",
        help="paper; one of its five: paper/mmlu, paper/mmlu_pro, paper/math, paper/gsm8k, paper/humaneval; or names of the harness "
        "(default: %(default)s)",
    )
    task.add_argument(
        "--limit", type=int, metavar="N", help="questions of each task, the first N (default: all)"
    )
    task.add_argument(
        "--max-length",
        metavar="N",
        help="tokens of prompt and answer together; longer prompts lose their beginning (default: the model's "
        "positions; an endpoint does not say them, and then nothing is cut)",
    )
    task.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    task.add_argument(
        "--run-code",
        action="store_true",
        help="run the programs that the model writes for HumanEval, in limited processes",
    )
    task.set_defaults(function=run_standard)


def add_perplexity(tasks) -> None:
    task = tasks.add_parser(
        "perplexity",
        help="perplexity by position over long sequences",
        description="Perplexity by position: of documents' beginnings, or of packed rows.",
    )
    options.add_weights_arguments(task)
    task.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE or PREFIX",
        help="documents (.txt, .jsonl, .parquet) or packed rows",
    )
    task.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="tokens of a row, like 4K,32K; documents that are shorter are passed over",
    )
    task.add_argument(
        "--rows",
        type=int,
        default=32,
        metavar="N",
        help="rows of each length, the first long enough (default: %(default)s)",
    )
    task.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="field or column with the text (default: %(default)s)",
    )
    task.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="perplexity.json of other models, drawn in the same figure",
    )
    task.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    task.set_defaults(function=run_perplexity)


def add_report(tasks) -> None:
    task = tasks.add_parser(
        "report",
        help="tables of several models' results beside the published figures",
        description="Collects results (niah, ruler, lveval, infinitebench, standard, perplexity) into the paper's tables.",
    )
    task.add_argument(
        "--results",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="result files, or directories that are searched for *.json; NAME is what tables call the models there",
    )
    task.add_argument("--no-published", action="store_true", help="leave the published figures out")
    task.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where report.md, the .csv files and the plots go",
    )
    task.set_defaults(function=run_report)


def run_standard(args: argparse.Namespace) -> None:
    options.check_greedy(args)
    settings = standard.Settings(
        tasks=tuple(name.strip() for name in args.tasks.split(",") if name.strip()),
        limit=args.limit,
        include_path=args.include_path,
        chat=args.chat,
        run_code=args.run_code,
        max_length=parse_count(args.max_length, "--max-length") if args.max_length else None,
    )
    settings.names()  # a mistake there is told before the model is read
    results.make_writable(args.out)
    with options.open_backend(args) as backend:  # with several ranks only the first one comes into the block
        result, samples = standard.run(backend, settings, args.out)
    results.write_json(args.out / "standard.json", result)
    results.write_lines(args.out / "standard_samples.jsonl", samples)
    print(standard.table(result))
    print(
        f"{args.out / 'standard.json'} and standard_samples.jsonl written; {sum(result['questions'].values())} questions, {result['seconds']:.0f} s"
    )


def run_perplexity(args: argparse.Namespace) -> None:
    from megatron_ultralong.evaluate.tasks import perplexity

    settings = perplexity.Settings(
        lengths=tuple(parse_count(text.strip(), "--lengths") for text in args.lengths.split(",")),
        rows=args.rows,
        text_key=args.text_key,
    )
    beside = [
        _read_checked(path, curves.check) for path in args.beside
    ]  # a mistake there is told before the model is read
    data = perplexity.sources(args.data)
    results.make_writable(args.out)
    from tqdm import tqdm

    with (
        options.open_backend(args) as backend,  # with several ranks only the first one comes into the block
        tqdm(total=len(settings.lengths) * settings.rows, desc="perplexity", unit="row", disable=None) as bar,
    ):
        backend.check(max(settings.lengths), 1)
        result = perplexity.measure(
            backend,
            perplexity.read(args.data, backend.tokenizer, args.text_key),
            settings,
            bar.update,
            data=data,
        )
    results.write_json(args.out / "perplexity.json", result)
    curves.by_position([result, *beside], args.out / "perplexity.png")
    print(perplexity.table(result))
    print(f"{args.out / 'perplexity.json'} and perplexity.png written, {result['seconds']:.0f} s")


def run_report(args: argparse.Namespace) -> None:
    lines = report_tables.write(args.results, args.out, with_published=not args.no_published)
    print("\n".join(lines))


def _depths(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--depths {text}: expected percents like 0,50,100, or one whole number of depths"
        ) from None
    if len(values) > 1:
        return tuple(values)
    count = values[0]
    if not count.is_integer() or not 1 <= count <= 1000:
        raise UserError(
            f"--depths {text}: one number means so many depths, evenly spaced; it must be a whole number from 1 to 1000"
        )
    return tuple(round(100 * i / (count - 1), 2) for i in range(int(count))) if count > 1 else (50.0,)


def main() -> None:
    args = arguments()
    args.function(args)


if __name__ == "__main__":
    cli.main(main)
