"""Figures of GPUs and links to plan with: data-sheet peaks, and the shares of them that are assumed to be
reached.

Nothing here is measured by this project. Link figures are of one direction and one GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ultralong.errors import UserError
from megatron_ultralong.planning.flops import PEAKS

GPUS_PER_NODE = 8
"""GPUs that NVLink joins, and that share a host's memory."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in a node of eight, by its vendor's data sheets."""

    name: str
    memory: int
    """Bytes, as the vendor counts them."""
    bf16: float
    """Dense bf16 matrix products, FLOP/s."""
    fp32: float
    """float32 without tensor cores, FLOP/s."""
    hbm: float
    """Bytes/s of its own memory."""
    nvlink: float
    """Bytes/s to the other GPUs of the node together."""
    infiniband: float
    """Bytes/s of the GPU's own network card."""
    pcie: float
    """Bytes/s to the host's memory."""


# On boards of eight: H100, H200 SXM5 and HGX B200 with 400 Gbit/s InfiniBand a GPU, A100 SXM4 with 200.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            memory=80 * 10**9,
            bf16=PEAKS["H100"],
            fp32=67e12,
            hbm=3.35e12,
            nvlink=450e9,
            infiniband=50e9,
            pcie=64e9,
        ),
        Gpu(
            name="h200",
            memory=141 * 10**9,
            bf16=PEAKS["H200"],
            fp32=67e12,
            hbm=4.8e12,
            nvlink=450e9,
            infiniband=50e9,
            pcie=64e9,
        ),
        Gpu(
            name="a100",
            memory=80 * 10**9,
            bf16=PEAKS["A100"],
            fp32=19.5e12,
            hbm=2.04e12,
            nvlink=300e9,
            infiniband=25e9,
            pcie=32e9,
        ),
        Gpu(
            name="b200",
            memory=180 * 10**9,
            bf16=PEAKS["B200"],
            fp32=75e12,
            hbm=8e12,
            nvlink=900e9,
            infiniband=50e9,
            pcie=64e9,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Shares of the data sheets' figures that a plan assumes. They are no measurements."""

    attention_forward: float = 0.60
    """Of the GPU's peak, by attention kernels going forward; lower triangle counted."""
    attention_backward: float = 0.50
    """The same going backward, 2.5 times the forward's FLOPs counted."""
    products: float = 0.65
    """Of the GPU's peak, by all other matrix products, with norms, RoPE and activations in their time."""
    links: float = 0.80
    """Of the bandwidth of GPU memory, NVLink, InfiniBand and PCIe."""
    gpu_memory: float = 0.90
    """Of the GPU's memory; the rest is for fragmentation, the CUDA context and communication buffers."""
    host_memory: float = 0.90
    """Of a node's memory; the rest is for the processes themselves."""
    hop_microseconds: float = 30.0
    """No share: what each hop of the context parallel ring costs beside its work, for launches and waiting on
    neighbours."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name == "hop_microseconds":
                if not 0 <= value < float("inf"):
                    raise UserError(f"--assume {name}={value}: must be 0 or more")
            elif not 0 < value <= 1:
                raise UserError(f"--assume {name}={value}: a share must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for."""

    gpu: Gpu
    gpus: int
    """GPUs of all nodes together."""
    host_memory: int = 2 * 1024**4
    """Bytes a node; an assumption like the others."""
    assumed: Assumed = dataclasses.field(default_factory=Assumed)
    document_length: int | None = None
    """Mean tokens of a document, where attention stays inside documents; None = that of the row."""

    def __post_init__(self) -> None:
        if self.document_length is not None and self.document_length < 1:
            raise UserError(f"--document-length {self.document_length}: must be at least 1")
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: must be at least 1")
        if self.host_memory < 1:
            raise UserError(f"--host-memory {self.host_memory}: must be above 0")

    @property
    def gpus_a_node(self) -> int:
        return min(GPUS_PER_NODE, self.gpus)

    def link(self, neighbours: int) -> float:
        """Bytes/s, as assumed, inside a group that spans `neighbours` consecutive ranks: NVLink where each
        such group lies in one node."""
        inside = self.gpus <= GPUS_PER_NODE or (
            neighbours <= GPUS_PER_NODE and GPUS_PER_NODE % neighbours == 0
        )
        return (self.gpu.nvlink if inside else self.gpu.infiniband) * self.assumed.links


def assume(settings: list[str]) -> Assumed:
    """The assumptions with `name=value` settings changed. UserError for an unknown name or a value out of
    range."""
    names = [field.name for field in dataclasses.fields(Assumed)]
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise UserError(f"--assume {setting}: expected NAME=NUMBER with NAME one of {', '.join(names)}")
        try:
            values[name] = float(text)
        except ValueError:
            raise UserError(f"--assume {setting}: expected a number") from None
    return Assumed(**values)
