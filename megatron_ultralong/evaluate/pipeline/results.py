"""Results of an evaluation on disk and in the terminal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.report.heat_map import tokens


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
    """Write `values` to `path` whole or not at all; where results of the same task but of something else
    stood there, a line says so."""
    if before := _replaced(path, values):
        print(f"{path} replaces results with other {before}; give another --out to keep both")
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `lines` as JSON, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all; UserError where it cannot be written."""
    staged = path.with_name(f".{path.name}.part")  # one name: what a killed run leaves, the next writes over
    try:
        # Half a surrogate pair, which a model's text may hold, becomes the escape that JSON has for it.
        staged.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Inverse of `write_json`; UserError where there is no such file, or no JSON object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return values


def _replaced(path: Path, values: dict[str, Any]) -> str:
    """What the results at `path` were made with that `values` were not, as words; "" = nothing, or no results
    of that task are there."""
    try:
        before = read_json(path)
    except UserError:
        return ""
    if "task" not in values or before.get("task") != values["task"]:
        return ""
    one, other = (json.loads(json.dumps(_made_with(some))) for some in (before, values))
    return ", ".join(name for name in one if one[name] != other[name])


def _made_with(values: dict[str, Any]) -> dict[str, Any]:
    """What decides a result's scores, as far as it says."""
    model, scores, cells = values.get("model"), values.get("scores"), values.get("cells")
    where = (
        {name: [*of] if isinstance(of, dict) else [] for name, of in scores.items()}
        if isinstance(scores, dict)
        else {}
    )
    return {
        "model": [model.get(name) for name in ("path", "fingerprint")] if isinstance(model, dict) else None,
        "settings": [values.get(name) for name in ("settings", "of", "data")],
        "tasks or lengths": [
            where,
            [
                [cell.get(name) for name in ("set", "task", "length", "depth")]
                for cell in cells
                if isinstance(cell, dict)
            ]
            if isinstance(cells, list)
            else [],
        ],
    }


def grid_table(result: dict[str, Any]) -> str:
    """Lengths across, depths down, accuracy in percent, as plain text; a `*` marks lengths beyond the model's
    own positions."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({cell["depth"] for cell in result["cells"]})
    accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in result["cells"]}
    limit = result["model"].get("max_position") or float("inf")
    names = [tokens(length) + ("*" if length > limit else "") for length in lengths]
    width = max(7, *(len(name) + 2 for name in names))
    lines = ["depth".rjust(7) + "".join(name.rjust(width) for name in names)]
    lines += [
        f"{depth:g}%".rjust(7) + "".join(f"{accuracy[length, depth]:.0%}".rjust(width) for length in lengths)
        for depth in depths
    ]
    lines += [
        "all".rjust(7) + "".join(f"{result['by_length'][str(length)]:.0%}".rjust(width) for length in lengths)
    ]
    if any(name.endswith("*") for name in names):
        lines.append(f"* beyond the {limit:,} positions of the model's config")
    if result.get("refused"):
        lines.append(
            f"{result['refused']} prompts were refused by the endpoint and count as 0; the same command asks them again"
        )
    return "\n".join(lines)
