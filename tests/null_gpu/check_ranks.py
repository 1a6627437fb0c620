"""Four ranks: what they ask NCCL for, and the buffers of context parallelism.

A training and a validation step of a small model on nine layouts. The ranks must ask for the same
collectives in the same order, no queue may wait for ever, and no buffer may be written or freed before the
send, collective or kernel that uses it has been waited for. Then steps of attention with planted bugs, each
of which must be found.
"""

from __future__ import annotations

import pytest

from tests.null_gpu import collectives, races
from tests.null_gpu.ranks import Parts, run_ranks

LAYOUTS = (
    "TP 2, CP 2, query chunks",
    "TP 2, PP 2",
    "CP 4, ring, documents",
    "CP 4, all-gather",
    "CP 4, all-to-all",
    "CP 4, all-to-all and ring",
    "PP 2, CP 2",
    "PP 2 interleaved, CP 2",
    "DP 2, CP 2",
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    parts = run_ranks("tests.null_gpu.rank_runs", "train_steps", tmp_path_factory.mktemp("steps"))
    assert tuple(parts) == LAYOUTS
    return parts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_ask_for_the_same(steps: Parts, layout: str) -> None:
    ranks = steps[layout]
    print(layout, [dict(collectives.counts(calls)) for calls in ranks])
    assert all(collectives.counts(calls).total() > 20 for calls in ranks)
    assert not collectives.differences(ranks)
    assert collectives.deadlock(ranks) is None
    assert collectives.deadlock(ranks, one_queue=True) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_buffer_is_reused_too_early(steps: Parts, layout: str) -> None:
    assert [races.find(calls) for calls in steps[layout]] == [{}] * 4
