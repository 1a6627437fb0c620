"""Files between the stages of a benchmark: JSON lines whose header records what the others were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import jsonl

FORMAT = 1
"""Version of these files."""


def read_header(path: Path) -> dict[str, Any]:
    """The header of a stage's file; {} where the file does not exist."""
    header = jsonl.read_header(path)
    made_from = header.get("of")
    return header if isinstance(made_from, dict) and made_from.get("format") == FORMAT else {}


def require_header(path: Path, stage: str, *names: str) -> dict[str, Any]:
    """The header of a stage's file, with the fields `names`; UserError where it is missing."""
    header = read_header(path)
    if not header or any(name not in header for name in names):
        raise UserError(f"{path} is missing, or is of another version; run --stage {stage} first")
    return header


def read_lines(path: Path, stage: str, *names: str) -> Iterator[dict[str, Any]]:
    """Yield all lines after the header. UserError where one lacks a field of `names`, which `stage`
    writes."""
    try:
        with path.open(encoding="utf-8") as file:
            next(file, None)
            for number, text in enumerate(file, 2):
                line = json.loads(text)
                if not isinstance(line, dict) or any(name not in line for name in names):
                    raise ValueError(f"line {number} lacks {', '.join(names)}")
                yield line
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run --stage {stage} again") from None
