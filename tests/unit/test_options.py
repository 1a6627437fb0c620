"""The options of all commands: one word a meaning, earlier spellings, K and M."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator

import pytest

from megatron_ultralong import command_line
from megatron_ultralong.commands.main import COMMANDS

OTHER_WORDS = {
    "--output": "out outdir out-dir output-dir outfile results-dir destination",
    "--load": "ckpt checkpoint ckpt-dir load-ckpt",
    "--load-hf": "hf hf-dir hf-path from-hf pretrained model-dir model-path",
    "--samples": "trials rows limit num-samples n-samples max-samples count",
    "--seq-length": "length seq-len sequence-length max-seq-length context-length",
    "--lengths": "seq-lengths sequence-lengths",
    "--input": "in inputs files source-files",
    "--device": "dev",
    "--dtype": "precision type",
    "--workers": "num-workers processes nproc",
    "--json": "json-out out-json",
    "--seed": "random-seed",
    "--tokenizer": "tokenizer-dir tokenizer-path",
    "--retry-failed": "retry redo rerun",
    "--max-memory": "memory-limit",
    "--document-count": "num-documents",
    "--error-tokens": "error-length",
    "--text-key": "text-field text-column",
    "--gpus": "num-gpus world-size ranks",
    "--set": "override setting",
}
"""What no command may call what the first word means."""
TRAIN = {"--save": "Megatron's word for the run directory, which is written and resumed"}


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of a command, or those of its subcommands."""
    subcommands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subcommands:
        yield name, parser
    for action in subcommands:
        for sub, one in action.choices.items():
            yield from parsers(one, f"{name} {sub}")


PARSERS = {
    name: parser
    for command, (module, _) in COMMANDS.items()
    for name, parser in parsers(
        importlib.import_module(f"megatron_ultralong.commands.{module}").build_parser(), command
    )
}


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def test_one_word_a_meaning() -> None:
    assert len(PARSERS) > 25
    words = {f"--{other}": word for word, others in OTHER_WORDS.items() for other in others.split()}
    for name, parser in PARSERS.items():
        for action in actions(parser):
            for option in action.option_strings:
                assert option not in words, f"{name} {option}: the other commands call this {words[option]}"
                assert option not in TRAIN or name == "train"
    used = {option for parser in PARSERS.values() for a in actions(parser) for option in a.option_strings}
    assert set(OTHER_WORDS) <= used and set(command_line.SPELLINGS) <= used
    old = {one for before in command_line.SPELLINGS.values() for one in before}
    assert old & used == {
        "--tokens",
        "--documents",
    }  # words of another meaning: all tokens, a file of lengths


def test_values_of_one_word_have_one_form() -> None:
    """A path is not a number elsewhere. Numbers of tokens take K and M: they are read by parse_count, and not
    by argparse."""
    forms: dict[str, dict[str, str]] = {}
    for name, parser in PARSERS.items():
        for action in actions(parser):
            if action.nargs != 0:
                numbers = re.fullmatch(r"[NSK](,[NSK]|,\.\.\.)*", str(action.metavar or ""))
                form = "number" if numbers or action.type in (int, float) else "text"
                forms.setdefault(action.option_strings[-1], {})[name] = form
            if re.match(r"(other )?tokens\b", action.help or ""):
                assert action.type is None, f"{name} {action.option_strings}: takes no K and M"
    mixed = {option: found for option, found in forms.items() if len(set(found.values())) > 1}
    assert not mixed


EARLIER = (  # command, its words today, and in an earlier version
    ("convert export", "--load A --output B", "--ckpt A --out B"),
    ("convert verify", "--load-hf A --load B", "--hf A --ckpt B"),
    (
        "evaluate niah",
        "--load A --lengths 1K --samples 3 --output B",
        "--ckpt A --lengths 1K --trials 3 --out B",
    ),
    ("evaluate standard", "--model A --samples 3 --output B", "--model A --limit 3 --out B"),
    ("evaluate lveval", "--model A --samples 3 --output B", "--model A --limit 3 --out B"),
    (
        "evaluate perplexity",
        "--model A --data D --lengths 1K --samples 3 --output B",
        "--model A --data D --lengths 1K --rows 3 --out B",
    ),
    (
        "prepare refine",
        "--input A --model M --examples 3 --output B",
        "--input A --model M --limit 3 --out B",
    ),
    (
        "search-rope",
        "--model A --seq-length 4K --data D --samples 3 --output B",
        "--model A --length 4K --data D --rows 3 --out B",
    ),
    ("inspect-rope", "A --seq-length 4K", "A --length 4K"),
    (
        "benchmark attention",
        "--seq-length 4K --document-count 3 --error-tokens 64 --output B",
        "--length 4K --documents 3 --error-length 64 --out B",
    ),
    ("benchmark placement", "--seq-length 4K --documents F", "--length 4K --documents F"),
    ("benchmark step", "--longest --max-memory 1G", "--longest --limit 1G"),
    ("benchmark checkpoint", "--seq-length 4K", "--tokens 4K"),
    ("benchmark loss", "--tokens 4K", "--tokens 4K"),
    ("check-context-parallel", "--document-count 3 --load A", "--documents 3 --ckpt A"),
    ("gpu-report", "--retry-failed --output B", "--retry --out B"),
    ("report-run", "A --output B", "A --out B"),
    ("ablate", "--grid A --output B", "--grid A --out B"),
    ("train", "--recipe tiny --load A --data D --save S", "--recipe tiny --ckpt A --data D --save S"),
)


@pytest.mark.parametrize(("name", "now", "before"), EARLIER, ids=[name for name, *_ in EARLIER])
def test_earlier_spellings(name: str, now: str, before: str) -> None:
    parser = PARSERS[name]
    command_line.accept_old(parser)
    assert parser.parse_args(before.split()) == parser.parse_args(now.split())
    for word in set(before.split()) - set(now.split()):
        if word.startswith("--"):
            assert not re.search(rf"{word}\b(?!-)", parser.format_help()), f"{name} --help names {word}"


def test_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier spelling makes no abbreviation ambiguous, and can be abbreviated."""
    parser = importlib.import_module("megatron_ultralong.commands.evaluate").build_parser()
    words = ["niah", "--load", "A", "--lengths", "1K"]
    for output in ("--ou", "--outp", "--out", "--out=B"):
        for samples in ("--tri", "--sam", "--lim"):
            value = [] if "=" in output else ["B"]
            args = command_line.parse(parser, [*words, output, *value, f"{samples}=3"])
            assert (str(args.output), args.samples) == ("B", 3)
    with pytest.raises(SystemExit):
        command_line.parse(parser, [*words, "--output", "B", "--l", "1"])
    error = capsys.readouterr().err
    assert "--l could match --load, --lengths" in error and "--limit" not in error
