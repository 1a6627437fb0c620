"""Prompts of a wanted size: as many units of filler as fit, found with few tokenisations of the whole text.

A text of 4M tokens takes seconds to tokenise. So its units are tokenised alone, once; their sum says about
how many fit; the whole prompt is tokenised to know its exact size, and only where that is over, or leaves
room for a unit, a better number is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt whose amount of filler is open."""

    render: Callable[[int], str]
    """The user's text with n units of filler; the same for the same n."""
    cost: Callable[[int], float]
    """About how many tokens n units take; does not fall with n."""
    prefix: str
    """First words of the answer, given to the model."""
    outputs: list[str]
    least: int = 0
    most: int | None = None
    """Units there can be at all; None = any number."""
    sound: Callable[[str], bool] = lambda text: True
    """Whether a finished text has its needles once, and nothing that looks like one: chance can put a key
    into the filler."""


class Filler:
    """Pieces of filler, drawn as they are needed, and how many tokens they take."""

    def __init__(
        self, counts: Callable[[list[str]], list[int]], pieces: Iterator[str], *, before: str = " "
    ) -> None:
        """counts: tokens of texts alone. pieces: endless. before: what stands in front of each piece in the
        prompt."""
        self._counts, self._source, self._before = counts, pieces, before
        self._pieces: list[str] = []
        self._total = [0]

    def pieces(self, n: int) -> list[str]:
        self._need(n)
        return self._pieces[:n]

    def cost(self, n: int) -> int:
        """Tokens of the first n pieces."""
        self._need(n)
        return self._total[n]

    def _need(self, n: int) -> None:
        if n <= len(self._pieces):
            return
        new = list(islice(self._source, max(256, n - len(self._pieces))))
        different = list(dict.fromkeys(new))
        size = dict(zip(different, self._counts([self._before + piece for piece in different]), strict=True))
        for piece in new:
            self._pieces.append(piece)
            self._total.append(self._total[-1] + size[piece])


def fit(draft: Draft, room: int, count: Callable[[str], int]) -> tuple[str, int, int]:
    """The text with the most filler that is no longer than `room` tokens, its tokens by `count`, and its
    units.

    At most one unit of filler is missing. UserError where even the least does not fit: it says how many
    tokens that takes.
    """
    low, text = draft.least, draft.render(draft.least)
    size = count(text)
    if size > room:
        raise UserError(
            f"{size - room} tokens too short: the prompt with as little filler as can be, and its answer, take more"
        )
    high = draft.most + 1 if draft.most is not None else 2 * room + 2
    scale = 1.0  # tokens of the whole text for a token of the pieces
    while high - low > 1:
        n = _largest(draft.cost, low, (room - size) / scale, high - 1)
        if n == low:
            break
        tried = draft.render(n)
        exact = count(tried)
        scale = max(0.01, (exact - size) / max(1, draft.cost(n) - draft.cost(low)))
        if exact <= room:
            low, text, size = n, tried, exact
        else:
            high = n
    return text, size, low


def _largest(cost: Callable[[int], float], low: int, room: float, most: int) -> int:
    """The largest n from `low` to `most` for which cost(n) is at most `room` above cost(low)."""
    first, zero, high = low, cost(low), low + 1
    while high <= most and cost(high) - zero <= room:
        low, gained = high, cost(high) - zero
        # As far as the mean of the units so far leads, and a little further: each unit looked at has to be
        # tokenised.
        high = low + 1 + (int(1.02 * (room - gained) * (low - first) / gained) if gained > 0 else low)
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) - zero <= room else (low, middle)
    return low
