"""The reference pages of the site as Markdown: settings, recipes, commands and the Python API."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import textwrap
from unittest import mock

import megatron_ultralong
from megatron_ultralong import recipes, settings_text
from megatron_ultralong.commands.main import COMMANDS
from megatron_ultralong.config import Run, sections
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import METHODS
from megatron_ultralong.settings_text import Setting


def pages() -> dict[str, str]:
    """Path of each page below docs/, and its text."""
    return {
        "reference/settings.md": settings(),
        "reference/recipes.md": list_of_recipes(),
        "reference/commands.md": commands(),
        "reference/api.md": api(),
    }


# ---- settings ----------------------------------------------------------------------------------


def settings() -> str:
    """Every setting of a run, by section, and those of every RoPE method."""
    text = [
        "# Settings",
        "A run is a [recipe](recipes.md) with settings changed by `--set section.name=value`. "
        "`python tools/train.py --recipe NAME --set help` prints this list with a recipe's values.",
        "K and M are 1024 and 1024². *required* = stated by every recipe; "
        "`none` = not set. An unknown setting is refused with the nearest name.",
    ]
    for section, kind in sections().items():
        text += [
            f"## {section}",
            prose(first_paragraph(kind)),
            table(settings_text.documented(section, kind)),
        ]
    shared = {setting.name: setting for setting in settings_text.documented("rope", Rope)}
    text += [
        "## rope",
        "`rope.type` selects the [method](../rope-methods.md). All methods have these settings:",
    ]
    kinds = " \\| ".join(METHODS)
    text += [f"`rope.type`: {kinds}", table([s for s in shared.values() if s.name != "rope.type"])]
    for name, kind in METHODS.items():
        own = [
            setting
            for setting in settings_text.documented("rope", kind)
            if setting.name != "rope.type" and setting != shared.get(setting.name)
        ]
        text += [f"### rope.type={name}", prose(first_paragraph(kind))]
        text += [table(own)] if own else ["No settings of its own."]
    return "\n\n".join(text) + "\n"


def table(settings: list[Setting]) -> str:
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for setting in settings:
        default = (
            "*required*" if setting.default is None else f"`{setting.default}`" if setting.default else ""
        )
        values = prose(setting.type)
        lines.append(f"| `{setting.name}` | {values} | {default} | {prose(setting.about)} |")
    return "\n".join(lines)


# ---- recipes -----------------------------------------------------------------------------------


def list_of_recipes() -> str:
    """Every recipe: where its values come from, and which it sets."""
    text = [
        "# Recipes",
        "`python tools/train.py --recipe NAME --print-config` prints all values of a recipe. "
        "Below are those that differ from the [defaults](settings.md). "
        "[How to add a recipe](../how-to-add-a-recipe.md).",
        "## Recipes of several stages",
        "\n".join(
            f"- `{name}`: {', '.join(f'`{s}`' for s in stages)}" for name, stages in recipes.STAGES.items()
        ),
    ]
    for name in recipes.names():
        run = recipes.get(name)
        text += [f"## {name}", prose(run.notes)]
        if run.base:
            text.append(f"Starts from {prose(run.base)}.")
        if run.unpublished:
            text.append(
                "Not published by its source, this project's own choice: "
                + ", ".join(f"`{setting}`" for setting in run.unpublished)
                + "."
            )
        text.append("```text\n" + "\n".join(changed(run)) + "\n```")
    return "\n\n".join(text) + "\n"


def changed(run: Run) -> list[str]:
    """The settings of a run that differ from the defaults, as `--set` takes them."""
    kinds = dict(sections())
    if run.rope is not None:
        kinds["rope"] = type(run.rope)
    defaults = {
        f"{setting.name}={setting.default}"
        for section, kind in kinds.items()
        for setting in settings_text.documented(section, kind)
        if setting.name != "rope.type"
    }
    return [line for line in settings_text.stated(run) if line not in defaults]


# ---- commands ----------------------------------------------------------------------------------


class Parsed(BaseException):
    """Carries the parser of a command out of it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the argument parser that a command builds; nothing else of the command runs."""

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Parsed(self)

    module = importlib.import_module(f"megatron_ultralong.commands.{COMMANDS[name][0]}")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [f"ultralong {name}"]),
    ):
        try:
            module.main()
        except Parsed as parsed:
            return parsed.parser
    raise AssertionError(f"{name} parses no arguments")


def file_of(name: str) -> str:
    """The file of tools/ that is the same command."""
    return f"tools/{COMMANDS[name][0].partition('.')[0]}.py"


def commands() -> str:
    """Every command with its options, from its argument parser."""
    text = [
        "# Commands",
        "What `--help` prints, for every command and subcommand. `ultralong NAME` is installed with the package; from a "
        "clone `python tools/FILE.py` is the same. On several ranks: `torchrun ... -m megatron_ultralong NAME`, or "
        "`torchrun ... tools/FILE.py`. In lengths and sizes K and M are 1024 and 1024².",
        "\n".join(
            [
                "| command | file | |",
                "|---|---|---|",
                *(
                    f"| `ultralong {name}` | `{file_of(name)}` | {prose(about)} |"
                    for name, (_, about) in COMMANDS.items()
                ),
            ]
        ),
    ]
    for name in COMMANDS:
        text += command(parser_of(name), f"ultralong {name}", 2)
    return "\n\n".join(text) + "\n"


def command(parser: argparse.ArgumentParser, name: str, level: int, about: str = "") -> list[str]:
    """Heading, description (or `about`), usage and options of a parser, and then of its subcommands."""
    formatter = argparse.HelpFormatter(name, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    text = ["#" * level + f" {name}", *description(parser.description or about)]
    if not subcommands:
        text.append(f"```text\n{formatter.format_help().strip()}\n```")
    groups: dict[str, list[argparse.Action]] = {"": []}
    for group in parser._action_groups:
        title = "" if group.title in ("positional arguments", "options") else group.title or ""
        groups.setdefault(title, []).extend(
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS
            and action.dest not in ("help", "version")
            and action not in subcommands
        )
    for title, actions in groups.items():
        if actions:
            text += [f"**{title}**"] if title else []
            text.append(options(formatter, actions))
    for action in subcommands:
        helps = {listed.dest: listed.help or "" for listed in action._choices_actions}
        for sub, child in action.choices.items():
            text += command(child, f"{name} {sub}", level + 1, helps.get(sub, ""))
    return text


def options(formatter: argparse.HelpFormatter, actions: list[argparse.Action]) -> str:
    lines = ["| option | meaning |", "|---|---|"]
    for action in actions:
        option = formatter._format_action_invocation(action)
        required = " *Required.*" if action.required and action.option_strings else ""
        about = prose(formatter._expand_help(action)) if action.help else ""
        lines.append(f"| `{option}` | {about}{required} |".replace("\n", " "))
    return "\n".join(cell_bars(line) for line in lines)


def cell_bars(line: str) -> str:
    """Escape the bars inside the code of a table's first cell."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\\|"), line)


