"""Run a function on several gloo ranks: spawned once, first failure wins."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> None:
    """Call `function(rank, world_size, *args)` on `world_size` spawned gloo ranks; raise with the first
    rank's traceback.

    `function` must be importable (top level of a test module). The default process group is initialised
    before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _enter, (function, world_size, folder, timeout, args), nprocs=world_size, start_method="spawn"
        )


def leave_groups() -> None:
    """End all process groups of this rank and join the other ranks anew: for the next of several layouts in
    one spawn.

    Groups that are only forgotten keep their threads, and each of gloo's wakes a hundred times a second.
    """
    from megatron_ultralong.runtime import launch

    torch.distributed.barrier()
    launch.stop()
    _forget_optimizers()
    gc.collect()  # modules refer to their groups in circles
    _join()


def _enter(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    folder: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    _place.update(
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        times=0,
        store=_meet(rank, world_size, folder),
    )
    _join()
    try:
        function(rank, world_size, *args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.distributed.barrier()  # rank 0 keeps the store: it must not leave first
    torch.distributed.destroy_process_group()


def _meet(rank: int, world_size: int, folder: str) -> torch.distributed.TCPStore:
    """The ranks' store, on a port that rank 0 was given and wrote down. A file as the store would take
    seconds for each layout."""
    place = os.path.join(folder, "port")
    if rank == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with open(f"{place}.partial", "w") as file:
            file.write(str(store.port))
        os.rename(f"{place}.partial", place)
        return store
    while not os.path.exists(place):
        time.sleep(0.05)
    with open(place) as file:
        return torch.distributed.TCPStore("127.0.0.1", int(file.read()), is_master=False)


def _forget_optimizers() -> None:
    """Empty the distributed optimizers: in float32 runs their shards hold the hooks of the gradients in C++,
    unseen by the collector."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for thing in gc.get_objects():
        if type(thing) is DistributedOptimizer:
            vars(thing).clear()


_place: dict[str, Any] = {}
"""Where this process stands among the spawned ranks."""


def _join() -> None:
    _place["times"] += 1
    store = torch.distributed.PrefixStore(str(_place["times"]), _place["store"])
    torch.distributed.init_process_group(
        "gloo", store=store, rank=_place["rank"], world_size=_place["world_size"], timeout=_place["timeout"]
    )
