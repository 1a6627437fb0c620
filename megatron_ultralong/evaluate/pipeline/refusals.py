"""Why an endpoint refused prompts, as results record and print it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_SHOWN = 160
"""Characters of a reason that are shown."""


def count_reasons(finishes: Iterable[str]) -> dict[str, int]:
    """Number of refused prompts by reason (`Completion.finish`).

    Reasons of one kind ("HTTP 400: ...") count as the first of them, because their text may contain the size
    of each prompt.
    """
    first: dict[str, str] = {}
    counted: dict[str, int] = {}
    for finish in finishes:
        reason = " ".join(finish.split())
        if len(reason) > _SHOWN:
            reason = f"{reason[:_SHOWN]}..."
        reason = first.setdefault(reason.partition(":")[0], reason)
        counted[reason] = counted.get(reason, 0) + 1
    return counted


def told(refused: Mapping[str, int], counted_as: str = "0") -> str:
    """One line for a printed table. refused: as `count_reasons` returns it, not empty."""
    reasons = ", ".join(f"{reason} ({number})" for reason, number in refused.items())
    return (
        f"{sum(refused.values())} prompts were refused by the endpoint and count as {counted_as}: {reasons}; the same "
        "command requests them again"
    )
