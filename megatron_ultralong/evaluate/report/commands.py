"""The commands `report`, `published` and `compare` of `ultralong evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import model_files
from megatron_ultralong.evaluate.pipeline import command
from megatron_ultralong.evaluate.report import comparison, curves, heat_map, published, tables
from megatron_ultralong.evaluate.report.read_results import read_for


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="result files, or directories that are searched for *.json; NAME is the name of their models in the tables",
    )
    parser.add_argument("--no-published", action="store_true", help="omit the published figures")
    command.add_out_argument(parser)


def run_report(args: argparse.Namespace) -> None:
    print("\n".join(tables.write(args.results, args.output, with_published=not args.no_published)))


def add_published_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory of the model"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        metavar="PATH",
        help="its result files, or directories that are searched for *.json (default: --output)",
    )
    parser.add_argument(
        "--published",
        metavar="NAME",
        help=f"compare with the figures of {', '.join(published.STANDARD)} (default: of the released model with the "
        "directory's name)",
    )
    command.add_out_argument(parser)


def run_published(args: argparse.Namespace) -> None:
    model_files.read_config(args.model)
    name = comparison.published_name(args.model, args.published)
    places = args.results or ([str(args.output)] if args.output.exists() else [])
    results, notes = comparison.read(places, args.model)
    scores = comparison.compare(results, name)
    comparison.write(scores, args.model, name, args.output)
    lines = [*notes, comparison.heading(args.model, name), "", comparison.as_text(scores)]
    if name is None:
        lines.append(f"--published NAME compares with one of {', '.join(published.STANDARD)}")
    print("\n".join([*lines, f"{args.output / 'published.md'} and published.csv written"]))


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, nargs="+", required=True, metavar="FILE", help="niah.json of each model"
    )
    parser.add_argument(
        "--titles", nargs="+", metavar="TEXT", help="one per file (default: the model's name)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="the plot to write")


def run_compare(args: argparse.Namespace) -> None:
    results = [read_for(path, heat_map.check) for path in args.results]
    titles = args.titles or curves.model_names([result.model for result in results])
    if len(titles) != len(results):
        raise UserError(f"--titles: {len(results)} files need {len(results)} titles, not {len(titles)}")
    heat_map.heat_maps(
        results, titles, args.output, trained=[result.model.get("max_position") for result in results]
    )
    print(f"{args.output} written")
