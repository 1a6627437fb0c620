"""Memory and time of a run that is not started, on this machine's devices or on assumed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from megatron_ultralong.config import Model, Run
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory, search, whole_run
from megatron_ultralong.planning.hardware import GPUS, Gpu, Machine, gpu_named
from megatron_ultralong.runtime import launch
from megatron_ultralong.runtime import memory as device_memory
from megatron_ultralong.train.dry_run_report import Finding

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device of this rank."""

    gpu: Gpu | None
    """None on a CPU."""
    name: str
    seen: bool
    """Whether this machine has it; it is assumed otherwise."""
    known: bool
    """Whether its speed is known, and not only its memory."""
    problem: str | None = None

    @property
    def on_cpu(self) -> bool:
        return self.gpu is None

    @staticmethod
    def of(run: Run, assumed: str) -> Hardware:
        """This rank's device where it has one; outside torchrun a GPU is assumed where there is none."""
        if assumed not in GPUS:
            raise UserError(f"--gpu {assumed}: unknown; choose one of {', '.join(GPUS)}")
        choice = run.runtime.device
        if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
            return Hardware(gpu=None, name="cpu", seen=True, known=False)
        if not torch.cuda.is_available():
            gpu = GPUS[assumed]
            return Hardware(gpu=gpu, name=gpu.name, seen=False, known=True, problem=_missing(choice))
        problem = _missing(choice)
        properties = torch.cuda.get_device_properties(0 if problem else launch.pick_device(choice))
        sheet = gpu_named(properties.name)
        gpu = replace(sheet or GPUS[assumed], memory=properties.total_memory)
        return Hardware(gpu=gpu, name=properties.name, seen=True, known=sheet is not None, problem=problem)

    def describe(self) -> str:
        """One line. UserError where the run cannot have it."""
        if self.problem is not None:
            raise UserError(self.problem)
        if self.gpu is None:
            return "CPU"
        size = f"{self.gpu.memory / GB:.0f} GB"
        return f"{self.name}, {size}" if self.seen else f"{self.name}, {size} (assumed: no GPU here; --gpu)"


def _missing(choice: str) -> str | None:
    """Why this rank of torchrun has no GPU; None where it has one, or the ranks are elsewhere."""
    try:
        if launch.under_torchrun():
            launch.pick_device(choice)
    except UserError as error:
        return str(error)
    return None


def plan(run: Run, model: Model, world: int, hardware: Hardware) -> list[Finding]:
    """Estimated memory and time. UserError where the layout does not divide the ranks, model or batch."""
    if hardware.gpu is None:
        run = memory.settle_offload(run, model, world, None, "cpu")
        return [_host_only(run, model, world)]
    machine = Machine(gpu=hardware.gpu, gpus=world)
    if hardware.seen:
        machine = replace(machine, host_memory=psutil.virtual_memory().total)
    run = memory.settle_offload(run, model, world, hardware.gpu.memory, hardware.gpu.backend)
    estimate = search.estimate(run, model, machine)
    parts = estimate.memory
    largest = max(parts, key=lambda name: parts[name])
    usable = machine.assumed.gpu_memory * machine.gpu.memory
    text = (
        f"{memory.total(parts) / GB:.1f} of {usable / GB:.1f} GB per GPU, estimated; most of it {largest} "
        f"({parts[largest] / GB:.1f} GB); memory.recompute={run.memory.recompute} memory.offload={run.memory.offload}"
    )
    found = [Finding(subject="memory", text=estimate.problem or text, wrong=estimate.problem is not None)]
    if estimate.host:
        usable = machine.assumed.host_memory * machine.host_memory
        assumed = "" if hardware.seen else " assumed"
        text = (
            f"{memory.total(estimate.host) / GB:,.0f} of{assumed} {usable / GB:,.0f} GB per node, estimated"
        )
        found.append(Finding(subject="host memory", text=text))
    if hardware.known:
        whole = whole_run.duration(estimate, model, machine)
        found.append(
            Finding(
                subject="time",
                text=f"{estimate.seconds:.3g} s per iteration, {estimate.tokens_per_second:,.0f} tokens/s/GPU; "
                f"{whole.iterations:,} iterations take {whole.hours:,.3g} hours, {whole.gpu_hours:,.0f} GPU-hours, estimated; "
                f"{whole_run.NOT_INCLUDED}",
            )
        )
    return found


def _host_only(run: Run, model: Model, world: int) -> Finding:
    """The memory of a rank on a CPU, beside this rank's share of what is available."""
    parts = memory.gpu_memory(run, model, world, "cpu")
    local = launch.local_world_size() if launch.under_torchrun() else world
    needed, free = memory.total(parts), device_memory.host_bytes() // local
    if needed > free:
        return Finding(
            subject="memory",
            text=f"needs {needed / GB:.1f} GB per rank, but only {free / GB:.1f} GB are available to each of {local} ranks; "
            "use fewer ranks on a host, more parallel.cp, or a shorter train.seq_length",
            wrong=True,
        )
    return Finding(
        subject="memory", text=f"{needed / GB:.2g} of {free / GB:.1f} GB per rank, estimated", varies=True
    )
