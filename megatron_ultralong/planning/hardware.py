"""Data-sheet figures of GPUs and links, and the fraction of each that a plan assumes to be reached.

Nothing here is measured by this project. Link bandwidths are per direction and per GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.flops import PEAKS

GPUS_PER_NODE = 8
"""GPUs that are connected by NVLink and share the memory of one host."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, by its vendor's data sheet."""

    name: str
    memory: int
    """Bytes, as the vendor counts them."""
    bf16: float
    """Dense bf16 matrix products, FLOP/s."""
    fp32: float
    """float32 without tensor cores, FLOP/s."""
    hbm: float
    """Bandwidth of the GPU's own memory, bytes/s."""
    nvlink: float
    """Bandwidth to all other GPUs of the node together, bytes/s."""
    infiniband: float
    """Bandwidth of the GPU's own network card, bytes/s."""
    pcie: float
    """Bandwidth to host memory, bytes/s."""
    backend: Backend = "cudnn"
    """The attention kernel that context_parallel/kernels/select.py chooses on it."""


# Boards of eight: H100 and H200 SXM5 and HGX B200 with 400 Gbit/s InfiniBand per GPU, A100 SXM4 with 200.
GPUS = {
    gpu.name: gpu
    for gpu in (  # memory, bf16, fp32, hbm, nvlink, infiniband, pcie
        Gpu("h100", 80 * 10**9, PEAKS["H100"], 67e12, 3.35e12, 450e9, 50e9, 64e9),
        Gpu("h200", 141 * 10**9, PEAKS["H200"], 67e12, 4.8e12, 450e9, 50e9, 64e9),
        Gpu("a100", 80 * 10**9, PEAKS["A100"], 19.5e12, 2.04e12, 300e9, 25e9, 32e9, "flash"),
        Gpu("b200", 180 * 10**9, PEAKS["B200"], 75e12, 8e12, 900e9, 50e9, 64e9),
    )
}


def gpu_named(device: str) -> Gpu | None:
    """Return the data sheet of a GPU by the name that torch reports, like "NVIDIA H100 80GB HBM3"; None if it
    is not one of `GPUS`.

    A variant with another peak (planning/flops.py) has that one.
    """
    for name, gpu in GPUS.items():
        if name.upper() in device.upper():
            peak = next(value for part, value in PEAKS.items() if part in device.upper() or part in device)
            return dataclasses.replace(gpu, bf16=peak)
    return None


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Fractions of the data-sheet figures that a plan assumes to be reached. They are not measurements."""

    attention_forward: float = 0.60
    """Of the GPU's peak, by attention kernels in the forward; only the lower triangle is counted."""
    attention_backward: float = 0.50
    """The same in the backward, which counts 2.5 times the FLOPs of the forward."""
    products: float = 0.65
    """Of the GPU's peak, by all other matrix products; includes the time of norms, RoPE and activations."""
    links: float = 0.80
    """Of the bandwidth of GPU memory, NVLink, InfiniBand and PCIe."""
    gpu_memory: float = 0.90
    """Of the GPU's memory; the rest is left for fragmentation, the CUDA context and communication buffers."""
    host_memory: float = 0.90
    """Of a node's memory; the rest is left for the processes themselves."""
    hop_microseconds: float = 30.0
    """Not a fraction: fixed cost of each hop of the context parallel ring, for launches and
    synchronisation."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name == "hop_microseconds":
                if not 0 <= value < float("inf"):
                    raise UserError(f"--assume {name}={value}: must be 0 or more")
            elif not 0 < value <= 1:
                raise UserError(f"--assume {name}={value}: must be a fraction above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a run is planned for."""

    gpu: Gpu
    gpus: int
    """GPUs on all nodes together."""
    host_memory: int = 2 * 1024**4
    """Bytes of host memory per node; an assumption like the others."""
    assumed: Assumptions = dataclasses.field(default_factory=Assumptions)
    documents: DocumentLengths | None = None
    """Documents of the rows, where attention stays inside them; None = as long as the row."""
    save_rate: float | None = None
    """Bytes per second that checkpoints are written with, by all nodes together; None = not known."""

    def __post_init__(self) -> None:
        if self.save_rate is not None and not 0 < self.save_rate < float("inf"):
            raise UserError(f"--save-rate {self.save_rate:g}: must be above 0")
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: must be at least 1")
        if self.host_memory < 1:
            raise UserError(f"--host-memory {self.host_memory}: must be above 0")

    @property
    def gpus_per_node(self) -> int:
        return min(GPUS_PER_NODE, self.gpus)

    def link_bandwidth(self, span: int) -> float:
        """Return the assumed bandwidth, in bytes/s, inside a group that spans `span` consecutive ranks.

        NVLink if every such group lies inside one node, otherwise InfiniBand.
        """
        inside = self.gpus <= GPUS_PER_NODE or (span <= GPUS_PER_NODE and GPUS_PER_NODE % span == 0)
        return (self.gpu.nvlink if inside else self.gpu.infiniband) * self.assumed.links


def parse_assumptions(settings: Sequence[str]) -> Assumptions:
    """Return the default assumptions with `name=value` settings applied.

    Raises UserError for an unknown name or a value out of range.
    """
    names = [field.name for field in dataclasses.fields(Assumptions)]
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise UserError(f"--assume {setting}: expected NAME=NUMBER with NAME one of {', '.join(names)}")
        try:
            values[name] = float(text)
        except ValueError:
            raise UserError(f"--assume {setting}: expected a number") from None
    return Assumptions(**values)
