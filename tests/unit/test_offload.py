"""The host store of offloaded tensors: what comes back, in which order, and how much host memory it takes."""

from __future__ import annotations

import errno
from collections import namedtuple
from typing import Any

import psutil
import pytest
import torch

from megatron_ultralong.config import OFFLOADED_LAYERS_ON_GPU, Memory
from megatron_ultralong.errors import UserError
from megatron_ultralong.model.layer import offload
from megatron_ultralong.model.layer.offload import HostStore, OffloadedHiddenStates


def tensors(layer: int) -> list[torch.Tensor]:
    """A contiguous tensor, a transposed one and an empty one, different in every layer."""
    generator = torch.Generator().manual_seed(layer)
    return [
        torch.randn(5, 3, generator=generator),
        torch.randn(4, 2, 3, generator=generator).permute(1, 2, 0).bfloat16(),
        torch.empty(0, 3),
    ]


def test_everything_comes_back_and_host_memory_is_reused() -> None:
    store = HostStore(torch.device("cpu"))
    for step in range(3):
        store.begin_forward()
        kept = [store.offload(tensors(10 * step + layer)) for layer in range(5)]
        assert sum(k.on_device for k in kept) == OFFLOADED_LAYERS_ON_GPU
        for layer in reversed(range(5)):
            got = kept[layer].fetch()
            if layer:
                assert kept[layer - 1].on_device, "the layer before was not fetched ahead"
            assert sum(k.on_device for k in kept) <= OFFLOADED_LAYERS_ON_GPU
            for x, y in zip(got, tensors(10 * step + layer), strict=True):
                assert x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)
        assert store.bytes == 5 * (15 * 4 + 24 * 2), "host memory grew with the steps"


def test_a_graph_dropped_without_backward_gives_its_memory_back() -> None:
    store = HostStore(torch.device("cpu"))
    for _ in range(4):
        store.begin_forward()
        kept = [store.offload(tensors(layer)) for layer in range(3)]
        del kept
    assert store.bytes <= (3 + OFFLOADED_LAYERS_ON_GPU) * (15 * 4 + 24 * 2)


def test_micro_batches_that_overlap() -> None:
    """1F1B: the forward of the next micro-batch runs before the backward of the first."""
    store = HostStore(torch.device("cpu"))
    passes: list[list[Any]] = []
    for micro_batch in range(3):
        store.begin_forward()
        passes.append([store.offload(tensors(10 * micro_batch + layer)) for layer in range(4)])
        if micro_batch:
            for layer in reversed(range(4)):
                got = passes[micro_batch - 1][layer].fetch()
                assert sum(k.on_device for kept in passes for k in kept) <= 1, (
                    "more on the device than what comes next"
                )
                assert torch.equal(got[0], tensors(10 * (micro_batch - 1) + layer)[0])
    assert store.bytes == 2 * 4 * (15 * 4 + 24 * 2)


def test_rows_come_back_any_number_of_times() -> None:
    store = HostStore(torch.device("cpu"))
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    chunks = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for _ in range(2):
        store.begin_forward()
        rows = OffloadedHiddenStates(store, x.shape)
        for chunk in chunks:
            rows.offload(chunk, x[chunk])
        store.drop_device_copies()
        assert len(rows) == 10 and rows.shape == x.shape
        kept = list(rows._chunks.values())
        assert not any(k.on_device for k in kept)
        for _ in range(3):
            for i in (2, 1, 0):
                assert torch.equal(rows[chunks[i]], x[chunks[i]])
                assert [k.on_device for k in kept] == [j == i - 1 for j in range(3)], (
                    "only the next is on its way"
                )
        del rows, kept
    assert store.bytes == 10 * 3 * 4


def test_a_machine_without_memory_left_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "total available")(1000, 60))
    with pytest.raises(UserError, match=r"memory\.offload.*host memory are left"):
        HostStore(torch.device("cpu")).offload([torch.zeros(5, 3)])


def test_offload_needs_recompute_all_but_attention() -> None:
    with pytest.raises(
        UserError, match=r"memory\.offload=layer_inputs requires memory\.recompute=all_but_attention"
    ):
        Memory(recompute="full", offload="layer_inputs")


def test_too_many_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*given: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(offload.mmap, "mmap", none_left)
    with pytest.raises(UserError, match=r"cannot be mapped \(Cannot allocate memory\): .*vm.max_map_count"):
        offload._HostBuffer(2**20, pinned=True)
