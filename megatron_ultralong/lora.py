"""LoRA (Hu et al., arXiv 2106.09685): its settings, the linears it applies to, PEFT's names of its tensors.

A linear W [out, in] with an adapter computes W x + alpha / rank B A x, with A [rank, in] and B [out, rank].
Pure: no torch, no Megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from megatron_ultralong.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Part = Literal["a", "b"]
"""A or B of an adapter."""
PARTS: tuple[Part, ...] = get_args(Part)
TARGETS: tuple[Target, ...] = get_args(Target)
LINEARS: dict[str, tuple[Target, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's linears, and Hugging Face's that each is made of."""
SPLIT_INPUT: tuple[Target, ...] = ("o_proj", "down_proj")
"""Linears whose input is split over tensor parallel ranks; the output of the others is."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters that are trained in place of the weights."""

    rank: int = 0
    """Rank of each adapter; 0 = no adapters, all weights are trained."""
    alpha: float = 32.0
    """The product of an adapter counts alpha / rank times."""
    targets: tuple[Target, ...] = TARGETS
    """Linears that get an adapter, by Hugging Face's names."""
    train_norms: bool = False
    """Train the norms too, as LongLoRA (arXiv 2309.12307) does for longer contexts."""
    train_embeddings: bool = False
    """Train the input embedding too, as LongLoRA does; with tied embeddings it is also the output layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # a list in JSON
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank} must be 0 (no adapters) or more")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha} must be a positive number")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise UserError(
                f"lora.targets={','.join(self.targets)} must name each linear once, of {', '.join(TARGETS)}"
            )
        if not self.rank and (self.train_norms or self.train_embeddings):
            raise UserError("lora.train_norms and lora.train_embeddings require lora.rank above 0")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class Sizes(Protocol):
    """What of a model's shape (config.Model) its adapters depend on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def shapes(target: Target, model: Sizes, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B of the adapter of a linear."""
    h, q, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    rows, columns = {
        "q_proj": (q, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, q),
        "gate_proj": (model.ffn_size, h),
        "up_proj": (model.ffn_size, h),
        "down_proj": (h, model.ffn_size),
    }[target]
    return (rank, columns), (rows, rank)


def split_dim(target: Target, which: Part) -> int | None:
    """Dimension over which A or B is split over tensor parallel ranks; None = every rank has all of it."""
    if target in SPLIT_INPUT:
        return 1 if which == "a" else None
    return 0 if which == "b" else None


def hf_linear(target: Target, layer: int) -> str:
    """Hugging Face's name of a linear, without `.weight`."""
    inside = "self_attn" if target in (*LINEARS["linear_qkv"], *LINEARS["linear_proj"]) else "mlp"
    return f"model.layers.{layer}.{inside}.{target}"


PEFT_PREFIX = "base_model.model."
"""Before Hugging Face's names of a model's tensors in PEFT's files."""


def peft_tensor(linear: str, which: Part) -> str:
    """PEFT's name of A or B of a linear, given by Hugging Face's name without `.weight`."""
    return f"{PEFT_PREFIX}{linear}.lora_{which.upper()}.weight"


def peft_name(target: Target, layer: int, which: Part) -> str:
    """PEFT's name of A or B in adapter_model.safetensors."""
    return peft_tensor(hf_linear(target, layer), which)


def parameters(model: Sizes, lora: Lora, tp: int) -> int:
    """Return the number of adapter parameters of one layer on each of `tp` ranks."""
    count = 0
    for target in lora.targets:
        for which, (rows, columns) in zip(PARTS, shapes(target, model, lora.rank), strict=True):
            count += rows * columns // (1 if split_dim(target, which) is None else tp)
    return count
