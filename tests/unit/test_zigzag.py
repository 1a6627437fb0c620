"""The zigzag order and its blocks of attention, as literal lists."""

from __future__ import annotations

import pytest
import torch

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.errors import UserError

# Sequence of 16 tokens; what each rank holds, in its local order.
HELD = {
    1: [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]],
    2: [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]],
    4: [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
    8: [[0, 15], [1, 14], [2, 13], [3, 12], [4, 11], [5, 10], [6, 9], [7, 8]],
}


@pytest.mark.parametrize("cp", HELD)
def test_positions_and_shards_are_these(cp: int) -> None:
    tokens = torch.arange(16) * 10
    for rank, held in enumerate(HELD[cp]):
        positions = zigzag.positions(16, rank, cp)
        assert positions.dtype == torch.int64 and positions.tolist() == held
        assert zigzag.shard(tokens, rank, cp, 0).tolist() == [10 * p for p in held]


def test_odd_chunks() -> None:
    assert zigzag.positions(18, 0, 3).tolist() == [0, 1, 2, 15, 16, 17]
    assert zigzag.positions(18, 1, 3).tolist() == [3, 4, 5, 12, 13, 14]
    assert zigzag.positions(18, 2, 3).tolist() == [6, 7, 8, 9, 10, 11]
    assert zigzag.positions(7, 0, 1).tolist() == [0, 1, 2, 3, 4, 5, 6]  # one rank: nothing to divide


def test_positions_are_exact_at_four_million_tokens() -> None:
    last = zigzag.positions(4_194_304, 0, 16)
    assert last[-1] == 4_194_303 and last[131_072] == 4_063_232 and (last.diff() > 0).all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_is_the_inverse_along_any_dimension(dim: int) -> None:
    x = torch.randn(24, 12, 24)
    for cp in (1, 2, 3):
        shards = [zigzag.shard(x, rank, cp, dim) for rank in range(cp)]
        assert all(s.shape[dim] == x.shape[dim] // cp for s in shards)
        assert torch.equal(zigzag.unshard(shards, dim), x)


def test_unshard_literally() -> None:
    shards = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    assert zigzag.unshard(shards, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("cp", "chunk"), [(1, 7), (2, 1), (2, 3), (3, 2), (4, 1), (8, 3)])
def test_blocks_are_exactly_the_causal_mask(cp: int, chunk: int) -> None:
    length = chunk * 2 * cp if cp > 1 else chunk
    s = length // cp
    for rank in range(cp):
        queries = zigzag.positions(length, rank, cp)
        work = 0
        for source in range(cp):
            keys = zigzag.positions(length, source, cp)
            block = zigzag.block_between(rank, source, s)
            seen = torch.zeros(s, s, dtype=torch.bool)
            pairs = torch.ones_like(seen[block.queries, block.keys])
            seen[block.queries, block.keys] = pairs.tril() if block.causal else pairs
            assert torch.equal(seen, queries[:, None] >= keys[None, :])
            work += int(seen.sum())
        assert cp == 1 or abs(work - length * (length + 1) / 2 / cp) <= s / 2  # the same work on every rank


# ---- groups inside the group -------------------------------------------------------------------


def test_groups_are_these() -> None:
    assert zigzag.ulysses_ranks(8, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert zigzag.ring_ranks(8, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert zigzag.ulysses_ranks(4, 4) == [[0, 1, 2, 3]] and zigzag.ring_ranks(4, 4) == [[0], [1], [2], [3]]
    assert zigzag.ulysses_ranks(4, 1) == [[0], [1], [2], [3]] and zigzag.ring_ranks(4, 1) == [[0, 1, 2, 3]]
    for groups in (zigzag.ulysses_ranks, zigzag.ring_ranks):
        with pytest.raises(
            UserError,
            match=r"6 context parallel ranks are not divisible by 4 ranks of all-to-all: set parallel\.ulysses",
        ):
            groups(6, 4)


def test_what_two_adjacent_ranks_of_four_hold_is_what_one_of_two_holds() -> None:
    shards = [torch.tensor(held) for held in HELD[4]]
    assert zigzag.unshard(shards[:2], 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert zigzag.unshard(shards[2:], 0).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("cp", HELD)
def test_the_order_nests(cp: int) -> None:
    for ulysses in (u for u in (1, 2, 4, 8) if cp % u == 0):
        for ring_rank, ranks in enumerate(zigzag.ulysses_ranks(cp, ulysses)):
            union = zigzag.unshard([torch.tensor(HELD[cp][rank]) for rank in ranks], 0)
            assert union.tolist() == HELD[cp // ulysses][ring_rank]
            for place, rank in enumerate(ranks):  # and back
                assert zigzag.shard(union, place, ulysses, 0).tolist() == HELD[cp][rank]


@pytest.mark.parametrize(("cp", "chunk"), [(2, 1), (2, 3), (3, 2), (4, 5), (8, 3)])
def test_blocks_of_gathered_keys_are_exactly_the_causal_mask(cp: int, chunk: int) -> None:
    length, s = chunk * 2 * cp, 2 * chunk
    for rank in range(cp):
        queries = zigzag.positions(length, rank, cp)
        seen = torch.zeros(s, length, dtype=torch.int64)
        for block in zigzag.past_blocks(rank, s, cp):
            seen[block.queries, block.keys] += 1
        for block in zigzag.diagonal_blocks(s):
            assert block.causal and block.queries == block.keys
            seen[block.queries, queries[block.keys]] += torch.ones(chunk, chunk, dtype=torch.int64).tril()
        assert torch.equal(seen, (queries[:, None] >= torch.arange(length)).long())


def test_a_sequence_that_does_not_divide_is_refused_in_one_line() -> None:
    for call in (lambda: zigzag.positions(30, 0, 4), lambda: zigzag.shard(torch.zeros(2, 30), 3, 4, 1)):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == (
            "sequence length 30 is not divisible by 2 x context parallel size = 8; "
            "the nearest that are: 24 and 32"
        )
    with pytest.raises(UserError, match=r"the nearest that are: 8$"):
        zigzag.positions(3, 0, 4)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        zigzag.positions(16, 2, 2)
    with pytest.raises(ValueError, match="not the zigzag shards"):
        zigzag.unshard([torch.zeros(4), torch.zeros(6)], 0)
    with pytest.raises(ValueError, match="not the zigzag shards"):
        zigzag.unshard([], 0)
