"""Parsers of the commands: examples and --version, and the spellings of earlier versions."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_ultralong import __version__

SPELLINGS = {
    "--output": ("--out",),
    "--load": ("--ckpt",),
    "--load-hf": ("--hf",),
    "--samples": ("--trials", "--rows", "--limit"),
    "--examples": ("--limit",),
    "--seq-length": ("--length", "--tokens"),
    "--error-tokens": ("--error-length",),
    "--document-count": ("--documents",),
    "--max-memory": ("--limit",),
    "--retry-failed": ("--retry",),
}
"""Options with the spellings of earlier versions, which a command accepts where it has the option."""


class _Parser(argparse.ArgumentParser):
    """Also of the subcommands: argparse makes them of the same class."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What an abbreviation can stand for: an earlier spelling only where it is no spelling of today."""
        found: list[Any] = super()._get_option_tuples(option_string)
        today = [one for one in found if one[1] in one[0].option_strings]
        return today or list({one[0].dest: one for one in found}.values())


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose description is printed as it is."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"megatron_ultralong {__version__}")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse `arguments`, or those of this process; options may have the spelling of an earlier version."""
    accept_old(parser)
    return parser.parse_args(arguments)


def accept_old(parser: argparse.ArgumentParser) -> None:
    """Let `parser` and its subcommands take the spellings of earlier versions too, which its help does not
    name."""
    options = parser._option_string_actions
    for name, before in SPELLINGS.items():
        for old in before:
            if name in options and old not in options:
                options[old] = options[name]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                accept_old(subcommand)


def as_typed(arguments: list[str] | None) -> str:
    """The command that was typed, to be stored beside its results."""
    program = sys.argv[0]
    words = program.split() if program.startswith("ultralong ") else ["python", f"tools/{Path(program).name}"]
    return shlex.join([*words, *(sys.argv[1:] if arguments is None else arguments)])
