"""Run a function on several gloo ranks, each a separate process; the first failure is raised."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp

from tests import processes  # starts the server with what ranks import


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> None:
    """Call `function(rank, world_size, *args)` on `world_size` new gloo ranks; raise with the first rank's
    traceback, or TimeoutError after `timeout` seconds.

    `function` must be importable (top level of a test module). The default process group is initialised
    before it.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = mp.start_processes(
        _enter,
        (function, world_size, store.port, timeout, dict(os.environ), args),
        nprocs=world_size,
        join=False,
        start_method=processes.SERVER.get_start_method(),
    )
    end = time.monotonic() + timeout
    try:
        while not ranks.join(max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{function.__name__} on {world_size} ranks took more than {timeout:.0f} s"
                )
    finally:
        for process in ranks.processes:
            process.kill()


def leave_groups() -> None:
    """End all process groups of this rank and join the other ranks again, for the next of several layouts in
    one call.

    Groups that are only dropped keep their threads, and each of gloo's wakes a hundred times per second.
    RuntimeError if the others do not come: after an exception of this rank alone they wait elsewhere.
    """
    from megatron_ultralong.runtime import launch

    torch.distributed.monitored_barrier(timeout=timedelta(seconds=120))
    launch.stop()
    _forget_optimizers()
    gc.collect()  # modules refer to their groups in circles
    _join()


def _enter(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    timeout: float,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    _place.update(
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        times=0,
        store=torch.distributed.TCPStore("127.0.0.1", port, is_master=False),
    )
    _join()
    try:
        function(rank, world_size, *args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.distributed.barrier()  # so that the others do not take the first rank's end for a failure
    torch.distributed.destroy_process_group()


def _forget_optimizers() -> None:
    """Empty the distributed optimizers: in float32 runs their shards hold the hooks of the gradients in C++,
    unseen by the collector."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for thing in gc.get_objects():
        if type(thing) is DistributedOptimizer:
            vars(thing).clear()


_place: dict[str, Any] = {}
"""This process's place among the ranks."""


def _join() -> None:
    _place["times"] += 1
    store = torch.distributed.PrefixStore(str(_place["times"]), _place["store"])
    torch.distributed.init_process_group(
        "gloo", store=store, rank=_place["rank"], world_size=_place["world_size"], timeout=_place["timeout"]
    )
