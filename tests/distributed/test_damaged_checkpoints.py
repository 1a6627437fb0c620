"""Checkpoints with files that are missing, short, zeroed, swapped or have one wrong bit: each is found, and
none is used."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_ultralong.checkpoint import integrity, run_directory, shard_writer, tensor_sums, torch_index
from megatron_ultralong.config import Parallel
from megatron_ultralong.errors import UserError
from tests.disk import fill, small_disk
from tests.distributed.test_resume import MODEL, _train
from tests.spawn import run_ranks

FLIPS = 20
"""Places in each file in which one bit is flipped."""


def test_every_damage_is_found(tmp_path: Path) -> None:
    run_ranks(_damage, 2, str(tmp_path))


def _damage(rank: int, world: int, folder: str) -> None:
    run, copy = Path(folder) / "run", Path(folder) / "copy"
    _train(MODEL, Parallel(tp=2), "fp32", run, iterations=4, save_every=2)
    older, newest = run_directory.complete_checkpoints(run)
    files = integrity.files_of(newest)
    assert {"run.json", ".metadata", "metadata.json"} < set(files) and any(
        ".distcp" in name for name in files
    )
    assert integrity.fault_on_all_ranks(newest) is None
    assert json.loads((newest / "run.json").read_text())["checksums"] == "sha256"

    found = 0
    for name in [*files, integrity.FILE]:
        for change in _changes(name):
            if rank == 0:
                shutil.copytree(newest, copy)
                change(copy / name)
            torch.distributed.barrier()
            fault = integrity.fault_on_all_ranks(copy)
            assert fault is not None, (name, change)
            # A changed list of checksums may name another file, or be no list any more.
            assert name in fault or name == integrity.FILE or "run.json" in fault, (name, fault)
            found += 1
            torch.distributed.barrier()
            if rank == 0:
                shutil.rmtree(copy)
            torch.distributed.barrier()
    assert found == (3 + FLIPS) * (len(files) + 1)

    _read_differently(rank, run, newest)
    _used_instead(rank, run, older, newest)
    _changed_before_it_was_hashed(rank, older)


def _changes(name: str) -> Iterator[Callable[[Path], None]]:
    yield Path.unlink
    yield lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) and None
    yield lambda file: file.write_bytes(bytes(file.stat().st_size)) and None
    random_places = random.Random(name)
    for _ in range(FLIPS):
        place, bit = random_places.random(), random_places.randrange(8)
        yield lambda file, place=place, bit=bit: flip(file, int(place * file.stat().st_size), bit)  # type: ignore[misc]


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def _read_differently(rank: int, run: Path, newest: Path) -> None:
    """Ranks that see different folders, or cannot read a file now, agree, and call nothing damaged."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(run_directory, "_iterations", lambda folder: [])
        assert run_directory.resolve_verified(run) == newest
        assert run_directory.newest_verified(run) == (newest, {})
    largest = max(integrity.files_of(newest), key=lambda name: (newest / name).stat().st_size)
    read = integrity.hash_file
    with pytest.MonkeyPatch.context() as patch:

        def stale(file: Path) -> integrity.FileSum:
            if file.name == largest:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return read(file)

        patch.setattr(integrity, "hash_file", stale)
        with pytest.raises(UserError, match=f"{largest} cannot be read: Stale file handle; start again"):
            run_directory.newest_verified(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrity, "_SMALL", 0)  # as for a large file
        if rank == 0:  # once wrong, then right
            wrong = [integrity.FileSum(bytes=1, sha256="x")]
            patch.setattr(
                integrity,
                "hash_file",
                lambda file: wrong.pop() if file.name == largest and wrong else read(file),
            )
        with pytest.raises(UserError, match=f"{largest} was read with different contents by two ranks"):
            run_directory.newest_verified(run)
    assert run_directory.complete_checkpoints(run)[-1] == newest


def _used_instead(rank: int, run: Path, older: Path, newest: Path) -> None:
    """A run directory's newest undamaged checkpoint is used; one that is named is refused."""
    data = sorted(newest.glob("*.distcp"))
    if rank == 0:  # swapped files, of equal size or not
        data[0].rename(newest / "x")
        data[1].rename(data[0])
        (newest / "x").rename(data[1])
    torch.distributed.barrier()
    assert run_directory.resolve_verified(run) == older
    assert run_directory.newest_verified(run)[0] == older
    with pytest.raises(UserError, match="iter_0000004 is damaged: .*distcp .*; use another checkpoint"):
        run_directory.resolve_verified(newest)
    if rank == 0:
        run_directory.set_aside([newest])
    torch.distributed.barrier()
    assert run_directory.complete_checkpoints(run) == [older] and (run / "iter_0000004.damaged").is_dir()


