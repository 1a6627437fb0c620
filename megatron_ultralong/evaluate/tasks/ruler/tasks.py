"""RULER's 13 tasks (arXiv 2404.06654) and their parameters: those of NVIDIA/RULER at c3f5e3b4
(scripts/synthetic.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """The parameters of one task."""

    kind: Literal["niah", "vt", "cwe", "fwe", "qa"]
    answer_tokens: int
    """Tokens to generate."""
    match_part: bool = False
    """Scored by string_match_part, otherwise by string_match_all."""
    haystack: Literal["noise", "essay", "needle", ""] = ""
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    """Values per key."""
    queries: int = 1
    data: Literal["squad", "hotpotqa", ""] = ""


def _niah(haystack: Literal["noise", "essay", "needle"], **change: Any) -> RulerTask:
    return RulerTask(kind="niah", answer_tokens=128, haystack=haystack, **change)


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value="uuids"),
    "niah_multikey_1": _niah("essay", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": _niah("essay", values=4),
    "niah_multiquery": _niah("essay", keys=4, queries=4),
    "vt": RulerTask(kind="vt", answer_tokens=30),
    "cwe": RulerTask(kind="cwe", answer_tokens=120),
    "fwe": RulerTask(kind="fwe", answer_tokens=50),
    "qa_1": RulerTask(kind="qa", answer_tokens=32, match_part=True, data="squad"),
    "qa_2": RulerTask(kind="qa", answer_tokens=32, match_part=True, data="hotpotqa"),
}
