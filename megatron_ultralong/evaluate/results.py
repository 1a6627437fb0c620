"""Results of an evaluation on disk and in the terminal."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate.plots import tokens


def make_writable(directory: Path) -> None:
    """Create `directory`; UserError where files cannot be written in it. Asked before the work, not after it."""
    make_folder(directory)
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--out {directory} cannot be written: {error.strerror or error}") from None


def make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory} cannot be written: {error.strerror or error}") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` whole or not at all."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `lines` as JSON, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all; UserError where it cannot be written."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Inverse of `write_json`; UserError where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def grid_table(result: dict[str, Any]) -> str:
    """Lengths across, depths down, accuracy in percent, as plain text; a `*` marks lengths beyond the model's own positions."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({cell["depth"] for cell in result["cells"]})
    accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in result["cells"]}
    limit = result["model"].get("max_position") or float("inf")
    names = [tokens(length) + ("*" if length > limit else "") for length in lengths]
    width = max(7, *(len(name) + 2 for name in names))
    lines = ["depth".rjust(7) + "".join(name.rjust(width) for name in names)]
    lines += [f"{depth:g}%".rjust(7) + "".join(f"{accuracy[length, depth]:.0%}".rjust(width) for length in lengths) for depth in depths]
    lines += ["all".rjust(7) + "".join(f"{result['by_length'][str(length)]:.0%}".rjust(width) for length in lengths)]
    if any(name.endswith("*") for name in names):
        lines.append(f"* beyond the {limit:,} positions of the model's config")
    return "\n".join(lines)
