"""Scorers of the benchmarks, equal to the official ones (tests/parity/test_official_scores.py).

RULER: NVIDIA/RULER, scripts/eval/synthetic/constants.py and evaluate.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of an answer's references that stand in its prediction, letter case aside; mean over answers,
    percent."""
    return _percent([sum(found) / len(found) for found in _found(predictions, references)])


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Whether any of an answer's references stands in its prediction, letter case aside; mean over answers,
    percent."""
    return _percent([float(any(found)) for found in _found(predictions, references)])


def printable(prediction: str) -> str:
    """A prediction as RULER reads it: control characters are line ends, none stands at its ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def _found(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[bool]]:
    return [
        [reference.lower() in prediction.lower() for reference in wanted]
        for prediction, wanted in zip(predictions, references, strict=True)
    ]


def _percent(values: list[float]) -> float:
    return round(sum(values) / len(values) * 100, 2)
