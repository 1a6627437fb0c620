"""Packed rows: what is refused and how it is said; blends: shares of the weights, and every row before one
comes again."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy
import pytest

from megatron_ultralong.data.packed_rows import (
    BlendedDataset,
    PackedDataset,
    open_blend,
    parse_data_arguments,
)
from megatron_ultralong.errors import UserError
from tests.text import write_rows


def rows_of(folder: Path, *sizes: int, weights: list[str] | None = None) -> BlendedDataset:
    """Sets of rows of S = 3; set k's row i is [100 k + i, 0, 0, 0]."""
    sets = [
        PackedDataset(write_rows(folder / f"set{k}", [[100 * k + i, 0, 0, 0] for i in range(size)]), 3)
        for k, size in enumerate(sizes)
    ]
    return BlendedDataset(sets, None if weights is None else [Fraction(w) for w in weights])


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_rows_and_masks_are_read(tmp_path, dtype):
    ids, masks = [[1, 2, 3, 65_000], [5, 6, 7, 8]], [[1, 1, 1, 1], [1, 1, 0, 0]]
    for prefix in (
        write_rows(tmp_path / "a", ids, masks, dtype),
        write_rows(tmp_path / "b", ids, None, dtype),
    ):
        rows = PackedDataset(prefix, 3)
        for again in (rows, pickle.loads(pickle.dumps(rows))):
            assert len(again) == 2
            for i in range(2):
                tokens, mask = again[i]
                assert tokens.tolist() == ids[i] and tokens.dtype == dtype
                assert (mask is None) == rows.prefix.endswith("b") and (
                    mask is None or mask.tolist() == masks[i]
                )


def test_rows_of_another_length_are_refused(tmp_path):
    prefix = write_rows(tmp_path / "a", [[1] * 9, [1] * 9])
    with pytest.raises(
        UserError,
        match="a has rows of 9 tokens, but sequence length 4096 requires 4097; repack .*-length 4096",
    ):
        PackedDataset(prefix, 4096)
    with pytest.raises(UserError, match="has rows of 8 tokens"):
        PackedDataset(write_rows(tmp_path / "b", [[1] * 9, [1] * 8]), 8)  # a ragged corpus
    with pytest.raises(UserError, match=r"a.mask has rows of 8"):
        PackedDataset(write_rows(tmp_path / "a", [[1] * 9], [[1] * 8]), 8)
    with pytest.raises(UserError, match=r"a.mask does not belong"):
        PackedDataset(write_rows(tmp_path / "a", [[1] * 9] * 2, [[1] * 9]), 8)


def test_another_vocabulary_is_refused(tmp_path):
    rows = PackedDataset(write_rows(tmp_path / "a", [[1, 2, 3, 99]]), 3)
    rows.check_vocabulary(100)
    with pytest.raises(
        UserError,
        match="a contains token id 99, but the model has a vocabulary of 99; it was made with by-hand",
    ):
        rows.check_vocabulary(99)
    with pytest.raises(UserError, match="contains token id 99"):
        open_blend([rows.prefix], 3, 50)


def test_missing_and_broken_files_are_told(tmp_path):
    prefix = write_rows(tmp_path / "a", [[1, 2, 3, 4]] * 2, [[1, 1, 1, 0]] * 2)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            PackedDataset(prefix, 3)
        assert "\n" not in str(error.value)
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)

    for name in ("a.bin", "a.idx", "a.mask.bin", "a.mask.idx"):
        (tmp_path / name).unlink()
        refused(f"{name} cannot be read: No such file")
        if name.endswith(".bin"):
            (tmp_path / name).write_bytes(good[name][:-1])
            refused(f"{name} does not have the length that {name[:-4]}.idx says; prepare the data again")
        else:
            (tmp_path / name).write_bytes(b"nonsense")
            refused(f"{name} is not a Megatron index")
            (tmp_path / name).write_bytes(good[name][:-8])
            refused(f"{name} was cut short")
    (tmp_path / "a.json").unlink()
    refused("a.json is missing; make packed rows with `ultralong prepare`")
    for text in ("", "[]", "{}", '{"format": "x", "max_token_id": 1}'):
        (tmp_path / "a.json").write_text(text)
        refused("a.json is not a manifest")
    (tmp_path / "a.json").write_text(json.dumps({"format": 2, "max_token_id": 1}))
    refused(r"unsupported format version 2 \(expected 1 or less\)")
    (tmp_path / "a.bin").write_bytes(b"")
    refused("a contains no rows")
    for end in (".bin", ".idx", ".json"):
        with pytest.raises(UserError, match=f"give the prefix without {end}"):
            PackedDataset(prefix + end, 3)
    assert len(PackedDataset(prefix, 3)) == 2


# ---- blends ------------------------------------------------------------------------------------


