"""RULER's scorers, equal to the official ones (tests/parity/test_official_scores.py): NVIDIA/RULER,
scripts/eval/synthetic/constants.py and evaluate.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Fraction of an answer's references that its prediction contains, ignoring case; mean over answers,
    percent."""
    return _mean_percent([sum(hits) / len(hits) for hits in _matches(predictions, references)])


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Whether a prediction contains any of the answer's references, ignoring case; mean over answers,
    percent."""
    return _mean_percent([float(any(hits)) for hits in _matches(predictions, references)])


def printable(prediction: str) -> str:
    """A prediction as RULER reads it: control characters become line ends, white space at both ends is
    removed."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def _matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[bool]]:
    return [
        [reference.lower() in prediction.lower() for reference in expected]
        for prediction, expected in zip(predictions, references, strict=True)
    ]


def _mean_percent(values: list[float]) -> float:
    return round(sum(values) / len(values) * 100, 2)
