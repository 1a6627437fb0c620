"""Four ranks: what they ask NCCL for, and the buffers of context parallelism.

A training and a validation step of a small model on nine layouts. The ranks must ask for the same
collectives in the same order, no queue may wait for ever, and no buffer may be written or freed before the
send, collective or kernel that uses it has been waited for. Then steps of attention with planted bugs, each
of which must be found.
"""

from __future__ import annotations

import re

import pytest

from tests.null_gpu import collectives, races
from tests.null_gpu.ranks import Parts, run_ranks

LAYOUTS = (
    "TP 2, CP 2, query chunks",
    "TP 2, PP 2",
    "CP 4, ring, documents",
    "CP 4, ring, documents, two nodes",
    "CP 4, documents, query chunks",
    "CP 4, all-to-all and ring, documents",
    "CP 4, all-gather",
    "CP 4, all-to-all",
    "CP 4, all-to-all and ring",
    "PP 2, CP 2",
    "PP 2 interleaved, CP 2",
    "DP 2, CP 2",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return run_ranks("tests.null_gpu.rank_runs", "everything", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_ask_for_the_same(parts: Parts, layout: str) -> None:
    ranks = parts[layout]
    print(layout, [dict(collectives.counts(calls)) for calls in ranks])
    assert all(collectives.counts(calls).total() > 20 for calls in ranks)
    assert not collectives.differences(ranks)
    assert collectives.deadlock(ranks) is None
    assert collectives.deadlock(ranks, one_queue=True) is None


# What is still on the device as it is fetched may be freed while its copy to the host runs, whose result
# nobody reads: `OffloadedTensors.fetch`.
FREED_WHILE_COPIED = re.compile(r"memory is freed that aten::copy_ \(offload\.py:\d+\) uses")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_buffer_is_reused_too_early(parts: Parts, layout: str) -> None:
    for calls in parts[layout]:
        found = races.find(calls)
        assert not [race for race in found if not FREED_WHILE_COPIED.fullmatch(race)]


METHODS = ["ring", "all-gather", "all-to-all", "all-to-all and ring"]


@pytest.mark.parametrize("method", METHODS)
def test_attention_has_no_bug(parts: Parts, method: str) -> None:
    ranks = parts[method]
    assert not collectives.differences(ranks)
    assert collectives.deadlock(ranks, one_queue=True) is None
    assert [races.find(calls) for calls in ranks] == [{}] * 4


@pytest.mark.parametrize(
    ("bug", "race"),
    [
        ("ring not waited for", r"reads what recv \(comm.py:\d+\) writes"),
        ("ring reused one hop early", r"reads what recv \(comm.py:\d+\) writes"),
        ("all-gather freed before sent", r"memory is freed that all_gather \(comm.py:\d+\) uses"),
        ("all-gather not waited for", r"reads what all_gather \(comm.py:\d+\) writes"),
        ("all-to-all not waited for", r"reads what all_to_all \(comm.py:\d+\) writes"),
    ],
)
def test_buffers_that_are_used_too_early_are_found(parts: Parts, bug: str, race: str) -> None:
    for calls in parts[bug]:
        found = races.find(calls)
        assert any(re.search(race, line) for line in found), found


def test_another_order_is_found(parts: Parts) -> None:
    [*found] = collectives.differences(parts["all-to-all other order on one rank"])
    assert found and all("rank 1" in line or "1 to" in line for line in found)


@pytest.mark.parametrize(("method", "one_queue"), [("all-to-all and ring", False), ("ring", True)])
def test_deadlocks_are_found(parts: Parts, method: str, one_queue: bool) -> None:
    """Of two ranks, whose two directions share a stream; and of four, if all streams share a queue."""
    ranks = parts[f"{method} sent before received"]
    assert not collectives.differences(ranks)
    found = collectives.deadlock(ranks, one_queue)
    assert found is not None and found.startswith("deadlock: {0: ['send")
