"""`prepare_data refine`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from megatron_ultralong.command_settings import parse_count

HELP = "rewrite the answers of instruction data by a model behind an OpenAI-compatible endpoint; a stopped run resumes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="conversations: .jsonl (also .gz, .zst), .json (one list) or .parquet, in the forms that sft reads; directories and "
        'globs of them. Records with "messages" keep their other keys',
    )
    parser.add_argument(
        "--form",
        default="auto",
        help="form of the records: auto (detected record by record), sharegpt, messages, alpaca, or two columns like "
        "question/answer; the output has the form messages (default: auto)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="NAME.jsonl",
        help="output file; also writes NAME.json (report) and NAME.journal.jsonl (log of all answers, to resume from)",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model at the endpoint")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible endpoint, like http://localhost:8000/v1 (default: OpenAI's)",
    )
    parser.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable that contains the key (default: OPENAI_API_KEY); may be unset for local servers",
    )
    parser.add_argument(
        "--domain",
        choices=("general", "math", "code"),
        default="general",
        help='prompt and checks of records without "domain" (default: general)',
    )
    parser.add_argument(
        "--turns",
        choices=("last", "all"),
        default="last",
        help="rewrite the last assistant message of each conversation (default), or all of them in order, each after the "
        "rewritten ones before it",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.yaml",
        help="custom prompts: any of system, general, math, code; the last three with the placeholders {conversation} and "
        "{answer}",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature (default: the endpoint's)"
    )
    parser.add_argument(
        "--max-tokens",
        default="4K",
        metavar="N",
        help="tokens of the longest answer, reasoning included (default: 4K)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=2,
        metavar="N",
        help="answers requested until one passes the checks; after that the original is kept (default: 2)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests in flight at a time (default: 16)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds for an answer (default: 300)"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="N",
        help="further tries, after increasing waits, if the endpoint is busy, broken or silent (default: 6)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="repeat the requests that failed in earlier runs, after all retries",
    )
    parser.add_argument(
        "--price-in", type=float, metavar="USD", help="price of a million prompt tokens, to show the cost"
    )
    parser.add_argument("--price-out", type=float, metavar="USD", help="price of a million completion tokens")
    parser.add_argument(
        "--examples", dest="limit", type=int, metavar="N", help="only the first N conversations"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="USD",
        help="stop once the answers in the log, including earlier runs, have cost this much; requests in flight still count",
    )


def run(args: argparse.Namespace) -> None:
    from megatron_ultralong.data.refine import run as refinement
    from megatron_ultralong.data.refine.prompts import RewritePrompts, load_prompts
    from megatron_ultralong.data.refine.settings import RefineSettings
    from megatron_ultralong.io import endpoint_client

    flags = {field.name for field in dataclasses.fields(RefineSettings)} - {"base_url", "backoff"}
    given = {name: getattr(args, name) for name in flags}
    given["max_tokens"] = parse_count(args.max_tokens, "--max-tokens")
    settings = RefineSettings(base_url=args.base_url or endpoint_client.OPENAI, **given)
    prompts = load_prompts(args.prompts) if args.prompts else RewritePrompts()
    report = refinement.refine(args.input, args.output, settings, prompts, form=args.form)
    kept = ", ".join(f"{count} {reason}" for reason, count in report["turns"].items() if reason != "refined")
    cost = "" if report["cost_usd"] is None else f", {report['cost_usd']:.2f} USD"
    print(
        f"{args.output}: {report['refined']} of {report['examples']} conversations refined; original answers kept: "
        f"{kept or 'none'}; {len(report['broken_lines'])} broken lines left out; {report['tokens_in']} prompt and "
        f"{report['tokens_out']} completion tokens{cost}"
    )
    for line in report["broken_lines"][:3]:
        print(f"broken: {line['place']}: {line['reason']}")
    if report["not_asked"]:
        print(
            f"the budget of {args.budget:g} USD is spent: {report['not_asked']} conversations were not requested and are not in "
            f"{args.output}; run the same command with a larger --budget to resume"
        )
