"""The loader: the same samples in every step on every layout, exact resume, context parallel shares that make
up the whole."""

from __future__ import annotations

from dataclasses import fields
from fractions import Fraction
from itertools import islice

import pytest
import torch

from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.data import loader
from megatron_ultralong.data.packed_rows import BlendedDataset, PackedDataset
from megatron_ultralong.errors import UserError
from tests.packed import joined
from tests.text import write_rows

S = 24
SHARD = [field.name for field in fields(loader.BatchShard)]


@pytest.fixture
def rows(tmp_path) -> BlendedDataset:
    """Two sets; every token of every row is another number, and some rows have masked targets."""

    def ids(base: int, count: int) -> list[list[int]]:
        return [[base + 100 * i + j for j in range(S + 1)] for i in range(count)]

    masks = [[(i + j) % 5 != 0 for j in range(S + 1)] for i in range(13)]
    prefixes = write_rows(tmp_path / "a", ids(0, 13), masks), write_rows(tmp_path / "b", ids(5000, 6))
    return BlendedDataset([PackedDataset(prefix, S) for prefix in prefixes], [Fraction(3), Fraction(1)])


def take(rows: BlendedDataset, count: int, **settings) -> list[loader.Batch]:
    shard = loader.BatchShard(**{name: settings.pop(name) for name in SHARD if name in settings})
    settings = {"consumed": 0, "seed": 7, **settings}
    return list(islice(loader.batches(rows, shard, **settings), count))


def starts(batches: list[loader.Batch]) -> list[int]:
    """First token of each sequence: which row it is."""
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


def test_a_batch_is_the_row_shifted_with_its_mask(rows):
    for n, batch in enumerate(take(rows, 40)):
        which, row = rows.locate(n, 7)
        tokens, mask = rows.datasets[which][row]
        assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
            "tokens": (torch.int64, (1, S)),
            "labels": (torch.int64, (1, S)),
            "loss_mask": (torch.float32, (1, S)),
        }
        assert (
            batch["tokens"][0].tolist() == tokens[:-1].tolist()
            and batch["labels"][0].tolist() == tokens[1:].tolist()
        )
        assert batch["loss_mask"][0].tolist() == ([1.0] * S if mask is None else mask[1:].tolist())
        assert torch.equal(batch["labels"], batch["tokens"] + 1)
    assert 0 < batch["loss_mask"].mean() <= 1


def test_the_same_again_and_another_seed(rows):
    assert all(torch.equal(a[name], b[name]) for a, b in zip(take(rows, 30), take(rows, 30)) for name in a)
    assert starts(take(rows, 30)) != starts(take(rows, 30, seed=8))
    assert starts(take(rows, 4, shuffle=False)) == [0, 100, 5000, 200]


