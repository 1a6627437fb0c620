"""Every cp_comm_type with and without Ulysses over gloo ranks, against full attention (over virtual ranks:
tests/unit/test_context_parallel.py)."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ultralong import library
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.context_parallel.api import ContextGroups, attention, split_group
from megatron_ultralong.context_parallel.comm import ProcessGroupCommunicator, rank_and_size
from tests.distributed.test_ring import check, sequence
from tests.packed import held
from tests.spawn import run_ranks
from tests.unit.test_context_parallel import (
    COMM_TYPES,
    compute,
    documents,
    expected,
    packed_attention,
    shards,
    spec,
)


def test_over_gloo() -> None:
    run_ranks(_over_gloo, 4)


def _over_gloo(rank: int, world_size: int) -> None:
    _collectives(dist.group.WORLD, rank, world_size)
    for cp, ulysses in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        strides = 4 // cp  # ranks apart, as with tensor parallelism inside
        group = [dist.new_group(list(range(first, 4, strides))) for first in range(strides)][rank % strides]
        for comm_type in COMM_TYPES:
            groups = split_group(group, ulysses, comm_type)
            assert (groups.size, groups.rank) == (cp, rank // strides)
            if groups.ulysses is not None:  # adjacent ones of the group
                ranks = zigzag.ulysses_ranks(cp, ulysses)[groups.rank // ulysses]
                assert dist.get_process_group_ranks(groups.ulysses) == [
                    r * strides + rank % strides for r in ranks
                ]
            for h, g in ((8, 4), (4, 1)):
                packings = documents(cp, 5)
                for b, name in (
                    (2, "not packed"),
                    (1, "one-token documents"),
                    (1, "across every border of chunks"),
                    (1, "any"),
                ):
                    starts = packings.get(name)
                    inputs = sequence((b, h, g, 5, 8), cp, seed=rank % strides)
                    check(
                        compute(inputs, groups, starts),
                        expected(inputs, starts),
                        groups.rank,
                        cp,
                        what=(comm_type, ulysses, h, g, name),
                        held=held(inputs[0].shape[2], groups.rank, cp, starts, ulysses),
                    )
            half = [x.bfloat16().double() for x in inputs]
            for x, y in zip(
                compute(half, groups, starts, torch.bfloat16), expected(half, starts), strict=True
            ):
                y = y[:, :, held(inputs[0].shape[2], groups.rank, cp, starts, ulysses)]
                assert x.dtype == torch.bfloat16 and (x.double() - y).norm() / y.norm() < 0.03, (
                    comm_type,
                    cp,
                    ulysses,
                )
            _layers(groups)
    dist.group.WORLD.bound_device_id = torch.device(
        "cpu", 0
    )  # as init_process_group(device_id=...) leaves it
    with pytest.raises(ValueError, match="started with a device_id"):
        split_group(dist.group.WORLD, 2)
    dist.group.WORLD.bound_device_id = None


def _collectives(group: dist.ProcessGroup, rank: int, size: int) -> None:
    """Literally, in the dtypes that are sent."""
    comm = ProcessGroupCommunicator(group)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        send = (10 * rank + torch.arange(size)).to(dtype)[:, None].repeat(1, 2)  # [size, 2]
        receive = torch.empty_like(send)
        comm.all_to_all(send, receive).wait()
        assert receive[:, 1].tolist() == [10 * source + rank for source in range(size)]
        comm.all_gather(send[0], receive).wait()
        assert receive[:, 0].tolist() == [10 * source for source in range(size)]
        comm.reduce_scatter(send, receive[0]).wait()
        assert receive[0].tolist() == [sum(10 * source + rank for source in range(size))] * 2


def _layers(groups: ContextGroups) -> None:
    """Two layers, one of them recomputed; the backward on another thread."""
    cp, rank, starts = groups.size, groups.rank, [0, 3]
    inputs = sequence((1, 8, 4, 3, 8), cp, seed=11)
    if cp == 1:
        starts = [0]

    def stack(q: Tensor, k: Tensor, v: Tensor, attend, recompute) -> Tensor:
        return attend(recompute(attend, q, k, v) + q, k, v)

    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = stack(*leaves, lambda *x: packed_attention(*x, starts), lambda f, *x: f(*x))
    want = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    q, k, v, dout = shards(inputs, groups, starts)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = stack(
        *leaves,
        lambda *x: attention(*x, groups, spec(starts, 6 * cp if cp > 1 else 3, groups)),
        lambda f, *x: checkpoint(f, *x, use_reentrant=False),
    )
    thread = threading.Thread(target=out.backward, args=(dout,))
    thread.start()
    thread.join()
    mine = held(inputs[0].shape[2], rank, cp, starts, rank_and_size(groups.ulysses)[1])
    # The library's functions, which take the starts of documents themselves.
    assert torch.equal(library.token_positions(inputs[0].shape[2], groups, starts), mine)
    once = attention(q, k, v, groups, spec(starts, 6 * cp if cp > 1 else 3, groups))
    assert torch.equal(library.attention(q, k, v, groups, starts), once)
    got = [out.detach(), *(x.grad for x in leaves)]
    check(got, want, rank, cp, what=("layers", groups.cp_comm_type), held=mine)
