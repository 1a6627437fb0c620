"""The search for LongRoPE's factors, with losses that are functions of the factors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.tasks.rope_search import (
    Factors,
    Losses,
    SearchSettings,
    search,
    starting_points,
)

SETTINGS = SearchSettings(theta=10000.0, original_length=512, length=4096, head_dim=16, rounds=15)


def distance(factors: Factors) -> float:
    """Lowest at factors that no method has."""
    target = [1.0, 1.0, 1.2, 2.5, 3.0, 3.5, 7.0, 9.0]
    return sum(math.log(x / y) ** 2 for x, y in zip(factors, target, strict=True))


def test_finds_better_factors_than_it_starts_from() -> None:
    asked: list[Factors] = []
    rounds: list[float] = []

    def measure(factors: Factors) -> float:
        asked.append(factors)
        return distance(factors)

    best = search(SETTINGS, measure, lambda number, candidate: rounds.append(candidate.nll))
    starts = starting_points(SETTINGS)
    assert list(starts) == ["linear", "ntk", "yarn"] and starts["linear"] == (8.0,) * 8
    assert starts["ntk"][0] == 1.0 and starts["ntk"][-1] == 8.0
    assert best.nll == distance(best.factors) < 0.25 * min(map(distance, starts.values()))
    assert len(rounds) == 16 and rounds == sorted(rounds, reverse=True) and rounds[-1] == best.nll
    assert len(set(asked)) == len(asked), "none is measured twice"
    for factors in asked:
        assert len(factors) == 8 and list(factors) == sorted(factors)
        assert all(1 <= x <= 10 and x == round(x, 2) for x in factors)
    assert search(SETTINGS, distance) == best, "the seed decides"
    assert SETTINGS.rope(best.factors).factors == best.factors


def test_a_loss_that_is_not_a_number_loses() -> None:
    def measure(factors: Factors) -> float:
        return math.nan if factors[-1] > 7 else distance(factors)

    assert not math.isnan(search(SETTINGS, measure).nll)


def test_a_stopped_search_measures_nothing_twice(tmp_path: Path) -> None:
    whole: list[Factors] = []
    best = search(SETTINGS, lambda factors: whole.append(factors) or distance(factors))
    seen: list[Factors] = []

    def compute(factors: Factors) -> float:
        if len(seen) == 100:
            raise KeyboardInterrupt
        seen.append(factors)
        return distance(factors)

    losses = Losses(tmp_path / "losses.jsonl", {"model": "a"})
    with pytest.raises(KeyboardInterrupt):
        search(SETTINGS, lambda factors: losses.measure(factors, compute))
    losses.close()
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"factors": [1.0')  # a torn line
    seen.clear()
    losses = Losses(tmp_path / "losses.jsonl", {"model": "a"})
    assert len(losses) == 100
    again = search(SETTINGS, lambda factors: losses.measure(factors, lambda f: seen.append(f) or distance(f)))
    losses.close()
    assert again == best and seen == whole[100:]
    with pytest.raises(
        UserError, match="has losses of another model, length or data; choose another --output"
    ):
        Losses(tmp_path / "losses.jsonl", {"model": "b"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 512}, "--seq-length=512 must be above the model's 512 tokens"),
        ({"rounds": 0}, "--rounds=0 must be at least 1"),
        ({"parents": 65}, "--parents=65 is above --population=64"),
        ({"mutations": 0, "crossovers": 0}, "not both 0"),
    ],
)
def test_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SearchSettings(**{"theta": 1e4, "original_length": 512, "length": 4096, "head_dim": 16, **settings})
