"""Run a function on several gloo ranks: spawned once, file rendezvous, first failure wins."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> None:
    """Call `function(rank, world_size, *args)` on `world_size` spawned gloo ranks; raise with the first rank's traceback.

    `function` must be importable (top level of a test module). The default process group is initialised before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (function, world_size, os.path.join(folder, "rendezvous"), timeout, args), nprocs=world_size,
                           start_method="spawn")


def _enter(rank: int, function: Callable[..., Any], world_size: int, rendezvous: str, timeout: float, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size,
                                         timeout=timedelta(seconds=timeout))
    try:
        function(rank, world_size, *args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.distributed.destroy_process_group()
