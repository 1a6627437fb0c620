"""A short, seeded part of kills.py."""

from __future__ import annotations

import pytest

from tests.faults import kills


@pytest.mark.slow
@pytest.mark.complete
def test_a_few_faults() -> None:
    lines: list[str] = []
    assert kills.run(2, 5, lines.append, layouts=("tp2",)) >= 2
    assert all("same losses" in line for line in lines)


def test_what_counts_as_survived() -> None:
    told = kills.Disturbed("tp2", losses={1: 2.0, 2: 1.5})
    kills._merge(told, {2: 1.5, 3: 1.0})
    assert told.lost == [1]
    kills.check(told, {1: 2.0, 2: 1.5, 3: 1.0})
    for expected in ({1: 2.0, 2: 1.5, 3: 1.1}, {1: 2.0, 2: 1.5, 3: 1.0, 4: 0.9}):
        with pytest.raises(ValueError, match="other losses at iterations"):
            kills.check(told, expected)
    with pytest.raises(ValueError, match="iteration 3: loss 1.2 instead of 1.0"):
        kills._merge(told, {3: 1.2})
    told.ended_after.append(kills.ENDED_WITHIN + 1.0)
    with pytest.raises(ValueError, match="ended only after 151 s"):
        kills.check(told, told.losses)
    told.lost.append(2 * kills.SAVE_EVERY + 1)
    with pytest.raises(ValueError, match="7 iterations lost"):
        kills.check(told, told.losses)
    told.saved = 3
    with pytest.raises(ValueError, match="checkpoint 3 was saved, but is not used"):
        kills._merge(told, {3: 1.0})
