"""Prompts of a given length: as many units of filler as fit, found with few tokenisations of the complete
text.

Tokenising a text of 4M tokens takes seconds. Therefore the units are tokenised alone, once, and the sum of
their sizes estimates how many fit. The complete prompt is tokenised to know its exact size, and again with a
better number of units only where it is too long, or leaves room for another unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromptDraft:
    """A prompt whose amount of filler is not decided yet."""

    render: Callable[[int], str]
    """The user message with n units of filler; always the same for the same n."""
    estimate: Callable[[int], float]
    """Approximate number of tokens of n units; does not decrease with n."""
    prefix: str
    """The first words of the answer, which the model continues."""
    outputs: list[str]
    """The expected answers."""
    min_units: int = 0
    max_units: int | None = None
    """Available units; None = no limit."""
    is_valid: Callable[[str], bool] = lambda text: True
    """Whether a finished text contains each of its needles once, and nothing similar: a key may occur in the
    filler by chance."""


class FillerText:
    """Pieces of filler, drawn as they are needed, and their sizes in tokens."""

    def __init__(
        self, counts: Callable[[list[str]], list[int]], pieces: Iterator[str], *, before: str = " "
    ) -> None:
        """counts: tokens of texts alone. pieces: endless. before: the text in front of each piece in the
        prompt."""
        self._counts, self._source, self._before = counts, pieces, before
        self._pieces: list[str] = []
        self._total = [0]

    def pieces(self, n: int) -> list[str]:
        """The first n pieces."""
        self._draw(n)
        return self._pieces[:n]

    def tokens(self, n: int) -> int:
        """Tokens of the first n pieces, each tokenised alone."""
        self._draw(n)
        return self._total[n]

    def _draw(self, n: int) -> None:
        if n <= len(self._pieces):
            return
        new = list(islice(self._source, max(256, n - len(self._pieces))))
        distinct = list(dict.fromkeys(new))
        size = dict(zip(distinct, self._counts([self._before + piece for piece in distinct]), strict=True))
        for piece in new:
            self._pieces.append(piece)
            self._total.append(self._total[-1] + size[piece])


def fit(draft: PromptDraft, room: int, count: Callable[[str], int]) -> tuple[str, int, int]:
    """The text with the most filler of at most `room` tokens, its tokens by `count`, and its units.

    At most one more unit would fit. UserError where even the least filler does not fit, with the missing
    tokens.
    """
    low, text = draft.min_units, draft.render(draft.min_units)
    size = count(text)
    if size > room:
        raise UserError(
            f"{size - room} tokens too short for the prompt with the least possible filler and its answer"
        )
    high = draft.max_units + 1 if draft.max_units is not None else 2 * room + 2
    scale = 1.0  # tokens of the complete text per token of its pieces
    while high - low > 1:
        n = _largest(draft.estimate, low, (room - size) / scale, high - 1)
        if n == low:
            break
        candidate = draft.render(n)
        exact = count(candidate)
        scale = max(0.01, (exact - size) / max(1, draft.estimate(n) - draft.estimate(low)))
        if exact <= room:
            low, text, size = n, candidate, exact
        else:
            high = n
    return text, size, low


def _largest(estimate: Callable[[int], float], low: int, room: float, most: int) -> int:
    """The largest n from `low` to `most` with estimate(n) at most `room` above estimate(low)."""
    first, zero, high = low, estimate(low), low + 1
    while high <= most and estimate(high) - zero <= room:
        low, gained = high, estimate(high) - zero
        # Extrapolate from the mean size so far, and little further: every unit considered has to be
        # tokenised.
        high = low + 1 + (int(1.02 * (room - gained) * (low - first) / gained) if gained > 0 else low)
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimate(middle) - zero <= room else (low, middle)
    return low