def _changed_before_it_was_hashed(rank: int, checkpoint: Path) -> None:
    """A value that was not written as it was in memory, with checksums of files that agree: found when it is
    loaded."""
    index = torch_index.read(checkpoint)
    name = "decoder.layers.mlp.linear_fc2.weight"
    places = [place for key, place in index.storage_data.items() if key.fqn == name]
    assert places
    if rank == 0:
        file = checkpoint / places[0].relative_path
        flip(file, places[0].offset + places[0].length // 2, 6)
        sums = integrity.read(checkpoint)
        assert sums is not None
        sums.files[file.name] = integrity.hash_file(file)
        integrity.write(checkpoint, sums.files, sums.tensors)
    torch.distributed.barrier()
    assert integrity.fault_on_all_ranks(checkpoint) is None
    for parallel in (Parallel(tp=2), Parallel(pp=2), Parallel()):
        with pytest.raises(UserError, match=f"the values of {name} are not those that were saved"):
            _train(MODEL, parallel, "fp32", checkpoint.parent / "x", iterations=3, resume=checkpoint)


# ---- a disk that fills while it is written ------------------------------------------------------


def test_a_save_that_fails_in_the_middle(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        run_ranks(_full, 2, str(disk))


def _full(rank: int, world: int, disk: str) -> None:
    shard_writer.check_space = lambda final, size: None  # as if another program took the space afterwards
    save = Path(disk) / "run"
    local_sum = tensor_sums.local_sum
    with pytest.MonkeyPatch.context() as patch:

        def too_large(*arguments: Any) -> int:
            raise torch.OutOfMemoryError("no memory") if rank == 1 else AssertionError

        patch.setattr(tensor_sums, "local_sum", too_large if rank == 1 else local_sum)
        with pytest.raises(UserError, match="iter_0000001 cannot be written: .*OutOfMemoryError: no memory"):
            _train(MODEL, Parallel(tp=2), "fp32", save, iterations=1)
    _train(MODEL, Parallel(tp=2), "fp32", save, iterations=2)
    if rank == 0:
        fill(Path(disk), leave=100_000)
    torch.distributed.barrier()
    message = f"checkpoint {save}/iter_0000003 cannot be written: No space left on device; the last good checkpoint is"
    with pytest.raises(UserError, match=message):
        _train(MODEL, Parallel(tp=2), "fp32", save, iterations=3, resume=save / "iter_0000002")
    torch.distributed.barrier()
    assert [path.name for path in save.iterdir() if "iter_" in path.name] == ["iter_0000002"]
    assert integrity.fault_on_all_ranks(save / "iter_0000002") is None


# ---- one process -------------------------------------------------------------------------------


def test_sums_of_shards_make_the_sum_of_the_tensor() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        x = torch.randn(6, 10, 7).mul(100).to(dtype)
        whole = tensor_sums.local_sum(x, (0, 0, 0), (6, 10, 7))
        parts = [
            tensor_sums.local_sum(x[a : a + 3, :, b : b + n], (a, 0, b), (6, 10, 7))
            for a in (0, 3)
            for b, n in ((0, 2), (2, 5))
        ]
        assert sum(parts) % (1 << 64) == whole
        # Stacked layers: each has a dimension less than the complete tensor.
        assert sum(tensor_sums.local_sum(x[i], (i, 0, 0), (6, 10, 7)) for i in range(6)) % (1 << 64) == whole
        assert tensor_sums.local_sum(x.transpose(0, 1), (0, 0, 0), (10, 6, 7)) != whole

        y = x.clone()
        y[2, 3, 4], y[3, 2, 4] = x[3, 2, 4], x[2, 3, 4]
        assert tensor_sums.local_sum(y, (0, 0, 0), (6, 10, 7)) != whole, "values that changed places"
    # Rows of padding are not counted.
    rows = torch.randn(8, 5)
    padded = torch.cat([rows, torch.randn(4, 5)])
    whole = tensor_sums.local_sum(rows, (0, 0), (8, 5))
    assert tensor_sums.local_sum(padded, (0, 0), (12, 5), rows=8) == whole
    halves = [tensor_sums.local_sum(padded[i : i + 6], (i, 0), (12, 5), rows=8) for i in (0, 6)]
    assert sum(halves) % (1 << 64) == whole
    assert tensor_sums.local_sum(padded[:, 0], (0,), (12,), 8) == tensor_sums.local_sum(
        rows[:, 0], (0,), (8,)
    )
    assert tensor_sums.local_sum(torch.tensor(2.0), (), ()) != 0
    assert tensor_sums.local_sum(torch.empty(0, 5), (0, 0), (8, 5)) == 0


@pytest.mark.parametrize("bit", range(32))
def test_each_bit_changes_a_sum(bit: int) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(bit))
    y = x.clone()
    y.view(torch.int32)[17, 1] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(torch.int32)
    assert tensor_sums.local_sum(x, (0, 0), (40, 3)) != tensor_sums.local_sum(y, (0, 0), (40, 3))


class _Code:
    """What a pickle can do when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_an_index_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(UserError, match=r".metadata contains an unexpected class, builtins.print"):
        torch_index.read(tmp_path)
    assert not capsys.readouterr().out
    (tmp_path / ".metadata").write_bytes(pickle.dumps({1: torch.float32}))
    with pytest.raises(UserError, match="it is no index of a checkpoint"):
        torch_index.read(tmp_path)
    # What a release of Megatron-Core up to 0.15 stored beside the index, and torch up to 2.3 in it.
    for module, name in torch_index._OLDER:
        old = type(name, (), {"__module__": module})
        with pytest.MonkeyPatch.context() as patch:
            parent = importlib.import_module(module)
            patch.setattr(parent, name, old, raising=False)
            index = Metadata(state_dict_metadata={}, storage_data={}, planner_data=[old()])
            if name == "MCoreMetadata":
                index = old()
                index.state_dict_metadata, index.storage_data = {}, {}
            (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
        assert torch_index.read(tmp_path).storage_data == {} and torch_index.fault(tmp_path) is None
    places = {MetadataIndex("w"): _StorageInfo(relative_path="data", offset=90, length=10)}
    index = Metadata(state_dict_metadata={}, storage_data=places)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert torch_index.fault(tmp_path) == "data is missing"
    (tmp_path / "data").write_bytes(bytes(99))
    assert torch_index.fault(tmp_path) == "data has 99 bytes, but its index refers to 100"
    (tmp_path / "data").write_bytes(bytes(100))
    assert torch_index.fault(tmp_path) is None
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r".metadata cannot be read: EOFError"):
        torch_index.read(tmp_path)
