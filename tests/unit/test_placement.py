"""Documents placed on context-parallel ranks: every token once, T on each rank, balanced work, few keys
passed."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest

from megatron_ultralong.context_parallel import placement, zigzag
from megatron_ultralong.context_parallel.placement import BALANCED, Placement, place
from megatron_ultralong.errors import UserError


def row_of(lengths, seq_length: int) -> list[int]:
    """Starts of documents of these lengths, the last one cut at the row's end."""
    starts, at = [], 0
    for length in lengths:
        if at >= seq_length:
            break
        starts.append(at)
        at += max(1, int(length))
    return starts


def check(placed: Placement, starts: list[int], seq_length: int, cp: int) -> None:
    bounds = [*starts, seq_length]
    rank_of = numpy.full(seq_length, -1)
    for rank, runs in enumerate(placed.runs):
        assert sum(run.end - run.begin for run in runs) == seq_length // cp
        assert list(runs) == sorted(runs)
        for run in runs:
            assert bounds[run.document] <= run.begin < run.end <= bounds[run.document + 1]
            assert (rank_of[run.begin : run.end] == -1).all()
            rank_of[run.begin : run.end] = rank
        assert max([0, *numpy.bincount([run.document for run in runs])]) <= 2
        # A query per token, and as many keys as its document has tokens up to it.
        starts_of = numpy.repeat(starts, numpy.diff(bounds))
        assert placed.work[rank] == int((numpy.arange(seq_length) - starts_of + 1)[rank_of == rank].sum())
    assert (rank_of >= 0).all()
    holders = {
        i: tuple(sorted(set(rank_of[a:b].tolist()))) for i, (a, b) in enumerate(itertools.pairwise(bounds))
    }
    assert placed.holders == {i: ranks for i, ranks in holders.items() if len(ranks) > 1}
    # On a ring of k ranks each token is passed on k - 1 times.
    assert placed.passed == sum(
        (len(ranks) - 1) * (bounds[i + 1] - bounds[i]) for i, ranks in holders.items()
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_token_is_on_one_rank(seed: int) -> None:
    choose = random.Random(seed)
    cp = choose.choice([1, 2, 3, 4, 5, 8, 16])
    seq_length = cp * choose.randint(1, 300)
    longest = choose.choice([1, 3, 20, seq_length])
    starts = row_of((choose.randint(1, longest) for _ in itertools.count()), seq_length)
    placed = place(starts, seq_length, cp)
    check(placed, starts, seq_length, cp)
    assert placed.runs == place(starts, seq_length, cp).runs
    if cp == 1:
        assert not placed.holders and placed.passed == 0


def test_one_document_is_in_the_zigzag_order() -> None:
    for cp in (1, 2, 3, 4, 8):
        seq_length = 2 * cp * 7
        placed = place([0], seq_length, cp)
        check(placed, [0], seq_length, cp)
        for rank, runs in enumerate(placed.runs):
            held = [position for run in runs for position in range(run.begin, run.end)]
            assert held == zigzag.positions(seq_length, rank, cp).tolist()


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 64,
        [64],
        [63, 1],
        [1, 63],
        [32, 32],
        [33, 31],
        [16] * 4,
        [9, 1, 9, 1, 9, 1, 34],
        [2, 3, 5, 7, 11, 13, 23],
        [61, 1, 1, 1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("cp", [1, 2, 4, 8, 32, 64])
def test_small_rows(lengths: list[int], cp: int) -> None:
    starts = row_of(lengths, 64)
    placed = place(starts, 64, cp)
    check(placed, starts, 64, cp)
    if set(lengths) == {1} or (lengths == [16] * 4 and cp <= 4):
        assert not placed.holders


def test_two_halves_are_on_half_of_the_ranks_each() -> None:
    placed = place([0, 4096], 8192, 8)
    assert {len(ranks) for ranks in placed.holders.values()} == {4} and placed.imbalance == 1


# Lengths of documents in a row of 1M tokens, all of them modelled: web pages and instruction data as
# lognormal distributions, code as a Pareto distribution, long documents among short ones, and books.
ROW = 1 << 20
DISTRIBUTIONS = {
    "web": lambda draw: draw.lognormal(6.5, 1.2, 20000),
    "instructions": lambda draw: draw.lognormal(6.0, 0.8, 20000),
    "code": lambda draw: draw.pareto(1.1, 20000) * 800,
    "books": lambda draw: draw.integers(20_000, 200_000, 200),
    "long and short": lambda draw: numpy.where(
        draw.random(20000) < 0.02, draw.integers(30_000, 120_000, 20000), draw.lognormal(7, 1, 20000)
    ),
    "half of the row": lambda draw: [ROW // 2 + 7, *draw.lognormal(6.5, 1.2, 20000)],
    "equal": lambda draw: [4096] * 256,
}


@pytest.mark.parametrize("cp", [8, 32, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_work_is_balanced_and_few_keys_are_passed(name: str, cp: int) -> None:
    for seed in range(3):
        starts = row_of(DISTRIBUTIONS[name](numpy.random.default_rng(seed)), ROW)
        placed = place(starts, ROW, cp)
        assert placed.imbalance <= BALANCED, seed
        # A document needs as many ranks as have room for its tokens and, at the mean work, for its work.
        lengths = numpy.diff([*starts, ROW])
        work = lengths * (lengths + 1) / 2
        ranks = numpy.maximum(-(-lengths * cp // ROW), numpy.ceil(work * cp / work.sum() / BALANCED))
        least = int(((ranks - 1) * lengths).sum())
        assert placed.passed <= 2 * least + 2 * ROW, seed


def test_mixed_is_balanced_to_a_token() -> None:
    """Where the documents are few, and whole documents are not balanced."""
    for seed in range(5):
        starts = row_of(DISTRIBUTIONS["long and short"](numpy.random.default_rng(seed)), ROW)
        for cp in (8, 64):
            mixed = placement._Mixed([*starts, ROW], cp).placement()
            check(mixed, starts, ROW, cp)
            assert mixed.imbalance < 1.001


@pytest.mark.parametrize(("cp", "ranks_per_node"), [(8, 4), (64, 8), (6, 4), (9, 8), (4, 8)])
def test_ranks_that_share_documents_are_in_one_node(cp: int, ranks_per_node: int) -> None:
    """The same parts on ranks in another order; with nodes, fewer keys go from one to another."""
    length = cp * 4096
    for seed in range(3):
        starts = row_of(numpy.random.default_rng(seed).lognormal(7, 1, 20000), length)
        alone, together = place(starts, length, cp), place(starts, length, cp, ranks_per_node)
        check(together, starts, length, cp)
        assert sorted(together.runs) == sorted(alone.runs)

        def far(placed: Placement) -> int:
            return sum(
                step.tokens_sent
                for rank, mine in enumerate(placed.schedules)
                for step in mine.steps
                if step.to // ranks_per_node != rank // ranks_per_node
            )

        assert far(together) <= 1.05 * far(alone), "an estimate decides"


def test_mistakes() -> None:
    with pytest.raises(UserError, match="a row of 10 tokens cannot be divided by 4 context-parallel ranks"):
        place([0], 10, 4)
    for starts in ([], [1], [0, 5, 5], [0, 10], [0, 7, 3]):
        with pytest.raises(UserError, match="are not 0 followed by ascending positions below .* length 10"):
            place(starts, 10, 2)
    with pytest.raises(UserError, match=r"starts \[0, 1, 2, 3, 4, \.\.\.\] are not"):
        place(range(11), 10, 2)
