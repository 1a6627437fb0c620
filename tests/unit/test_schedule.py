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
            sent = [held[rank][at] for rows in step.rows for at in range(rows.start, rows.stop)]
            later = [at for at in held[step.to] if at < 13]
            assert all(any(key < query for query in later) for key in sent)
            assert (step.to - rank) % 4 == (rank - step.source) % 4


@pytest.mark.parametrize("seed", range(60))
def test_what_is_seen_is_the_causal_mask_inside_documents(seed: int) -> None:
    choose = random.Random(seed)
    ranks = choose.choice([1, 2, 3, 4, 5, 8, 9, 12])
    length = ranks * choose.randint(1, 40)
    count = choose.randint(1, min(length, 12))
    starts = [0, *sorted(choose.sample(range(1, length), count - 1))]
    placement = place(starts, length, ranks, ranks_per_node=choose.choice([1, 2, 4]))
    document = torch.bucketize(torch.arange(length), torch.tensor(starts), right=True)
    held = [placement.positions(rank) for rank in range(ranks)]
    planned = placement.schedules
    assert len({tuple((one.kind, len(one.steps)) for one in mine.rounds) for mine in planned}) == 1
    seen = [torch.zeros(length // ranks, length, dtype=torch.int64) for _ in range(ranks)]
    for rank, mine in enumerate(planned):
        assert [block.queries.start for block in mine.own] == [0, *(b.queries.stop for b in mine.own[:-1])]
        for block in mine.own:
            size = block.queries.stop - block.queries.start
            seen[rank][block.queries, held[rank][block.keys]] += torch.ones(size, size).tril().long()
    relayed = [torch.zeros(0, dtype=torch.int64)] * ranks
    for number in range(len(planned[0].rounds)):
        arrived = []
        for rank, mine in enumerate(planned):
            this = mine.rounds[number]
            talks_to = [step.to for step in this.steps if step.tokens_sent]
            assert len(set(talks_to)) == len(talks_to), "one message to each"
            messages = []
            for at, step in enumerate(this.steps):
                sender = planned[step.source].rounds[number].steps[at]
                assert sender.tokens_sent == step.tokens_received <= 5 * length // ranks // 4
                assert sender.to == rank or not step.received
                assert not sender.forwarded or this.kind == "forwards"
                parts = [held[step.source][rows] for rows in sender.rows]
                kept = torch.cat(
                    [held[step.source][:0], *(held[step.source][x] for x in planned[step.source].sent)]
                )
                assert [x for rows in sender.sent for x in kept[rows]] == [x for part in parts for x in part]
                parts += [relayed[step.source][keys] for keys in sender.forwarded]
                messages.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64))
            assert this.tokens == sum(map(len, messages))
            message = torch.cat([torch.zeros(0, dtype=torch.int64), *messages])
            arrived.append(torch.cat([message[:0], *(message[part] for part in this.parts)]))
            assert this.in_order == (this.parts == sorted(this.parts, key=lambda part: part.start))
            for block in this.blocks:
                assert not block.causal
                seen[rank][block.queries, arrived[-1][block.keys]] += 1
        if planned[0].rounds[number].kind == "relayed":
            relayed = arrived
    for rank, found in enumerate(seen):
        queries = held[rank][:, None]
        want = (queries >= torch.arange(length)) & (document[held[rank]][:, None] == document)
        assert torch.equal(found, want.long())


def test_a_key_crosses_to_a_node_once() -> None:
    """One document on 4 nodes of 2 ranks: each key goes at most once to each other node, and no rank receives
    one twice."""
    placement = place([0, 4000], 4096, 8, ranks_per_node=2)
    assert placement.holders[0] == tuple(range(8))
    kinds = [one.kind for one in placement.schedules[0].rounds]
    assert kinds == ["relayed", "forwards"] * 3 + ["direct"]
    for rank, mine in enumerate(placement.schedules):
        far = [step for step in mine.steps if step.to // 2 != rank // 2 and step.rows]
        assert len({step.to // 2 for step in far}) == len(far) == 3
        assert sum(step.tokens_sent for step in far) <= 3 * 512
        assert sum(step.tokens_received for step in mine.steps) <= 7 * 512
