"""docs/troubleshooting.md quotes messages that the program prints."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PREFIX = re.compile(r"(error|warning|note): ")
OTHERS = {"CUDA out of memory"}
"""Headings that are messages of PyTorch."""
FEWEST_LETTERS = 12
"""Of a template's own text: `{name}: {error}` matches anything."""


@functools.cache
def templates() -> list[re.Pattern[str]]:
    """The texts in the program's source as patterns, in which every value of an f-string may be anything."""
    found: set[str] = set()
    for path in [*(ROOT / "megatron_ultralong").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
                for part in parts
            ]
            own = "".join(text or "" for text in texts)
            if id(node) in inner or len(re.sub(r"[^a-z]", "", own)) < FEWEST_LETTERS:
                continue
            texts[0] = texts[0] and PREFIX.sub("", texts[0], count=1)
            found.add("".join(".*" if text is None else re.escape(text) for text in texts))
    return [re.compile(pattern) for pattern in sorted(found)]


def is_message(line: str) -> bool:
    """Whether the program can print `line`, which may begin with the file that it is about."""
    lines = (line, re.sub(r"^\S+: ", "", line))
    return any(pattern.fullmatch(one) for pattern in templates() for one in lines)


def sections() -> dict[str, list[str]]:
    """Heading -> the messages quoted below it."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = re.match(r"`([^`]+)`\n", part)
        assert heading, f"a heading must be a message in code: {part[:60]}"
        blocks = re.findall(r"^```message\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
        found[heading[1]] = [line for block in blocks for line in block.splitlines()]
    return found


def test_templates_match_only_their_messages() -> None:
    assert is_message("recipe tiny starts from a model: give --load-hf DIR or --load CKPT")
    assert not is_message("recipe tiny starts from a base model: give --load-hf DIR or --load CKPT")
    assert not is_message("anything: at all")


@pytest.mark.parametrize("heading", sections())
def test_quoted_messages_are_the_programs(heading: str) -> None:
    messages = sections()[heading]
    for message in messages:
        assert is_message(PREFIX.sub("", message, count=1)), message
    # N in a heading stands for a number.
    words = re.compile(r"\d+".join(map(re.escape, re.split(r"\bN\b", heading))))
    if messages:
        assert any(words.search(message) for message in messages), "no quoted message has its heading"
    elif heading not in OTHERS:
        assert any(heading in pattern.pattern.replace("\\", "") for pattern in templates())