@pytest.mark.parametrize("dp, micro_batch", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_a_step_has_the_same_samples_on_every_layout(rows, dp, micro_batch):
    """8 sequences a step, 6 steps; after 2 of them the run goes on with another data parallel size."""
    want = [sorted(starts(take(rows, 8, consumed=8 * step))) for step in range(6)]
    assert want == [sorted(starts(take(rows, 48)[8 * step : 8 * step + 8])) for step in range(6)]

    def steps(first: int, last: int, dp: int, micro_batch: int) -> list[list[int]]:
        count = 8 // (dp * micro_batch)
        ranks = [
            take(rows, count * (last - first), consumed=8 * first, dp=dp, dp_rank=r, micro_batch=micro_batch)
            for r in range(dp)
        ]
        assert all(len(batch["tokens"]) == micro_batch for rank in ranks for batch in rank)
        return [
            sorted(n for rank in ranks for n in starts(rank[count * i : count * i + count]))
            for i in range(last - first)
        ]

    assert steps(0, 6, dp, micro_batch) == want
    assert steps(0, 2, dp, micro_batch) + steps(2, 6, 2, 2) == want
    assert steps(0, 2, 4, 1) + steps(2, 6, dp, micro_batch) == want


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_context_parallel_shares_make_up_the_whole(rows, cp):
    whole = take(rows, 12, micro_batch=2, dp=2, dp_rank=1)
    shares = [take(rows, 12, micro_batch=2, dp=2, dp_rank=1, cp=cp, cp_rank=r) for r in range(cp)]
    for i, batch in enumerate(whole):
        for name, x in batch.items():
            parts = [share[i][name] for share in shares]
            assert all(part.shape == (2, S // cp) and part.is_contiguous() for part in parts)
            assert torch.equal(zigzag.unshard(parts, dim=1), x)
    if cp == 2:  # the zigzag as literal data: of four pieces of 6, rank 0 holds the first and the last
        first = whole[0]["tokens"][0, 0]
        assert (shares[0][0]["tokens"][0] - first).tolist() == [*range(6), *range(18, 24)]
        assert (shares[1][0]["labels"][0] - first).tolist() == list(range(7, 19)), (
            "labels are shifted before they are shared out"
        )


def test_layouts_that_do_not_fit_are_refused(rows):
    with pytest.raises(UserError, match="not divisible by 2 x"):
        take(rows, 1, cp=5)


@pytest.mark.parametrize("dp, micro_batch, multiple", [(1, 1, 1), (2, 1, 1), (2, 3, 1), (4, 2, 2), (3, 5, 4)])
@pytest.mark.parametrize("eval_rows", [1, 7, 100])
def test_validation_rows_are_counted_once_each(rows, dp, micro_batch, multiple, eval_rows):
    want = rows.first(eval_rows)
    seen, numbers, targets = [], set(), 0.0
    for rank in range(dp):
        shard = loader.BatchShard(micro_batch=micro_batch, dp=dp, dp_rank=rank)
        iterators, count = loader.validation_batches(rows, eval_rows, shard, copies=2, multiple=multiple)
        batches = list(iterators[0])
        assert len(batches) == count and count % multiple == 0
        numbers.add(count)
        for batch, again in zip(batches, iterators[1], strict=True):
            assert all(torch.equal(batch[name], again[name]) for name in batch)
            targets += float(batch["loss_mask"].sum())
            seen += [int(row[0]) for row, mask in zip(batch["tokens"], batch["loss_mask"]) if mask.any()]
    assert len(numbers) == 1, "as many micro-batches on every rank"
    assert sorted(seen) == sorted(int(rows.datasets[which][row][0][0]) for which, row in want)
    masks = [rows.datasets[which][row][1] for which, row in want]
    assert targets == sum(S if mask is None else int(mask[1:].sum()) for mask in masks)


def test_validation_shares(rows):
    def share(**layout) -> list[loader.Batch]:
        return list(loader.validation_batches(rows, 5, loader.BatchShard(micro_batch=2, **layout))[0][0])

    whole, shares = share(), [share(cp=2, cp_rank=r) for r in range(2)]
    assert len(whole) == 3
    for i, batch in enumerate(whole):
        assert all(
            torch.equal(zigzag.unshard([share[i][name] for share in shares], dim=1), x)
            for name, x in batch.items()
        )


def test_leaving_the_iterator_ends_its_thread(rows):
    import threading

    before = threading.active_count()
    batches = loader.batches(rows, loader.BatchShard(), consumed=0, seed=7)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_rows_come_with_their_placement(tmp_path):
    begins = [[0, 5, 6], [0], [0, 1, S]]  # S is the last token, a label only
    prefix = write_rows(
        tmp_path / "docs", [[100 * i + j for j in range(S + 1)] for i in range(3)], starts=begins
    )
    rows = BlendedDataset([PackedDataset(prefix, S)])
    found = take(rows, 3, shuffle=False, inside_documents=True)
    assert starts_of(found) == [[0, 5, 6], [0], [0, 1]]
    assert [(batch["loss_mask"][0] == 0).nonzero().flatten().tolist() for batch in found] == [
        [4, 5],
        [],
        [0, S - 1],
    ], "first tokens are no targets"
    for ulysses in (1, 2):
        shard = {"inside_documents": True, "cp": 4, "ulysses": ulysses}
        shares = [take(rows, 3, shuffle=False, cp_rank=rank, **shard)[0] for rank in range(4)]
        assert starts_of(shares) == [[0, 5, 6]] * 4, "starts are those of the whole row on every rank"
        for name in ("tokens", "labels", "loss_mask"):
            parts = [share[name] for share in shares]
            assert torch.equal(joined(parts, [0, 5, 6], ulysses, dim=1), found[0][name])
    shards = [loader.BatchShard(dp=2, dp_rank=rank, inside_documents=True) for rank in (0, 1)]
    [places], count = loader.validation_batches(rows, 3, shards[0])
    assert count == 2 and starts_of(list(places)) == [[0, 5, 6], [0, 1]]
    [padding], _ = loader.validation_batches(rows, 3, shards[1])
    assert starts_of(list(padding)) == [[0], [0]]
    assert "placement" not in take(rows, 1)[0]


def starts_of(batches: list[loader.Batch]) -> list[list[int]]:
    """The documents of each row; a row of one has no placement."""
    return [[0] if (row := batch["placement"]) is None else list(row.starts) for batch in batches]
