"""What ranks compute and send for placed documents: literally for a small row, and as a mask for random
ones."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_ultralong.context_parallel.placement import place
from megatron_ultralong.context_parallel.zigzag import AttentionBlock


def test_a_long_document_among_short_ones() -> None:
    """Four ranks of four tokens: a document of 13, whose parts are on all ranks, and three of one."""
    placement = place([0, 13, 14, 15], 16, 4)
    assert placement.holders == {0: (0, 1, 2, 3)}
    held = [placement.positions(rank).tolist() for rank in range(4)]
    assert sorted(itertools.chain(*held)) == list(range(16)) and all(len(x) == 4 for x in held)
    for rank, mine in enumerate(placement.schedules):
        assert mine.own[0] == AttentionBlock(slice(0, mine.own[0].queries.stop), mine.own[0].keys, True)
        for step in mine.steps:
            sent = [held[rank][at] for rows in step.sent for at in range(rows.start, rows.stop)]
            later = [at for at in held[step.to] if at < 13]
            assert all(any(key < query for query in later) for key in sent)
            assert (step.to - rank) % 4 == (rank - step.source) % 4


@pytest.mark.parametrize("seed", range(30))
def test_what_is_seen_is_the_causal_mask_inside_documents(seed: int) -> None:
    choose = random.Random(seed)
    ranks = choose.choice([1, 2, 3, 4, 5, 8])
    length = ranks * choose.randint(1, 40)
    count = choose.randint(1, min(length, 12))
    starts = [0, *sorted(choose.sample(range(1, length), count - 1))]
    placement = place(starts, length, ranks, ranks_per_node=choose.choice([1, 2, 4]))
    document = torch.bucketize(torch.arange(length), torch.tensor(starts), right=True)
    held = [placement.positions(rank) for rank in range(ranks)]
    planned = placement.schedules
    assert len({tuple(len(steps) for steps in one.rounds) for one in planned}) == 1, "the same on all ranks"
    for rank, mine in enumerate(planned):
        seen = torch.zeros(length // ranks, length, dtype=torch.int64)
        assert [block.queries.start for block in mine.own] == [0, *(b.queries.stop for b in mine.own[:-1])]
        for block in mine.own:
            size = block.queries.stop - block.queries.start
            seen[block.queries, held[rank][block.keys]] += torch.ones(size, size, dtype=torch.int64).tril()
        for number, step in enumerate(mine.steps):
            there = planned[step.source].steps[number]
            assert there.to == rank and there.tokens_sent == step.received
            keys = torch.cat([held[step.source][rows] for rows in there.sent]) if there.sent else None
            for block in step.blocks:
                assert keys is not None and not block.causal
                seen[block.queries, keys[block.keys]] += 1
        queries = held[rank][:, None]
        want = (queries >= torch.arange(length)) & (document[held[rank]][:, None] == document)
        assert torch.equal(seen, want.long())