def description(text: str) -> list[str]:
    """A parser's description: paragraphs, and its example commands as a block."""
    parts = []
    if "\n" not in text.strip():  # a line of the list of subcommands
        text = f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if re.match(r"\s*(python|torchrun|ultralong|bash) ", paragraph):
            parts.append(f"```bash\n{textwrap.dedent(paragraph)}\n```")
        else:
            parts.append(prose(" ".join(paragraph.split())))
    return parts


# ---- Python API --------------------------------------------------------------------------------

API = {
    "Runs and settings": (
        "config.Run",
        "recipes.get",
        "recipes.names",
        "command_settings.override",
        "config.to_dict",
        "config.from_dict",
        "errors.UserError",
    ),
    "RoPE": (
        "rope.base.Rope",
        "rope.methods.from_values",
        "rope.methods.resolve",
        "model.rotary_embedding.cos_sin",
        "model.rotary_embedding.apply_rope",
    ),
    "Context parallelism": (
        "context_parallel.api.ContextGroups",
        "context_parallel.api.split_group",
        "context_parallel.api.attention",
        "context_parallel.zigzag.positions",
        "context_parallel.zigzag.shard",
        "context_parallel.zigzag.unshard",
    ),
    "Planning": (
        "planning.report.PlanRequest",
        "planning.report.report",
        "planning.hardware.Machine",
        "planning.search.search",
        "planning.search.Estimate",
        "planning.memory.gpu_memory",
        "planning.time.iteration_time",
    ),
    "Checkpoints": (
        "checkpoint.convert.import_hf",
        "checkpoint.convert.export_hf",
        "checkpoint.convert.verify",
        "checkpoint.hf.config.read_config",
    ),
    "Data": (
        "data.packed_rows.PackedDataset",
        "data.packed_rows.open_blend",
        "data.packed_rows.read_manifest",
    ),
}
"""Heading -> objects that other programs may use, below megatron_ultralong."""


def documented_names() -> dict[str, list[str]]:
    """Heading -> objects: what the package exports at its top, if anything, and those of API that it does
    not."""
    top = [name for name in getattr(megatron_ultralong, "__all__", ()) if not name.startswith("_")]
    others = {title: [n for n in names if n.rsplit(".", 1)[1] not in top] for title, names in API.items()}
    return {title: names for title, names in {"Top level": top, **others}.items() if names}


def api() -> str:
    """The Python API, as directives of mkdocstrings, which reads the source without importing it."""
    text = [
        "# Python API",
        "What other programs may use; everything else may change in any release. In shapes, capital letters are full "
        "sizes and lower case letters this rank's share. The fields of a run are on the page of [settings](settings.md).",
    ]
    for title, names in documented_names().items():
        text += [f"## {title}", *(f"::: megatron_ultralong.{name}" for name in names)]
    return "\n\n".join(text) + "\n"


# ---- text --------------------------------------------------------------------------------------


def first_paragraph(kind: type) -> str:
    return inspect.getdoc(kind).split("\n\n")[0]  # type: ignore[union-attr]


def prose(text: str) -> str:
    """Plain text as Markdown: what has a meaning there is escaped, outside of `code`."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([\\*_<>\[\]|])", r"\\\1", piece) for piece in pieces
    )
