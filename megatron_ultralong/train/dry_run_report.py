"""What the ranks of a dry run found, as a table with one verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ultralong.runtime.hang_report import ranges

WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of a rank's table."""

    subject: str
    text: str
    """What was found, or what is wrong and what to change."""
    wrong: bool = False
    varies: bool = False
    """Whether ranks may find something else than rank 0."""


@dataclass(frozen=True, kw_only=True)
class RankFindings:
    """What one rank found."""

    host: str
    stages: list[list[Finding]]


def lines(names: Sequence[str], ranks: Sequence[RankFindings]) -> tuple[list[str], int]:
    """The table of the stages `names` and the number of problems. ranks: in rank order; one outside
    torchrun."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    printed = [f"dry run of {', '.join(names)}: nothing is built or written"]
    if len(ranks) > 1:
        shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        printed.append(f"checked by {len(ranks)} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)}: {shown}")
    count = 0
    for number, name in enumerate(names):
        if len(names) > 1:
            printed += ["", f"stage {number + 1} of {len(names)}: {name}"]
        problems = _problems(number, ranks)
        for finding in ranks[0].stages[number]:
            if not finding.wrong:
                printed += _row(finding.subject, finding.text)
        for text, who in problems.items():
            printed += _row("problem", text if len(ranks) == 1 else f"{_named(who, ranks)}: {text}")
        count += len(problems)
    if not count:
        printed += ["", f"verdict: ready to train{f' on {len(ranks)} ranks' if len(ranks) > 1 else ''}"]
    return printed, count


def _problems(stage: int, ranks: Sequence[RankFindings]) -> dict[str, list[int]]:
    """What is wrong, and what is not as rank 0 found it, each with the ranks that found it."""
    found: dict[str, list[int]] = {}
    expected = {one.subject: one for one in ranks[0].stages[stage] if not one.wrong}
    for number, rank in enumerate(ranks):
        for one in rank.stages[stage]:
            first = expected.get(one.subject)
            if one.wrong:
                found.setdefault(f"{one.subject}: {one.text}", []).append(number)
            elif first is not None and not one.varies and one.text != first.text:
                found.setdefault(f"{one.subject} differs from rank 0's: {one.text}", []).append(number)
    return found


def _named(numbers: Sequence[int], ranks: Sequence[RankFindings]) -> str:
    """Ranks with their hosts."""
    hosts = list(dict.fromkeys(ranks[number].host for number in numbers))
    shown = ", ".join(hosts[:4]) + (" ..." if len(hosts) > 4 else "")
    word = "rank" if len(numbers) == 1 else "ranks"
    return f"{word} {ranges(numbers)} (host{'s' * (len(hosts) > 1)} {shown})"


def _row(subject: str, text: str) -> list[str]:
    indent = " " * 15
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{subject:<15}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