def test_arguments_of_data():
    assert parse_data_arguments(["runs/a"]) == [(1, "runs/a")]
    assert parse_data_arguments(["0.3", "a", "2", "b", "1/3", "c"]) == [
        (Fraction(3, 10), "a"),
        (2, "b"),
        (Fraction(1, 3), "c"),
    ]
    for words, message in (
        ([], "nothing: expected PREFIX"),
        (["1", "a", "2"], "1 a 2: expected PREFIX, or WEIGHT PREFIX"),
        (["a", "b"], "a: expected a weight before b"),
        (["nan", "b"], "nan: expected a weight"),
        (["1/0", "b"], "1/0: expected a weight"),
        (["1", "a", "0", "b"], "weight 0 of b must be above 0"),
        (["-1", "a"], "weight -1 of a must be above 0"),
        (["1", "a", "2", "a"], "named twice"),
    ):
        with pytest.raises(UserError, match=message):
            parse_data_arguments(words)


def test_every_row_comes_once_an_epoch_in_a_new_order(tmp_path):
    rows = rows_of(tmp_path, 37)
    epochs = [[rows.locate(37 * e + i, seed=5)[1] for i in range(37)] for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(37)) and epochs[0] != list(range(37))
    assert [rows.locate(i, seed=6)[1] for i in range(37)] != epochs[0]
    assert [rows.locate(n, seed=5, shuffle=False)[1] for n in range(80)] == [n % 37 for n in range(80)]
    assert [rows.epoch(n) for n in (0, 36, 37, 73, 74)] == [0, 0, 1, 1, 2]


def test_the_order_is_the_same_on_every_machine(tmp_path):
    """The order is part of a checkpoint's meaning: written down here, so that no change of numpy or of ours
    goes unseen."""
    rows = rows_of(tmp_path, 10, 7)
    assert [rows.locate(n, seed=1234) for n in range(12)] == [
        (0, 5),
        (1, 2),
        (0, 6),
        (1, 0),
        (0, 3),
        (1, 6),
        (0, 9),
        (1, 1),
        (0, 7),
        (1, 4),
        (0, 4),
        (1, 5),
    ]


@pytest.mark.parametrize(
    "sizes, weights",
    [
        ((11, 5), ["1", "1"]),
        ((11, 5, 7), ["0.7", "0.2", "0.1"]),
        ((3, 50), ["0.999", "0.001"]),
        ((4, 4, 4, 4), ["1/3", "2", "5", "0.25"]),
    ],
)
def test_a_blend_keeps_the_weights_all_along_and_visits_every_row(tmp_path, sizes, weights):
    rows = rows_of(tmp_path, *sizes, weights=weights)
    total = sum(rows.weights)
    seen: Counter[int] = Counter()
    drawn: list[list[int]] = [[] for _ in sizes]
    for n in range(3000):
        which, row = rows.locate(n, seed=1)
        seen[which] += 1
        drawn[which].append(row)
        for k, weight in enumerate(rows.weights):
            assert abs(seen[k] - (n + 1) * weight / total) < len(sizes)
        if n % 500 == 0:
            assert rows.epoch(n + 1) == max(seen[k] // size for k, size in enumerate(sizes))
    for k, size in enumerate(sizes):
        for start in range(0, len(drawn[k]) - size + 1, size):
            assert sorted(drawn[k][start : start + size]) == list(range(size))
    assert seen.total() == 3000


def test_iterations_take_the_rows_of_one_dataset_in_turn(tmp_path):
    """data.mix=iterations with a global batch of 4."""
    datasets = rows_of(tmp_path, 11, 6)
    weights = [Fraction("0.75"), Fraction("0.25")]
    rows = BlendedDataset(datasets.datasets, weights, block_size=4)
    drawn = [rows.locate(n, seed=1) for n in range(4 * 40)]
    of_iteration = [{which for which, _ in drawn[n : n + 4]} for n in range(0, len(drawn), 4)]
    assert all(len(sets) == 1 for sets in of_iteration)
    turns = [sets.pop() for sets in of_iteration]
    one_by_one = BlendedDataset(datasets.datasets, weights)
    assert turns == [one_by_one.locate(n, seed=1)[0] for n in range(40)] and turns.count(1) == 10
    for which, size in ((0, 11), (1, 6)):
        taken = [row for dataset, row in drawn if dataset == which]
        assert sorted(taken[:size]) == list(range(size)), "every row once an epoch"
    for n in range(0, len(drawn), 4):
        counts = Counter(which for which, _ in drawn[:n])
        assert rows.epoch(n) == max(counts[0] // 11, counts[1] // 6)


def test_first_rows_are_the_same_ones_always(tmp_path):
    rows = rows_of(tmp_path, 20, 3, weights=["3", "1"])
    assert rows.first(8) == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4), (0, 5), (1, 1)]
    everything = rows.first(1000)
    assert sorted(everything) == [(0, i) for i in range(20)] + [(1, i) for i in range(3)] and len(rows) == 23
    assert rows_of(tmp_path, 5).first(3) == [(0, 0), (0, 1), (0, 2)]
