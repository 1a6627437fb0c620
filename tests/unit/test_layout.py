"""The zigzag order, as literal lists."""

from __future__ import annotations

import pytest
import torch

from megatron_ultralong.config import UserError
from megatron_ultralong.context_parallel import layout

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
        positions = layout.positions(16, rank, cp)
        assert positions.dtype == torch.int64 and positions.tolist() == held
        assert layout.shard(tokens, rank, cp, 0).tolist() == [10 * p for p in held]


def test_odd_pieces() -> None:
    assert layout.positions(18, 0, 3).tolist() == [0, 1, 2, 15, 16, 17]
    assert layout.positions(18, 1, 3).tolist() == [3, 4, 5, 12, 13, 14]
    assert layout.positions(18, 2, 3).tolist() == [6, 7, 8, 9, 10, 11]
    assert layout.positions(7, 0, 1).tolist() == [0, 1, 2, 3, 4, 5, 6]  # nothing to divide with one rank


def test_positions_are_exact_at_four_million_tokens() -> None:
    last = layout.positions(4_194_304, 0, 16)
    assert last[-1] == 4_194_303 and last[131_072] == 4_063_232 and (last.diff() > 0).all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_is_the_inverse_along_any_dimension(dim: int) -> None:
    x = torch.randn(24, 12, 24)
    for cp in (1, 2, 3):
        shards = [layout.shard(x, rank, cp, dim) for rank in range(cp)]
        assert all(s.shape[dim] == x.shape[dim] // cp for s in shards)
        assert torch.equal(layout.unshard(shards, dim), x)


def test_unshard_literally() -> None:
    shards = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    assert layout.unshard(shards, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("cp", "piece"), [(1, 7), (2, 1), (2, 3), (3, 2), (4, 1), (8, 3)])
def test_parts_are_exactly_the_causal_mask(cp: int, piece: int) -> None:
    length = piece * 2 * cp if cp > 1 else piece
    s = length // cp
    for rank in range(cp):
        queries = layout.positions(length, rank, cp)
        work = 0
        for source in range(cp):
            keys = layout.positions(length, source, cp)
            part = layout.part(rank, source, s)
            seen = torch.zeros(s, s, dtype=torch.bool)
            block = torch.ones_like(seen[part.queries, part.keys])
            seen[part.queries, part.keys] = block.tril() if part.causal else block
            assert torch.equal(seen, queries[:, None] >= keys[None, :])
            work += int(seen.sum())
        assert cp == 1 or abs(work - length * (length + 1) / 2 / cp) <= s / 2  # the same work on every rank


def test_a_sequence_that_does_not_divide_is_refused_in_one_line() -> None:
    for call in (lambda: layout.positions(30, 0, 4), lambda: layout.shard(torch.zeros(2, 30), 3, 4, 1)):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == ("sequence length 30 is not divisible by 2 x context parallel size = 8; "
                                    "the nearest that are: 24 and 32")
    with pytest.raises(UserError, match=r"the nearest that are: 8$"):
        layout.positions(3, 0, 4)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        layout.positions(16, 2, 2)
    with pytest.raises(ValueError, match="not the zigzag shares"):
        layout.unshard([torch.zeros(4), torch.zeros(6)], 0)
    with pytest.raises(ValueError, match="not the zigzag shares"):
        layout.unshard([], 0)
