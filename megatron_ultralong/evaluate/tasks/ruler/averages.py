"""Averages of RULER scores over tasks and lengths.

The UltraLong paper (arXiv 2504.06214) reports averages up to 128K, 512K and 1M tokens, but not which lengths
they contain; here these are 4K and its doublings up to and including the bound.
"""

from __future__ import annotations

from typing import Any

from megatron_ultralong.evaluate.pipeline.results import short_count
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS

FIRST = 4096
BOUNDS = (2**17, 2**19, 2**20)


def lengths_up_to(bound: int) -> list[int]:
    """The lengths that the average up to `bound` contains."""
    return [FIRST * 2**i for i in range((bound // FIRST).bit_length())]


def averages(scores: dict[str, dict[int, float]]) -> dict[str, Any]:
    """From {task: {length: score}}: the mean over tasks at each length, and the mean of those up to each of
    `BOUNDS`.

    `complete` says whether they contain all 13 tasks and, for a bound, all of its lengths.
    """
    by_length: dict[str, Any] = {}
    lengths = sorted({length for of_task in scores.values() for length in of_task})
    for length in lengths:
        at_length = [of_task[length] for of_task in scores.values() if length in of_task]
        by_length[str(length)] = {
            "average": round(sum(at_length) / len(at_length), 2),
            "tasks": len(at_length),
            "complete": len(at_length) == len(TASKS),
        }
    up_to = {}
    for bound in BOUNDS:
        expected = lengths_up_to(bound)
        used = [length for length in expected if length in lengths]
        if used and bound in lengths:
            up_to[short_count(bound)] = {
                "average": round(sum(by_length[str(length)]["average"] for length in used) / len(used), 2),
                "lengths": used,
                "complete": used == expected and all(by_length[str(length)]["complete"] for length in used),
            }
    return {"by_length": by_length, "up_to": up_to}
