"""The script with which a shell completes `ultralong`: commands, options, files, recipes and settings."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path

from megatron_ultralong import command_settings, recipes
from megatron_ultralong.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def script(commands: Mapping[str, tuple[str, str]], shell: str) -> str:
    """Return the script. commands: by name, the module of megatron_ultralong/commands and what it does."""
    try:
        import shtab
    except ImportError:
        raise UserError("--completion needs shtab: pip install shtab") from None
    parser = argparse.ArgumentParser(prog="ultralong")
    subcommands = parser.add_subparsers()
    for name, (module, text) in commands.items():
        command = importlib.import_module(f"megatron_ultralong.commands.{module}").build_parser()
        _describe(command, shtab.FILE)
        subcommands.add_parser(name, parents=[command], add_help=False, help=text)
    return shtab.complete(parser, shell)


def _describe(parser: argparse.ArgumentParser, file: object) -> None:
    """Say what the values of options are. The parser is then only good for completion."""
    known = {
        "--recipe": [*recipes.STAGES, *(function.__name__ for function in recipes.RECIPES)],
        "--set": [f"{key}=" for key in command_settings.type_hints()],
    }
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                _describe(subcommand, file)
        elif known_values := known.get(action.option_strings[0] if action.option_strings else ""):
            action.choices = known_values
        elif action.type is Path or "PREFIX" in str(action.metavar):
            action.complete = file  # type: ignore[attr-defined]
