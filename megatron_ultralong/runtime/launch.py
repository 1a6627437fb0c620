"""Start of a rank: device, torch.distributed, Megatron's process groups, seeds."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy
import torch

from megatron_ultralong.config import Parallel, Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import workers
from megatron_ultralong.runtime import cli, memory
from megatron_ultralong.runtime.heartbeat import Heartbeat


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank in each parallel dimension, its device and the process groups."""

    rank: int
    world: int
    device: torch.device
    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    cp_rank: int
    cp: int
    dp_rank: int
    dp: int
    groups: Any
    """Megatron's ProcessGroupCollection."""
    timeout: timedelta | None = None
    """Timeout of collectives, for groups created later."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """This rank's signs of life, by which the others notice that it hangs."""

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes shared files."""
        return self.rank == 0


def start(runtime: Runtime, parallel: Parallel, seed: int = 1234, deterministic: bool = False) -> Ranks:
    """Join torchrun's process group (a single rank without torchrun) and create Megatron's groups.

    UserError where the device is not available or the ranks do not fit the layout.
    """
    cli.quiet()
    cli.end_with_torchrun()
    device = pick_device(runtime.device)
    world = world_size()
    dp = parallel.data_parallel(world)
    if device.type == "cpu":
        from megatron_ultralong.runtime import cpu_device

        cpu_device.install()
        # Ranks share the cores: more threads than cores are slower.
        if "OMP_NUM_THREADS" not in os.environ or world > 1:
            local = local_world_size()
            torch.set_num_threads(max(1, workers.cores() // local))
    else:
        memory.grow_segments()
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    global _heartbeat
    _heartbeat = Heartbeat()
    _heartbeat.start(runtime.hang_minutes, runtime.timeout_minutes)
    join(device, runtime.timeout_minutes)

    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=runtime.timeout_minutes,
    )
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Ranks(
        rank=torch.distributed.get_rank(),
        world=world,
        device=device,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        dp=dp,
        tp_rank=groups.tp.rank(),
        pp_rank=groups.pp.rank(),
        cp_rank=groups.cp.rank(),
        dp_rank=groups.dp.rank(),
        groups=groups,
        timeout=timedelta(minutes=runtime.timeout_minutes),
        heartbeat=_heartbeat,
    )


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of several ranks, or as the only one."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def world_size() -> int:
    """Number of ranks of this run, before torch.distributed is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def stop() -> None:
    """Destroy Megatron's groups and torch.distributed's; safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _heartbeat.stop()


def pick_device(choice: str) -> torch.device:
    """Return `runtime.device` as this rank's torch device. UserError where it is not available."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "runtime.device=cuda, but torch sees no GPU here; check the driver, or --set runtime.device=cpu"
        )
    local, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= available:
        raise UserError(
            f"torchrun started at least {local + 1} ranks on a node with {available} GPUs; lower --nproc-per-node"
        )
    return torch.device("cuda", local)


def join(device: torch.device, timeout_minutes: int) -> None:
    """Initialise torch.distributed with the device's backend; a single process without torchrun uses an
    in-memory store."""
    if torch.distributed.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if under_torchrun():
        store, rank, world = _meeting.store(timeout)
    else:
        store, rank, world = torch.distributed.HashStore(), 0, 1
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


class _Meeting:
    """torchrun's store, which all ranks share, for any number of process groups one after the other."""

    def __init__(self) -> None:
        self._found: tuple[Any, int, int] | None = None
        self._groups = 0

    def store(self, timeout: timedelta) -> tuple[Any, int, int]:
        """Return (store, rank, world size) for the next process group. Each group has its own keys: it would
        find the addresses of the one before in theirs."""
        if self._found is None:
            self._found = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store, rank, world = self._found
        self._groups += 1
        return torch.distributed.PrefixStore(f"group {self._groups}", store), rank, world


_meeting = _Meeting()
_heartbeat = Heartbeat()
